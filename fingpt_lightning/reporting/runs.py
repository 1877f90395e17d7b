"""A run, a sweep or an evaluation, read from the folder that it left."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fingpt_lightning.metric_keys import (
    THROUGHPUT_TRAINING_TIME_S,
    TRAIN_BYTES,
    TRAIN_LOSS,
    TRAIN_TOKENS,
)
from fingpt_lightning.pipeline import Pass, Work
from fingpt_lightning.reporting.answers import (
    StoredResult,
    task_results_of_evaluation,
    task_results_of_run,
)
from fingpt_lightning.reporting.environment import ENVIRONMENT
from fingpt_lightning.reporting.files import Row, read_config, read_metrics, read_object
from fingpt_lightning.terminal.inputs import refuse_missing_run
from fingpt_lightning.terminal.messages import check_choice
from fingpt_lightning.terminal.shapes import check_shape

_RUN_FILES = ("config.yaml", "metrics.csv", "summary.json")
_FINISHED = "finished"
_KNOWN_FILES = (*_RUN_FILES, "sweep.json", "results.json")
_TRIAL = {
    "number": float,
    "state": str,
    "value?": float | None,
    "parameters": dict,
    "run_folder?": str | None,
    "error?": str | None,
    "seconds?": float | None,
}
_SWEEP = {
    "name": str,
    "method": str,
    "metric": {"name": str, "goal": str},
    "trials": [_TRIAL],
}
_TRACE = {
    "traceEvents?": [
        {
            "ts": float,
            "dur": float,
            "tid": float,
            "cat": str,
            "args": {"stage": float, "microbatch": float},
        }
    ]
}
_SUMMARY = {"timed_tokens_per_s?": float, "dense_baseline_tokens_per_s?": float}
_ENVIRONMENT = {"git?": dict | None, "versions?": dict, "machine?": dict}


class RecordedStep(NamedTuple):
    """A training step of a pipeline, pass by pass."""

    step: int
    passes: tuple[Pass, ...]


class Run(NamedTuple):
    """What ``fingpt fit`` left; a part that is missing is empty."""

    name: str
    folder: Path
    settings: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    rows: tuple[Row, ...]
    task_results: tuple[StoredResult, ...]
    steps: tuple[RecordedStep, ...]
    error: str | None = None
    tokenizer: str | None = None

    @property
    def is_finished(self) -> bool:
        """Whether it finished and wrote its summary."""
        return bool(self.summary)

    @property
    def num_steps(self) -> int:
        """Optimizer steps: of a finished run all, else those that were logged."""
        if isinstance(of_all := self.summary.get("steps"), int):
            return of_all
        trained = [row["step"] for row in self.rows if TRAIN_LOSS in row]
        return int(max(trained)) + 1 if trained else 0

    def values(self, key: str) -> list[float]:
        """The logged values of a key, in order, without those that are not finite numbers."""
        found = [row[key] for row in self.rows if key in row]
        return [value for value in found if math.isfinite(value)]

    def curve(self, key: str, axis: str) -> list[tuple[float, float]]:
        """A key's values over another's, which keeps its value until it is logged again.

        Values that are not finite numbers are left out, and those before the axis is known.
        """
        points, place = [], None
        for row in self.rows:
            place = row.get(axis, place)
            value = row.get(key)
            if place is not None and value is not None and math.isfinite(value):
                points.append((place, value))
        return points

    def bytes_per_token(self) -> float | None:
        """Bytes of text that a training token stands for; None where they were not logged."""
        for row in reversed(self.rows):
            if row.get(TRAIN_TOKENS) and TRAIN_BYTES in row:
                return row[TRAIN_BYTES] / row[TRAIN_TOKENS]
        return None

    def diverged_at(self) -> int | None:
        """The first step whose loss is not a finite number; None where all are."""
        losses = (row for row in self.rows if not math.isfinite(row.get(TRAIN_LOSS, 0.0)))
        return next((int(row["step"]) for row in losses), None)


class Trial(NamedTuple):
    """One run of a sweep; ``run`` is None where it left no folder."""

    number: int
    state: str
    value: float | None
    parameters: dict[str, Any]
    error: str | None
    seconds: float | None
    run: Run | None


class Sweep(NamedTuple):
    """What ``fingpt sweep`` left."""

    name: str
    folder: Path
    metric: str
    goal: str
    method: str
    trials: tuple[Trial, ...]

    def ranked(self) -> list[Trial]:
        """The trials that finished with a value, the best first."""
        sign = -1 if self.goal == "maximize" else 1
        known = [
            (sign * t.value, t)
            for t in self.trials
            if t.state == _FINISHED and t.value is not None and math.isfinite(t.value)
        ]
        return [trial for _, trial in sorted(known, key=lambda x: x[0])]


class Evaluation(NamedTuple):
    """What ``fingpt evaluate`` left."""

    name: str
    folder: Path
    head: dict[str, Any]
    task_results: tuple[StoredResult, ...]


def read_folder(folder: Path) -> Run | Sweep | Evaluation:
    """Reads the contents of a folder.

    Raises:
        ValueError: It is none of the three, or a file in it is broken.
        FileNotFoundError: There is no such folder.
    """
    refuse_missing_run(folder)
    if (folder / "sweep.json").exists():
        return _read_sweep(folder)
    if (folder / "results.json").exists():
        results = read_object(folder / "results.json")
        task_results = tuple(task_results_of_evaluation(folder, results))
        head = {key: value for key, value in results.items() if key != "tasks"}
        return Evaluation(folder.resolve().name, folder, head, task_results)
    if _is_run(folder):
        return read_run(folder)
    inner = next((path for path in _folders(folder) if _is_run(path)), None)
    advice = f"; there are runs in it: name one, as {inner}" if inner else ""
    known = ", ".join(_KNOWN_FILES)
    raise ValueError(
        f"{folder} is not a run, sweep or evaluation: it holds none of {known}{advice}"
    )


def read_run(folder: Path, name: str | None = None, error: str | None = None) -> Run:
    """Reads a run folder, of which any file may be missing.

    Args:
        folder: Folder that ``fingpt fit`` left.
        name: Name of the run; None takes the folder's name.
        error: Reason why it ended, where that is known.

    Raises:
        ValueError: A file is broken.
    """
    rows = tuple(_rows(folder))
    return Run(
        name=name or folder.resolve().name,
        folder=folder,
        settings=dict(flattened(read_config(folder / "config.yaml"))),
        environment=_checked(folder / ENVIRONMENT, _ENVIRONMENT),
        summary=_checked(folder / "summary.json", _SUMMARY),
        rows=rows,
        task_results=tuple(task_results_of_run(folder)),
        steps=tuple(_recorded_steps(folder / "pipeline")),
        error=error,
        tokenizer=_digest(folder / "tokenizer" / "tokenizer.json"),
    )


def _checked(path: Path, shape: dict[str, Any]) -> dict[str, Any]:
    found = read_object(path)
    check_shape(found, shape, str(path))
    return found


def _digest(path: Path) -> str | None:
    """A digest of the tokenizer of a run; None where it is not in its folder."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _rows(folder: Path) -> list[Row]:
    """The rows of a run that was stopped and resumed in its folder; repeated steps count once.

    Rows of earlier starts are in ``metrics-1.csv`` and so on, of the last in ``metrics.csv``.
    """
    earlier = sorted(folder.glob("metrics-*.csv"), key=lambda path: (len(path.name), path.name))
    rows: list[Row] = []
    for path in (*earlier, folder / "metrics.csv"):
        new = read_metrics(path)
        if not new:
            continue
        begin = min(row["step"] for row in new)
        rows = [row for row in rows if row["step"] < begin]
        # The time counts from each start.
        key = THROUGHPUT_TRAINING_TIME_S
        before_s = max((row[key] for row in rows if key in row), default=0.0)
        rows += [row | {key: row[key] + before_s} if key in row else row for row in new]
    return rows


def flattened(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted names; lists are values.

    >>> dict(flattened({"model": {"rank": 4, "layers": [1, 2]}}))
    {'model.rank': 4, 'model.layers': [1, 2]}
    """
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differing(runs: Sequence[Run]) -> list[str]:
    """The settings in which runs differ, without those of paths."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    places = ("default_root_dir", "dirpath", "save_dir", "name", "ckpt_path", "runs_dir", "group")
    return [
        name
        for name in names
        if name.rpartition(".")[2] not in places
        and len({json.dumps(run.settings.get(name), default=str) for run in runs}) > 1
    ]


def _read_sweep(folder: Path) -> Sweep:
    path = folder / "sweep.json"
    found = read_object(path)
    check_shape(found, _SWEEP, f"{path} is not a record of a sweep")
    metric = found["metric"]
    return Sweep(
        name=found["name"],
        folder=folder,
        metric=metric["name"],
        goal=metric["goal"],
        method=found["method"],
        trials=tuple(_read_trial(folder, trial) for trial in found["trials"]),
    )


def _read_trial(folder: Path, found: Mapping[str, Any]) -> Trial:
    number, value = int(found["number"]), found.get("value")
    run_folder, error = found.get("run_folder"), found.get("error")
    run = None
    if run_folder is not None and _is_run(folder / run_folder):
        run = read_run(folder / run_folder, f"trial {number}", error)
    return Trial(
        number=number,
        state=found["state"],
        value=None if value is None else float(value),
        parameters=found["parameters"],
        error=error,
        seconds=found.get("seconds"),
        run=run,
    )


def _recorded_steps(folder: Path) -> Iterator[RecordedStep]:
    """The Chrome traces of `callbacks.PipelineTrace`."""
    paths = folder.glob("step_*.json")
    for path in sorted(paths, key=lambda path: (len(path.name), path.name)):
        found, step = read_object(path), path.stem.removeprefix("step_")
        check_shape(found, _TRACE, f"{path} is not a trace of a pipeline")
        if not step.isdecimal():
            raise ValueError(f"{path} is not a trace of a pipeline: {step!r} is not a step")
        events = found.get("traceEvents", ())
        for event in events:
            check_choice(f"{path}: cat", event["cat"], [work.value for work in Work])
        if events:
            yield RecordedStep(int(step), tuple(_pass(event) for event in events))


def _pass(event: Mapping[str, Any]) -> Pass:
    start_s, length_s = event["ts"] / 1e6, event["dur"] / 1e6
    own = event["args"]
    work = Work(event["cat"])
    return Pass(event["tid"], own["stage"], own["microbatch"], work, start_s, start_s + length_s)


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in _RUN_FILES)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
