"""How long does a sweep without a server take, and does a killed one repeat finished trials?

Runs ``fingpt sweep`` twice: undisturbed, and killed in its third trial by each signal in turn and
resumed each time.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.record import markdown_table, new_record, write_record

QUESTION = (
    "How long does `fingpt sweep --local` take on this machine, and which finished trials does it"
    " run again after it was killed in its third trial?"
)
PROGRAM = [sys.executable, "-m", "fingpt_lightning", "sweep"]
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
KILLED_TRIAL = 2
"""Numbers start at 0."""
_POLL_S = 0.05
_TIMEOUT_S = 1200.0
_ENDS_WITH = ("best.yaml", "report.html")


class Ended(NamedTuple):
    """A sweep that has finished.

    Attributes:
        seconds: Seconds from its first start to its last end; of a killed one with its waits.
        trials: Trials as in ``sweep.json``.
        stamps: Time when the first file of each trial was written, by its number.
    """

    seconds: float
    trials: list[dict[str, Any]]
    stamps: dict[int, int]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs both sweeps and writes record and table.

    Args:
        arguments: Options; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument("--sweep", type=Path, default=Path("sweeps/quick_rank.yaml"))
    parser.add_argument("--count", type=int, default=4, help="trials; three at least")
    parser.add_argument("--output", type=Path, default=Path("runs/sweeps/benchmark"))
    options = parser.parse_args(arguments)
    if options.count <= KILLED_TRIAL:
        parser.error(f"--count {options.count} is below {KILLED_TRIAL + 1}")
    record = new_record(
        QUESTION,
        {
            "sweep": str(options.sweep),
            "count": options.count,
            "killed_in_trial": KILLED_TRIAL + 1,
            "signals": [signum.name for signum in SIGNALS],
        },
    )
    begin = [*PROGRAM, str(options.sweep), "--local", "--count", str(options.count)]
    whole = undisturbed(begin, options.output / "whole")
    killed, repeated = killed_and_resumed(begin, options.output / "killed")
    ended = {"undisturbed": whole, "killed twice, resumed": killed}
    record["rows"] = [
        {
            "contender": name,
            "repeats": 1,
            "seconds": round(sweep.seconds, 1),
            "trial_seconds": [trial["seconds"] for trial in sweep.trials],
            "values": [trial["value"] for trial in sweep.trials],
        }
        for name, sweep in ended.items()
    ]
    record["summary"] = {
        "sweep_seconds": round(whole.seconds, 1),
        "finished_trials": _num_finished(whole),
        "finished_trials_after_kill": _num_finished(killed),
        "repeated_trials_after_kill": repeated,
        "largest_value_difference": max(
            abs(one["value"] - other["value"])
            for one, other in zip(whole.trials, killed.trials, strict=True)
        ),
    }
    write_record(options.json, record, table(ended))
    print(json.dumps(record["summary"], indent=1))


def undisturbed(begin: Sequence[str], folder: Path) -> Ended:
    """Runs a sweep to its end.

    Args:
        begin: Command, up to where the folder is named.
        folder: Folder that is made.

    Raises:
        RuntimeError: It failed, or left no best config or report.
    """
    started_s = time.monotonic()
    _finish([*begin, "--output", str(folder)], folder)
    return _ended(folder, started_s)


def killed_and_resumed(begin: Sequence[str], folder: Path) -> tuple[Ended, int]:
    """Kills a sweep in its third trial by each signal, and resumes it after each.

    Args:
        begin: Command, up to where the folder is named.
        folder: Folder that is made.

    Returns:
        Sweep, and how often a trial that had ended was started again.

    Raises:
        RuntimeError: It failed, or left no best config or report.
    """
    started_s = time.monotonic()
    resume = [*PROGRAM, "--resume", str(folder)]
    command = [*begin, "--output", str(folder)]
    known: dict[int, int] = {}
    repeated = 0
    for signum in SIGNALS:
        _kill_in_trial(command, folder, signum, known.get(KILLED_TRIAL))
        now = _stamps(folder)
        repeated += _num_repeated(known, now)
        known = now
        command = resume
    _finish(resume, folder)
    ended = _ended(folder, started_s)
    return ended, repeated + _num_repeated(known, ended.stamps)


def table(ended: dict[str, Ended]) -> str:
    """A row per sweep."""
    longest = max(len(sweep.trials) for sweep in ended.values())
    header = ["", "s in all", *(f"trial {number + 1} (s)" for number in range(longest))]
    rows = [
        [name, f"{sweep.seconds:.0f}", *(f"{trial['seconds']:.0f}" for trial in sweep.trials)]
        for name, sweep in ended.items()
    ]
    return markdown_table(header, rows)


def _finish(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {done.stdout}{done.stderr}")
    for name in _ENDS_WITH:
        if not (folder / name).is_file():
            raise RuntimeError(f"{folder} has no {name}: {done.stdout}")


def _kill_in_trial(
    command: Sequence[str], folder: Path, signum: signal.Signals, stamp: int | None
) -> None:
    """Starts a sweep and ends it when its third trial has logged something.

    Args:
        command: Command that starts it.
        folder: Folder of the sweep.
        signum: Number of the signal.
        stamp: Time of that trial's last start, which is over; None for none.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + _TIMEOUT_S
    figures = folder / "trials" / f"{KILLED_TRIAL:03d}" / "metrics.csv"
    try:
        while not figures.is_file() or _stamps(folder).get(KILLED_TRIAL) == stamp:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"{shlex.join(command)}: trial {KILLED_TRIAL} did not begin")
            time.sleep(_POLL_S)
        os.kill(process.pid, signum)
        process.wait(_TIMEOUT_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _ended(folder: Path, started_s: float) -> Ended:
    seconds = time.monotonic() - started_s
    trials = json.loads((folder / "sweep.json").read_text())["trials"]
    return Ended(seconds, trials, _stamps(folder))


def _stamps(folder: Path) -> dict[int, int]:
    # Written once, before the trial starts.
    files = folder.glob("trials/*/arguments.json")
    return {int(path.parent.name): path.stat().st_mtime_ns for path in files}


def _num_repeated(before: dict[int, int], after: dict[int, int]) -> int:
    """How many of the trials that had ended, those before the killed one, ran again."""
    return sum(before[number] != after.get(number) for number in before if number < KILLED_TRIAL)


def _num_finished(sweep: Ended) -> int:
    return sum(trial["state"] == "finished" for trial in sweep.trials)


if __name__ == "__main__":
    main()
