"""Runs one trial in a process of its own, and reads what it logged."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from fingpt_lightning.metric_keys import summary_figure
from fingpt_lightning.sweeping.sweep_file import ARGUMENTS

OUTPUT = "output.txt"
ARGUMENTS_FILE = "arguments.json"
_POLL_S = 0.5
_GRACE_S = 60.0
"""Seconds that a trial may take to end when requested: a step, and W&B's last records."""

# Ends with the process that started it, even if that one was killed.
_GUARD = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execvp(sys.argv[1], sys.argv[1:])"
)


class TrialState(StrEnum):
    """The outcome of a trial."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    PRUNED = "pruned"


class Outcome(NamedTuple):
    """How a trial ended.

    Attributes:
        state: Outcome; never ``running``.
        value: Last value of the metric; None where the trial failed.
        error: One line, for a trial that failed.
        seconds: Seconds from start to end.
    """

    state: TrialState
    value: float | None
    error: str | None
    seconds: float


def run_trial(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    metric: str,
    should_stop: Callable[[list[float]], bool] | None = None,
    inherited: Sequence[int] = (),
    on_poll: Callable[[], None] | None = None,
) -> Outcome:
    """Runs a trial to its end; an interruption ends it too.

    Args:
        command: Words of its command.
        folder: Run folder, which exists.
        environment: Whole environment of the process.
        metric: Logged key of its value.
        should_stop: Function that gets all values so far whenever there is a new one, and returns
            whether the trial is not worth continuing.
        inherited: Open files that it keeps open.
        on_poll: Function that is called twice a second; what it raises ends the trial.

    Raises:
        KeyboardInterrupt: It was interrupted; its process has ended.
    """
    started_s = time.monotonic()
    words = list(command)
    if sys.platform == "linux":
        words = [sys.executable, "-S", "-c", _GUARD, *words]
    with (folder / OUTPUT).open("wb") as output:
        process = subprocess.Popen(
            words,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A terminal interrupts this process alone, which then ends the trial.
            start_new_session=True,
            pass_fds=inherited,
        )
        try:
            is_pruned = _wait(process, folder, metric, should_stop, on_poll)
        finally:
            _end(process)
    seconds = time.monotonic() - started_s
    values = metric_history(folder, metric)
    value = values[-1] if values else None
    if is_pruned:
        return Outcome(TrialState.PRUNED, value, None, seconds)
    error = _error(process.returncode, folder, metric, value)
    if error is not None:
        return Outcome(TrialState.FAILED, None, error, seconds)
    return Outcome(TrialState.FINISHED, value, None, seconds)


def trial_command(words: Sequence[str], arguments: Path, extra: Sequence[str]) -> list[str]:
    """A sweep file's ``command`` with its names replaced.

    Args:
        words: Words of ``command`` in the file.
        arguments: File of the trial's arguments.
        extra: Options after the command.
    """
    values = {"${interpreter}": sys.executable, ARGUMENTS: str(arguments)}
    return [*(values.get(word, word) for word in words if word != "${env}"), *extra]


def metric_history(folder: Path, metric: str) -> list[float]:
    """All values of a key in ``metrics.csv`` of a run, or the one in ``summary.json``.

    Args:
        folder: Folder of the run; its files may still be written.
        metric: Logged key.
    """
    path = folder / "metrics.csv"
    found = []
    if path.is_file():
        whole_lines, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
        for row in csv.DictReader(whole_lines.splitlines()):
            cell = row.get(metric)
            if cell:
                found.append(float(cell))
    if not found and (figure := summary_figure(metric)) is not None:
        path = folder / "summary.json"
        figures = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        value = figures.get(figure)
        found = [float(value)] if isinstance(value, int | float) else []
    return found


def _wait(
    process: subprocess.Popen[bytes],
    folder: Path,
    metric: str,
    should_stop: Callable[[list[float]], bool] | None,
    on_poll: Callable[[], None] | None,
) -> bool:
    """Whether the trial was stopped because it was not worth finishing."""
    num_seen = 0
    while True:
        try:
            process.wait(_POLL_S)
            return False
        except subprocess.TimeoutExpired:
            values = metric_history(folder, metric) if should_stop else []
        if on_poll is not None:
            on_poll()
        if should_stop and len(values) > num_seen:
            num_seen = len(values)
            if should_stop(values):
                return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that still runs, and all that it started."""
    if process.poll() is None:
        process.terminate()  # Lightning passes it on to its other ranks
        try:
            process.wait(_GRACE_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _error(status: int, folder: Path, metric: str, value: float | None) -> str | None:
    if status:
        return _last_words(folder / OUTPUT) or f"ended with status {status}"
    if value is None:
        return f"{metric} was not logged"
    return None if math.isfinite(value) else f"{metric} is {value}"


def _last_words(output: Path) -> str | None:
    """The first line with an error of our program, else the last line of all."""
    text = output.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines()]
    for line in lines:
        if line.startswith("fingpt: error"):
            return line.partition("error")[2].removeprefix(":").strip()
    return next((line for line in reversed(lines) if line), None)
