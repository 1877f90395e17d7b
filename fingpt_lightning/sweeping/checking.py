"""Checks a sweep against the command line before anything of it runs."""

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from rich.table import Table

from fingpt_lightning.files import write_json
from fingpt_lightning.metric_keys import LOGGED_BY, TASK, split_keys
from fingpt_lightning.sweeping.space import Point, sample_points, short_names, shown
from fingpt_lightning.sweeping.sweep_file import Sweep, WrongSweep
from fingpt_lightning.terminal.command_line import as_list
from fingpt_lightning.terminal.messages import nearest

_OUR_PACKAGES = ("fingpt_lightning", "callbacks")
_MAX_SHOWN_TRIALS = 60


class Built(NamedTuple):
    """A run as the command line would build it.

    Attributes:
        settings: Resolved config, in plain types.
        observers: Classes of its module and its callbacks, whose names determine their keys.
    """

    settings: Mapping[str, Any]
    observers: Sequence[type]


Build: TypeAlias = Callable[[list[str]], Built]
"""Parses and builds ``fit`` and its options without running it; a ValueError names a mistake."""


def check_sweep(
    sweep: Sweep, build: Build, count: int | None = None, extra: Sequence[str] = ()
) -> Built:
    """Builds each trial of a grid; of a space each value, both ends and the middle.

    Args:
        sweep: Sweep to check.
        build: Function that builds a run from the words of a command line.
        count: Number of trials of the grid that will run; None is all.
        extra: Words that follow those of the sweep's command.

    Returns:
        The first trial.

    Raises:
        WrongSweep: A name or a value is wrong, or no class logs the metric.
    """
    points = sweep.grid()[:count] if sweep.method == "grid" else sample_points(sweep.parameters)
    first: Built | None = None
    with tempfile.TemporaryDirectory() as folder:
        arguments = Path(folder) / "arguments.json"
        for point in points:
            write_json(arguments, sweep.arguments(point))
            try:
                built = build([*sweep.fit_words(arguments), *extra])
            except ValueError as error:
                raise WrongSweep(_explained(sweep, point, str(error), arguments)) from error
            if first is None:
                first = built
                _check_metric(sweep, built)
    assert first is not None
    return first


def described(sweep: Sweep, count: int | None = None) -> Table:
    """The trials of a grid, or the space of other methods.

    Args:
        sweep: Sweep to describe.
        count: Number of trials of the grid that will run; None is all.
    """
    table = Table(box=None, pad_edge=False)
    names = short_names(sweep.searched)
    if sweep.method != "grid":
        table.add_column("parameter")
        table.add_column("values")
        for name in sweep.searched:
            table.add_row(names[name], str(sweep.parameters[name]))
        return table
    table.add_column("trial", justify="right")
    for name in sweep.searched:
        table.add_column(names[name], justify="right")
    points = sweep.grid()[:count]
    for number, point in enumerate(points[:_MAX_SHOWN_TRIALS]):
        table.add_row(str(number), *(shown(point[name]) for name in sweep.searched))
    if len(points) > _MAX_SHOWN_TRIALS:
        table.add_row("...", *("..." for _ in sweep.searched))
    return table


def documented_keys(built: Built) -> set[str] | None:
    """The keys that the module and the callbacks of a run log; None where one is not known.

    Args:
        built: Run as the command line builds it.
    """
    found: set[str] = set()
    for observer in built.observers:
        for kind in observer.__mro__:
            if kind.__module__.partition(".")[0] in _OUR_PACKAGES:
                found |= set(LOGGED_BY.get(kind.__name__, ()))
        if observer.__module__.partition(".")[0] not in (*_OUR_PACKAGES, "lightning"):
            return None
    tasks = list(_tasks(built.settings))
    return {
        key.replace(TASK, task)
        for key in found - set(split_keys("test"))
        for task in (tasks if TASK in key else [""])
    }


def _check_metric(sweep: Sweep, built: Built) -> None:
    known = documented_keys(built)
    if known is not None and sweep.metric not in known:
        raise WrongSweep(
            f"{sweep.path}: metric {sweep.metric!r} is logged by no module or callback of this"
            f" run{nearest(sweep.metric, sorted(known)) or '; docs/metrics.md lists them'}"
        )


def _tasks(settings: Mapping[str, Any]) -> Iterator[str]:
    """The tasks that a run evaluates: those of a callback, else those of the data."""
    data = (settings.get("data") or {}).get("init_args") or {}
    for callback in as_list((settings.get("trainer") or {}).get("callbacks")):
        given = (callback.get("init_args") or {}).get("tasks") or data.get("tasks") or []
        for task in given.split(",") if isinstance(given, str) else given:
            yield Path(task.strip()).stem


def _explained(sweep: Sweep, point: Point, message: str, arguments: Path) -> str:
    names = short_names(sweep.searched)
    trial = ", ".join(f"{names[name]} {shown(point[name])}" for name in sweep.searched)
    where = f" (with {trial})" if trial else ""
    # A line of a config that the sweep only builds on is not where the mistake is.
    text = re.sub(r" \(\S+ line \d+\)", "", message).replace(str(arguments), "parameters")
    return f"{sweep.path}: {text}{where}"
