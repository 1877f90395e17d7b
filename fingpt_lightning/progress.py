"""What a terminal or a log sees of work on many rows."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from fingpt_lightning.units import format_duration

_QUIET_S = 2.0


@contextmanager
def shown_progress(
    what: str, total: int | None, unit: str, in_log: bool = True
) -> Iterator[Callable[[int], None]]:
    """Shows work that takes longer than two seconds on stderr.

    A terminal sees a line that moves; anything else one line at the start and one at the end.

    Args:
        what: Is done, as in "labelling news.csv".
        total: Units of work; None where they are not known before.
        unit: What is counted.
        in_log: Whether there are lines at the start and at the end too.

    Yields:
        What is to be called with the units that are done.
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    count = MofNCompleteColumn() if total is not None else TextColumn("{task.completed:,.0f}")
    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False)]
    columns += [count, TextColumn(unit)]
    columns += [BarColumn(20), TimeRemainingColumn()] if total is not None else []
    display = Progress(*columns, console=console, transient=True)
    task = display.add_task(what, total=total)
    started_s, is_shown, done = time.monotonic(), False, 0

    def show(now: int) -> None:
        nonlocal done, is_shown
        done = now
        if not is_shown and time.monotonic() - started_s >= _QUIET_S:
            is_shown = True
            if console.is_terminal:
                display.start()
            elif in_log:
                console.print(what, markup=False)
        display.update(task, completed=now)

    try:
        yield show
    finally:
        if display.live.is_started:
            display.stop()
    if is_shown and in_log:
        time_s = time.monotonic() - started_s
        rate = f"{done / time_s:.3g} a second"
        console.print(f"{what}: {done:,} {unit} in {format_duration(time_s)}, {rate}", markup=False)
