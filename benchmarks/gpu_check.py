"""Is everything right on this GPU, and how fast is it? Stages in processes of their own.

Each stage has a limit of its own and is over when that or the whole time is; what it has found by
then stays. The record is rewritten after each stage. The exit status is 1 only where numbers are
wrong: a stage that finds no memory, no package or no time says so in the record.

``--device cpu --toy`` runs all stages on tiny networks in a minute.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import gpu_parity, gpu_speed
from benchmarks.record import markdown_table, new_record, write_record
from fingpt_lightning.terminal.messages import nearest

QUESTION = (
    "Does this device compute what the CPU does in float64, does a step ever wait for it, and how"
    " fast is the low-rank network on it beside its dense baseline?"
)
_REPEATABLE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Without it cuBLAS may give another sum each time, and no gradient is equal to the bit."""
_LEAST_S = 5.0
_GRACE_S = 5.0


class Stage(NamedTuple):
    """A part of the check.

    Args:
        run: Function of the device, whether sizes are tiny, and a function that notes what is
            found so far.
        limit_s: Most seconds it may take, some 20 of them to import torch from a cold disk.
        about: What it looks at, for the table.
    """

    run: Callable[[torch.device, bool, Callable[[dict[str, Any]], None]], None]
    limit_s: float
    about: str


STAGES: dict[str, Stage] = {
    "ceilings": Stage(gpu_speed.ceilings, 60, "products and copies of this machine"),
    "parity": Stage(gpu_parity.parity, 90, "numbers beside float64 on the CPU"),
    "training": Stage(gpu_parity.training, 90, "fit, resume, finetuning, scoring, generation"),
    "waits": Stage(gpu_speed.waits, 60, "steps in which the host waits for the device"),
    "medium": Stage(gpu_speed.medium, 120, "GPT-2 medium, dense and low-rank, eager and compiled"),
    "xl": Stage(gpu_speed.xl, 90, "GPT-2 XL, one network after the other"),
    "optimizers": Stage(gpu_speed.optimizers, 60, "a step of each optimizer alone"),
    "profile": Stage(gpu_speed.profile, 60, "where the time of a step goes"),
    "finetuning": Stage(gpu_speed.finetuning, 90, "blocks of Llama-2-7B in NF4 with adapters"),
    "decoding": Stage(gpu_speed.decoding, 60, "tokens per second of GPT-2 small"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the stages and writes record and table.

    Returns:
        1 where numbers are wrong, else 0.
    """
    options = _options(arguments)
    if options.one is not None:
        return _run_here(options)
    end_s = time.monotonic() + options.seconds
    config = {
        "device": options.device, "toy": options.toy, "seconds": options.seconds,
        "stages": options.stages, "seed": gpu_parity.SEED,
    }  # fmt: skip
    record = new_record(QUESTION, config) | {"rows": [], "summary": {}}
    for name in options.stages:
        row = _run_apart(name, options, end_s - time.monotonic())
        record["rows"].append(row)
        record["summary"] = _summary(record["rows"])
        write_record(options.json, record, table(record["rows"]))
        print(f"{name}: {row['state']}, {row['seconds']:.0f} s{_reason(row)}", flush=True)
    print(json.dumps(record["summary"], indent=1))
    return int(bool(record["summary"]["wrong"]))


def _run_here(options: argparse.Namespace) -> int:
    """A stage in this process, its findings in the file ``--json``."""
    torch.manual_seed(gpu_parity.SEED)

    def note(found: dict[str, Any]) -> None:
        options.json.write_text(json.dumps(found), encoding="utf-8")

    STAGES[options.one].run(torch.device(options.device), options.toy, note)
    return 0


def _run_apart(name: str, options: argparse.Namespace, left_s: float) -> dict[str, Any]:
    """A stage in a process of its own, which is ended when its time is over."""
    row: dict[str, Any] = {"stage": name, "state": "skipped", "seconds": 0.0, "found": {}}
    if left_s < _LEAST_S:
        return row | {"reason": f"{options.seconds:g} seconds are over"}
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [
            sys.executable, "-m", "benchmarks.gpu_check", "--one", name, "--json", str(path),
            "--device", options.device, *(["--toy"] if options.toy else []),
        ]  # fmt: skip
        limit_s = min(left_s, STAGES[name].limit_s)
        status, errors = _ended(command, limit_s)
        row["seconds"] = round(time.monotonic() - start_s, 1)
        if path.exists():
            row["found"] = _finite(json.loads(path.read_text(encoding="utf-8")))
    if status is None:
        row |= {"state": "cut", "reason": f"longer than {limit_s:.0f} s"}
    elif status:
        row |= {"state": "failed", "reason": (errors or [f"exit status {status}"])[-1][:300]}
    elif reason := row["found"].pop("skipped", None):
        row |= {"state": "skipped", "reason": reason}
    else:
        row["state"] = "done"
    if wrong := _wrong(row["found"]):
        row |= {"state": "wrong", "reason": f"outside their bounds: {', '.join(wrong)}"}
    return row


def _ended(command: Sequence[str], limit_s: float) -> tuple[int | None, list[str]]:
    """The exit status, None where the limit was reached, and the last lines of errors."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
            env={**os.environ, **_REPEATABLE},
        )
        status: int | None = None
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        errors.seek(0)
        return status, [line for line in errors.read().splitlines() if line.strip()][-3:]


def _finite(found: dict[str, Any]) -> dict[str, Any]:
    """Findings with None for numbers that no record can hold."""
    return {
        key: _finite(value)
        if isinstance(value, dict)
        else None
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in found.items()
    }


def _checks(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The findings that are compared with a bound."""
    return {k: check for k, check in found.items() if isinstance(check, dict) and "bound" in check}


def _wrong(found: dict[str, Any]) -> list[str]:
    """Checks whose error is not within its bound, or is none."""
    return [
        name
        for name, check in _checks(found).items()
        if check["error"] is None or check["error"] > check["bound"]
    ]


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    num_checks = sum(len(_checks(row["found"])) for row in rows)
    ratios = {
        f"{row['stage']}_{key}": value
        for row in rows
        for key, value in row["found"].items()
        if key.endswith("_ratio") or key == "waits" or key.endswith("_gb")
    }
    states = {state: [r["stage"] for r in rows if r["state"] == state] for state in _STATES}
    return {"num_checks": num_checks, **states, **ratios}


_STATES = ("done", "wrong", "failed", "cut", "skipped")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per stage, and the plain figures that it found."""
    lines = [
        [
            row["stage"], STAGES[row["stage"]].about, row["state"] + _reason(row),
            f"{row['seconds']:.0f}", _figures(row["found"]),
        ]
        for row in rows
    ]  # fmt: skip
    return markdown_table(["stage", "what", "state", "s", "found"], lines)


def _figures(found: dict[str, Any]) -> str:
    checks = _checks(found).values()
    parts = [
        f"{key} {value:.4g}"
        for key, value in found.items()
        if isinstance(value, float | int) and not isinstance(value, bool)
    ]
    if checks:
        shares = [c["error"] / c["bound"] for c in checks if c["bound"] and c["error"] is not None]
        worst = f", the worst at {max(shares):.2f} of its bound" if shares else ""
        parts.append(f"{len(checks)} checks{worst}")
    return "; ".join(parts)


def _reason(row: dict[str, Any]) -> str:
    return f" ({row['reason']})" if "reason" in row else ""


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument("--seconds", type=float, default=480.0, help="for all stages together")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), metavar="NAME")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--toy", action="store_true", help="tiny networks")
    parser.add_argument("--one", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in options.stages:
        if name not in STAGES:
            parser.error(f"stage {name!r} is none of {', '.join(STAGES)}{nearest(name, STAGES)}")
    if not options.seconds > 0:
        parser.error(f"--seconds {options.seconds:g} is not above 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --device cpu --toy runs all stages without one")
    return options


if __name__ == "__main__":
    sys.exit(main())
