"""Reads a W&B sweep file for our commands."""

from collections.abc import Mapping, Sequence
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

ARGUMENTS = "${args_json_file}"
"""Placeholder in ``command`` for the file of a trial's arguments."""

_PROGRAM = "fingpt"
METHODS = ("grid", "random", "bayes")
_KEYS = (
    "name", "description", "project", "entity", "program", "method", "metric", "parameters",
    "command", "early_terminate", "run_cap",
)  # fmt: skip
_STOPPING_KEYS = ("type", "min_iter", "max_iter", "s", "eta", "strict")


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


class Sweep(NamedTuple):
    """The contents of a sweep file.

    Attributes:
        path: Path of the file.
        content: Whole content, for a W&B server.
        method: Search method: ``grid``, ``random`` or ``bayes``.
        metric: Logged key.
        is_maximized: Whether more of it is better.
        parameters: Parameters by name with dots.
        command: Words of the command, with `ARGUMENTS` among them.
        num_trials: Number of trials of a grid, or ``run_cap``; None where neither gives it.
        stopping: Early stopping; None where no trial is stopped early.
    """

    path: Path
    content: dict[str, Any]
    method: str
    metric: str
    is_maximized: bool
    parameters: dict[str, Distribution]
    command: tuple[str, ...]
    num_trials: int | None
    stopping: Stopping | None

    @property
    def name(self) -> str:
        """The name in the file."""
        return self.path.stem

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
        content = yaml.safe_load(path.read_text())
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise WrongSweep(f"{path} line {line} is no YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise WrongSweep(f"{path} is no text") from error
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
    metric, is_maximized = _metric(content.get("metric"))
    parameters = read_parameters(content["parameters"])
    num_trials = content.get("run_cap")
    if num_trials is not None and (not isinstance(num_trials, int) or num_trials < 1):
        raise ValueError(f"run_cap {num_trials!r} is no whole number from 1 on")
    if method == "grid":
        size = len(grid_points(parameters))
        num_trials = size if num_trials is None else min(num_trials, size)
    return Sweep(
        path=path,
        content=content,
        method=method,
        metric=metric,
        is_maximized=is_maximized,
        parameters=parameters,
        command=_command(content.get("command")),
        num_trials=num_trials,
        stopping=_stopping(content.get("early_terminate")),
    )


def _metric(given: Any) -> tuple[str, bool]:
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise ValueError(f"metric needs a name, such as {{name: {VAL_LOSS}, goal: minimize}}")
    goal = given.get("goal", "minimize")
    if goal not in ("minimize", "maximize"):
        raise ValueError(f"metric.goal {goal!r} is neither minimize nor maximize")
    return given["name"], goal == "maximize"


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
    if unknown := [key for key in given if key not in _STOPPING_KEYS]:
        key = str(unknown[0])
        raise ValueError(f"early_terminate has no setting {key!r}{nearest(key, _STOPPING_KEYS)}")
    factor = given.get("eta", 3)
    least = {"min_iter": 1, "max_iter": 1, "s": 1, "eta": 2}
    for key, minimum in least.items():
        value = given.get(key, minimum)
        if not isinstance(value, int) or value < minimum:
            raise ValueError(f"early_terminate.{key} {value!r} is no whole number from {minimum}")
    if "min_iter" in given:
        return Stopping(given["min_iter"], factor, None)
    if "max_iter" not in given or "s" not in given:
        raise ValueError("early_terminate needs min_iter, or max_iter and s")
    first = max(1, given["max_iter"] // factor ** given["s"])
    return Stopping(first, factor, given["max_iter"])
