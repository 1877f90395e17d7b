"""Reads a W&B sweep file for our commands."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fingpt_lightning.metric_keys import VAL_LOSS
from fingpt_lightning.sweeping.space import (
    Distribution,
    Point,
    grid_points,
    nested,
    read_parameters,
)
from fingpt_lightning.terminal.messages import nearest
from fingpt_lightning.terminal.yaml_text import parse_yaml

ARGUMENTS = "${args_json_file}"
"""Placeholder in ``command`` for the file of a trial's arguments."""

_PROGRAM = "fingpt"
METHODS = ("grid", "random", "bayes")
_KEYS = (
    "name", "description", "project", "entity", "program", "method", "metric", "parameters",
    "command", "early_terminate", "run_cap",
)  # fmt: skip
_METRIC_KEYS = ("name", "goal", "target", "impute", "impute_while_running")
_STOPPING_KEYS = ("type", "min_iter", "max_iter", "s", "eta", "strict")
_DEFAULT_METHODS = ("grid", "random")
"""Search methods that W&B runs without a metric."""


class WrongSweep(ValueError):
    """A sweep file that cannot be run as it is."""


class Stopping(NamedTuple):
    """When hyperband checks a trial, in number of logged values of the metric.

    Attributes:
        first: Number of logged values at the first check.
        factor: Factor from one check to the next.
        last: Number of logged values of a whole trial; None takes that of the first that ends.
    """

    first: int
    factor: int
    last: int | None


class Metric(NamedTuple):
    """The metric by which trials are compared.

    Attributes:
        name: Logged key.
        is_maximized: Whether more of it is better.
        target: Value at which no further trial is started; None where there is none.
        is_default: Whether the file names no metric.
    """

    name: str
    is_maximized: bool = False
    target: float | None = None
    is_default: bool = False

    def is_reached(self, value: float) -> bool:
        """Whether a value is at the target or beyond it."""
        if self.target is None:
            return False
        return value >= self.target if self.is_maximized else value <= self.target


class Sweep(NamedTuple):
    """The contents of a sweep file.

    Attributes:
        path: Path of the file.
        content: Whole content, for a W&B server.
        method: Search method: ``grid``, ``random`` or ``bayes``.
        compared_by: Metric by which trials are compared.
        parameters: Parameters by name with dots.
        command: Words of the command, with `ARGUMENTS` among them.
        num_trials: Number of trials of a grid, or ``run_cap``; None where neither gives it.
        stopping: Early stopping; None where no trial is stopped early.
        server_only: Keys that W&B's server honors and a local search does not.
    """

    path: Path
    content: dict[str, Any]
    method: str
    compared_by: Metric
    parameters: dict[str, Distribution]
    command: tuple[str, ...]
    num_trials: int | None
    stopping: Stopping | None
    server_only: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name in the file."""
        return self.path.stem

    @property
    def metric(self) -> str:
        """The logged key that trials are compared by."""
        return self.compared_by.name

    @property
    def is_maximized(self) -> bool:
        """Whether more of the metric is better."""
        return self.compared_by.is_maximized

    def check_local(self) -> None:
        """Checks that a local search supports all settings of the file.

        Raises:
            WrongSweep: It has a setting that only W&B's server honors.
        """
        if self.server_only:
            raise WrongSweep(
                f"{self.path}: {self.server_only[0]} is honored by W&B's server alone; remove it"
                " or run with --server"
            )

    @property
    def searched(self) -> list[str]:
        """The parameters that differ from trial to trial."""
        return [name for name, found in self.parameters.items() if not found.is_constant]

    def grid(self) -> list[Point]:
        """Every trial of a grid, in order."""
        return grid_points(self.parameters)

    def arguments(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The config of a trial."""
        return nested(point, list(self.parameters))

    def fit_words(self, arguments: Path) -> list[str]:
        """The words of ``fingpt fit`` and after it, as the command line has them."""
        start = self.command.index("fit")
        return [str(arguments) if word == ARGUMENTS else word for word in self.command[start:]]


def read_sweep(path: Path) -> Sweep:
    """Reads a sweep file.

    Args:
        path: YAML file in W&B's format.

    Raises:
        WrongSweep: Something in it is wrong, or not supported; the message names file and key.
        FileNotFoundError: There is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such sweep file")
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), path)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise WrongSweep(f"{path} line {line} is not YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise WrongSweep(f"{path} is not text") from error
    except ValueError as error:
        raise WrongSweep(str(error)) from error
    try:
        return _read(path, content)
    except ValueError as error:
        raise WrongSweep(f"{path}: {error}") from error


def _read(path: Path, content: Any) -> Sweep:
    if not isinstance(content, dict) or "parameters" not in content:
        raise ValueError("no sweep file: it has no parameters")
    if unknown := [key for key in content if key not in _KEYS]:
        raise ValueError(f"no setting {unknown[0]!r}{nearest(str(unknown[0]), _KEYS)}")
    method = content.get("method")
    if method not in METHODS:
        given = nearest(str(method), METHODS)
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}{given}")
    stopping = _stopping(content.get("early_terminate"))
    metric = _metric(content.get("metric"), method in _DEFAULT_METHODS and stopping is None)
    parameters = read_parameters(content["parameters"])
    num_trials = content.get("run_cap")
    if num_trials is not None and not _is_whole(num_trials, 1):
        raise ValueError(f"run_cap {num_trials!r} is not a whole number from 1 on")
    if method == "grid":
        size = len(grid_points(parameters))
        num_trials = size if num_trials is None else min(num_trials, size)
    return Sweep(
        path=path,
        content=content,
        method=method,
        compared_by=metric,
        parameters=parameters,
        command=_command(content.get("command")),
        num_trials=num_trials,
        stopping=stopping,
        server_only=tuple(_server_only(content)),
    )


def _metric(given: Any, may_be_left_out: bool) -> Metric:
    if given is None and may_be_left_out:
        return Metric(VAL_LOSS, is_default=True)
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise ValueError(f"metric needs a name, such as {{name: {VAL_LOSS}, goal: minimize}}")
    _check_keys("metric", given, _METRIC_KEYS)
    goal = given.get("goal", "minimize")
    if goal not in ("minimize", "maximize"):
        raise ValueError(f"metric.goal {goal!r} is neither minimize nor maximize")
    target = given.get("target")
    is_number = isinstance(target, int | float) and not isinstance(target, bool)
    if target is not None and not (is_number and math.isfinite(target)):
        raise ValueError(f"metric.target {target!r} is not a finite number; write it as 0.001")
    return Metric(given["name"], goal == "maximize", target)


def _server_only(content: Mapping[str, Any]) -> Iterator[str]:
    """The keys that are set, and that only W&B's server honors."""
    places = (("metric", ("impute", "impute_while_running")), ("early_terminate", ("strict",)))
    for place, keys in places:
        given = content.get(place) or {}
        yield from (f"{place}.{key}" for key in keys if given.get(key) not in (None, False))


def _check_keys(place: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    if unknown := [key for key in given if key not in known]:
        key = str(unknown[0])
        raise ValueError(f"{place} has no setting {key!r}{nearest(key, known)}")


def _is_whole(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _command(given: Any) -> tuple[str, ...]:
    words = [str(word) for word in given] if isinstance(given, Sequence) else []
    example = "[${env}, ${interpreter}, -m, fingpt_lightning, fit, --config, FILE, --config,"
    if "fit" not in words or not any(_PROGRAM in word for word in words):
        raise ValueError(f"command runs no fingpt fit; write {example} {ARGUMENTS}]")
    if ARGUMENTS not in words:
        raise ValueError(f"command has no {ARGUMENTS}; write {example} {ARGUMENTS}]")
    known = ("${env}", "${interpreter}", ARGUMENTS)
    if other := [word for word in words if word.startswith("${") and word not in known]:
        raise ValueError(f"command: {other[0]} is none of {', '.join(known)}")
    return tuple(words)


def _stopping(given: Any) -> Stopping | None:
    if given is None:
        return None
    if not isinstance(given, Mapping) or given.get("type") != "hyperband":
        raise ValueError("early_terminate.type is not hyperband, the one that there is")
    _check_keys("early_terminate", given, _STOPPING_KEYS)
    factor = given.get("eta", 3)
    least = {"min_iter": 1, "max_iter": 1, "s": 1, "eta": 2}
    for key, minimum in least.items():
        value = given.get(key, minimum)
        if not _is_whole(value, minimum):
            raise ValueError(
                f"early_terminate.{key} {value!r} is not a whole number from {minimum}"
            )
    if "min_iter" in given:
        if beside := [key for key in ("max_iter", "s") if key in given]:
            raise ValueError(
                f"early_terminate has {beside[0]} beside min_iter: give min_iter, or max_iter and s"
            )
        return Stopping(given["min_iter"], factor, None)
    if "max_iter" not in given or "s" not in given:
        raise ValueError("early_terminate needs min_iter, or max_iter and s")
    first = max(1, given["max_iter"] // factor ** given["s"])
    return Stopping(first, factor, given["max_iter"])
