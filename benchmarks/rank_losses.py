"""How long do the other ranks run on when one is lost, of a pipeline, with DDP or with FSDP2?

Two ranks train a small network as two hosts would: ``fingpt fit`` in a process for each, over gloo.
At a chosen moment one is killed, stopped, or cut off: the ranks live in network namespaces that a
third one joins, and that one drops all packets between them while both links stay up. Measured is
the time until every rank has ended. Cutting off needs root on Linux, and ``ip``.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.lost_rank import GO_ON, MARKER, MOMENTS, POLL_S, run_rank
from benchmarks.record import markdown_table, new_record, spread, write_record

QUESTION = (
    "When one of several ranks is killed, stopped or cut off, have all ranks ended within timeout_s"
    " and five seconds, each with a line that names the lost one?"
)
SLACK_S = 5.0
KINDS = ("killed", "stopped", "cut off")
STRATEGIES = ("DataParallel", "FullySharded")
SCHEDULES = ("1F1B", "GPipe", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV", *STRATEGIES)
"""How two ranks share the work: a pipeline by its schedule, or each with its own data."""
_ROOT = Path(__file__).parents[1]
_NUM_RANKS = 2
_START_TIMEOUT_S = 300
_ATTEMPTS = 5


class NotBegunError(RuntimeError):
    """The ranks did not come so far: on a busy machine one may wait ``timeout_s`` for another."""


class Case(NamedTuple):
    """One loss of a rank.

    Attributes:
        kind: Kind of the loss.
        schedule: Schedule of the passes, one of `SCHEDULES`.
        rank: Number of the rank that is lost, of two.
        moment: What the rank does at the moment of the loss.
    """

    kind: str
    schedule: str
    rank: int
    moment: str


class Outcome(NamedTuple):
    """The outcome of a loss.

    Attributes:
        ended_s: Seconds from the loss until the last rank had ended.
        statuses: Exit status of each rank; negative for a signal.
        said: Last line of each rank, or what else it wrote after the loss.
        is_named: Whether each rank that could report named the lost one, in one line.
    """

    ended_s: float
    statuses: list[int | None]
    said: list[str]
    is_named: bool


def main() -> None:
    """Loses a rank in every case and writes record and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument("--timeout_s", type=float, default=5.0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=list(MOMENTS))
    parser.add_argument("--ranks", nargs="+", type=int, choices=(0, 1), default=[0, 1])
    parser.add_argument("--at_once", type=int, default=1, help="cases")
    options = parser.parse_args()
    kinds = [kind for kind in options.kinds if kind != "cut off" or can_cut()]
    settings = {**vars(options), "kinds": kinds, "slack_s": SLACK_S}
    del settings["json"]
    record = new_record(QUESTION, settings)
    cases = cases_of(kinds, options.schedules, options.ranks, options.moments)
    record["rows"] = []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([run_rank.__module__])  # ranks are forks of one process
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.at_once) as pool:

        def row(case: Case) -> dict[str, Any]:
            for attempt in range(1, _ATTEMPTS + 1):
                with contextlib.suppress(NotBegunError):
                    outcome = lose(case, Path(folder), options.timeout_s, context)
                    return _row(case, outcome) | {"attempts": attempt}
            raise RuntimeError(f"{case}: the ranks did not come to the moment of the loss")

        for number, found in enumerate(pool.map(row, cases), 1):
            print(f"{number}/{len(cases)}: {found}", file=sys.stderr)
            record["rows"].append(found)
    record["summary"] = summary(record["rows"], options.timeout_s)
    write_record(options.json, record, table(record["rows"]))


def cases_of(
    kinds: Sequence[str], schedules: Sequence[str], ranks: Sequence[int], moments: Sequence[str]
) -> list[Case]:
    """Every moment with the first schedule, and one moment, in turn, with each of the others."""
    cases = [
        Case(kind, schedules[0], rank, moment)
        for kind, rank, moment in itertools.product(kinds, ranks, moments)
    ]
    turn = itertools.cycle(moments)
    return cases + [
        Case(kind, schedule, rank, next(turn))
        for schedule, kind, rank in itertools.product(schedules[1:], kinds, ranks)
    ]


def can_cut() -> bool:
    """Whether this process may make network namespaces."""
    if shutil.which("ip") is None:
        return False
    name = f"fingpt-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "del", name], check=True)
    return made.returncode == 0


def lose(case: Case, folder: Path, timeout_s: float, context: Any) -> Outcome:
    """Starts the ranks, loses one and waits for the end of all.

    Args:
        case: Case that is to happen.
        folder: Folder of the data that all cases share.
        timeout_s: ``timeout_s`` of the strategy.
        context: Context of `multiprocessing`, by which ranks are started.
    """
    own = Path(tempfile.mkdtemp(dir=folder))
    words = _words(case, own, folder / "data", timeout_s)
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(_hosts()) if case.kind == "cut off" else None
        address = "127.0.0.1" if hosts is None else hosts.addresses[0]
        port = str(_free_port())
        ranks: list[Any] = []
        for rank in range(_NUM_RANKS):
            variables = {
                "MASTER_ADDR": address, "MASTER_PORT": port, "LOCAL_RANK": "0",
                "NODE_RANK": str(rank), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline",
            }  # fmt: skip
            namespace = None
            if hosts is not None:
                namespace, variables["GLOO_SOCKET_IFNAME"] = hosts.namespaces[rank], "eth0"
            process = context.Process(
                target=run_rank, args=(own, rank, words, variables, namespace), daemon=True
            )
            process.start()
            stack.callback(_reap, process)
            ranks.append(process)
        _await(own / MARKER, ranks, own)
        began_s = time.monotonic()
        lost = ranks[case.rank]
        if hosts is not None:
            hosts.cut()
        else:
            os.kill(lost.pid, signal.SIGKILL if case.kind == "killed" else signal.SIGSTOP)
        (own / GO_ON).touch()
        for process in ranks:
            process.join(max(0.1, began_s + timeout_s + 4 * SLACK_S - time.monotonic()))
        ended_s = time.monotonic() - began_s
        statuses = [process.exitcode for process in ranks]
    said = [_said(own / f"rank{rank}") for rank in range(_NUM_RANKS)]
    speakers = [r for r in range(_NUM_RANKS) if r != case.rank or case.kind == "cut off"]
    is_named = all(
        len(said[r].splitlines()) == 1
        and said[r].startswith("fingpt: error")
        and f"rank {case.rank if r != case.rank else 1 - case.rank} (host" in said[r]
        and statuses[r] == 1
        for r in speakers
    )
    return Outcome(ended_s, statuses, said, is_named)


def summary(rows: Sequence[dict[str, Any]], timeout_s: float) -> dict[str, Any]:
    """How many were lost, and how all ended."""
    seconds = [row["ended_s"] for row in rows]
    return {
        "rank_losses": len(rows),
        "attempts": sum(row["attempts"] for row in rows),
        "ended_in_time": sum(s <= timeout_s + SLACK_S for s in seconds),
        "named_in_one_line": sum(row["is_named"] for row in rows),
        "ended_s_max": max(seconds),
        **{
            f"ended_s_{kind.replace(' ', '_')}": spread(of_kind)
            for kind in KINDS
            if (of_kind := [row["ended_s"] for row in rows if row["kind"] == kind])
        },
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Seconds until all ranks had ended."""
    return markdown_table(
        ["rank, schedule, moment", "what happened", "ended after, s", "named"],
        [
            [
                f"{row['rank']}, {row['schedule']}, {row['moment']}",
                row["kind"],
                f"{row['ended_s']:.1f}",
                "yes" if row["is_named"] else "no",
            ]
            for row in rows
        ],
    )


def _row(case: Case, outcome: Outcome) -> dict[str, Any]:
    row = case._asdict() | outcome._asdict()
    row["ended_s"] = round(outcome.ended_s, 2)
    del row["said"]
    if not outcome.is_named:
        row["said"] = outcome.said
    return row


def _words(case: Case, own: Path, data: Path, timeout_s: float) -> list[str]:
    limits = {"timeout_s": timeout_s, "start_timeout_s": _START_TIMEOUT_S}
    is_pipeline = case.schedule not in STRATEGIES
    name = "PipelineStrategy" if is_pipeline else case.schedule
    parts = {"schedule": case.schedule, "num_microbatches": 4} if is_pipeline else {}
    strategy = {
        "class_path": f"fingpt_lightning.strategies.{name}",
        "init_args": parts | limits,
    }
    incident = {
        "class_path": "benchmarks.lost_rank.Incident",
        "init_args": {"folder": str(own), "rank": case.rank, "moment": case.moment},
    }
    trainer = {
        "accelerator": "cpu", "devices": 1, "num_nodes": _NUM_RANKS, "max_steps": 4,
        "max_epochs": -1, "val_check_interval": 2, "check_val_every_n_epoch": None,
        "limit_val_batches": 2, "num_sanity_val_steps": 0, "logger": False,
        "strategy": strategy, "callbacks": [incident],
        "default_root_dir": str(own / "run"), "inference_mode": is_pipeline,
        "accumulate_grad_batches": 1 if is_pipeline else 4,
    }  # fmt: skip
    config = own / "config.yaml"
    config.write_text(json.dumps({"trainer": trainer}))
    blocks = [f"--{part}={_ROOT / 'configs' / part / 'debug.yaml'}" for part in ("data", "model")]
    return [
        "fit", "--config", str(config), *blocks, "--model.num_layers", "4",
        "--data.cache_dir", str(data), "--last_checkpoint.every_n_train_steps", "3",
    ]  # fmt: skip


class _Hosts(NamedTuple):
    """Network namespaces on one wire."""

    namespaces: tuple[str, str]
    addresses: tuple[str, str]
    wire: str

    def cut(self) -> None:
        """Drops all packets from one to the other from now on; both links stay up."""
        _ip("-n", self.wire, "link", "set", "port1", "nomaster")


@contextlib.contextmanager
def _hosts() -> Iterator[_Hosts]:
    name = f"fingpt-{os.getpid()}-{threading.get_ident() % 10**6}"
    namespaces = (f"{name}-0", f"{name}-1")
    addresses = ("10.77.0.1", "10.77.0.2")
    wire = f"{name}-wire"
    try:
        for namespace in (wire, *namespaces):
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", wire, "link", "add", "bridge", "type", "bridge")
        _ip("-n", wire, "link", "set", "bridge", "up")
        for index, (namespace, address) in enumerate(zip(namespaces, addresses, strict=True)):
            port = f"port{index}"
            ends = ("eth0", "type", "veth", "peer", "name", port, "netns", wire)
            _ip("-n", namespace, "link", "add", *ends)
            _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
            _ip("-n", wire, "link", "set", port, "master", "bridge", "up")
        yield _Hosts(namespaces, addresses, wire)
    finally:
        for namespace in (*namespaces, wire):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _free_port() -> int:
    """A port below those that the system gives to connections before the rank can take it."""
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("", port))
            return port


def _await(marker: Path, ranks: Sequence[Any], own: Path) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while not marker.exists():
        if time.monotonic() > deadline_s or any(r.exitcode is not None for r in ranks):
            text = "\n".join(path.read_text() for path in sorted(own.glob("rank?")))
            raise NotBegunError(f"the ranks did not come to the moment of the loss:\n{text}")
        time.sleep(POLL_S)


def _reap(process: Any) -> None:
    process.kill()
    process.join()


def _said(path: Path) -> str:
    """The last output of a rank, from where it mentions an error."""
    text = path.read_text(errors="replace")
    start = text.find("fingpt: error")
    return text[start:].strip() if start >= 0 else text[-500:].strip()


if __name__ == "__main__":
    main()
