"""What a terminal or a log shows of long work."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from fingpt_lightning.terminal.messages import process_rank
from fingpt_lightning.units import format_duration

_QUIET_S = 2.0
_LINE_S = 60.0
"""Seconds from one line of long work in a log to the next."""


class SoFar(NamedTuple):
    """How much has been tokenized."""

    num_documents: int = 0
    num_tokens: int = 0
    bytes_read: int = 0

    def text(self, time_s: float) -> str:
        """One line with the rate.

        >>> SoFar(1200, 3_000_000, 14_000_000).text(2.0)
        '1,200 documents, 14 MB, 3.0 M tokens, 1,500 k tokens/s'
        """
        read = f"{self.bytes_read / 1e6:,.0f} MB, " if self.bytes_read else ""
        tokens = f"{self.num_tokens / 1e6:.1f} M tokens"
        rate = f"{self.num_tokens / max(time_s, 1e-9) / 1e3:,.0f} k tokens/s"
        return f"{self.num_documents:,} documents, {read}{tokens}, {rate}"


class _Display:
    """A line of progress that appears once the work has taken longer than two seconds.

    Args:
        what: Description of the line.
        columns: Columns after the description.
        total: Units of work, where they are known.
        unit: Name of what is counted, for lines of a log.
        first: Line for a log when the work turns out to be long, and the beginning of those that
            follow every minute; None writes none.
    """

    def __init__(
        self,
        what: str,
        columns: list[ProgressColumn],
        total: int | None,
        unit: str,
        first: str | None,
    ) -> None:
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._first, self._started_s, self.is_shown = first, time.monotonic(), False
        self._total, self._unit, self._told_s = total, unit, 0.0
        self._begun: tuple[float, int] | None = None
        text: list[ProgressColumn] = [TextColumn("{task.description}", markup=False)]
        self._bar = Progress(*text, *columns, console=self.console, transient=True)
        self._task = self._bar.add_task(what, total=total, text="")

    @property
    def time_s(self) -> float:
        return time.monotonic() - self._started_s

    def update(self, completed: int, text: Callable[[], str]) -> None:
        if self._begun is None:
            self._begun = self.time_s, completed  # resumed work begins in the middle
        is_log = not self.console.is_terminal and self._first is not None
        if not self.is_shown and self.time_s >= _QUIET_S:
            self.is_shown = True
            if self.console.is_terminal:
                self._bar.start()
            elif self._first is not None:
                self._told_s = self.time_s
                self.print(self._first)
        if self.is_shown:
            self._bar.update(self._task, completed=completed, text=text())
        if is_log and self.is_shown and self.time_s - self._told_s >= _LINE_S:
            self._told_s = self.time_s
            self.print(f"{self._first}: {text() or self._counted(completed)}")

    def _counted(self, completed: int) -> str:
        if self._total is None:
            return f"{completed:,} {self._unit}"
        counted = f"{completed:,} of {self._total:,} {self._unit}"
        assert self._begun is not None
        begun_s, before = self._begun
        if completed <= before:
            return counted
        left_s = (self.time_s - begun_s) / (completed - before) * (self._total - completed)
        return f"{counted}, about {format_duration(left_s)} left"

    def stop(self) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def print(self, line: str) -> None:
        self.console.print(line, markup=False)


@contextmanager
def shown_progress(
    what: str, total: int | None, unit: str, in_log: bool = True
) -> Iterator[Callable[[int], None]]:
    """Shows work that takes longer than two seconds on stderr.

    A terminal sees a line that moves; anything else one line at the start, one every minute and one
    at the end.

    Args:
        what: Name of the work, as in "labeling news.csv".
        total: Units of work; None where they are not known in advance.
        unit: Name of what is counted.
        in_log: Whether there are lines in a log too.

    Yields:
        Function to be called with the number of units that are done.
    """
    count = MofNCompleteColumn() if total is not None else TextColumn("{task.completed:,.0f}")
    columns: list[ProgressColumn] = [count, TextColumn(unit)]
    columns += [BarColumn(20), TimeRemainingColumn()] if total is not None else []
    display, done = _Display(what, columns, total, unit, what if in_log else None), 0

    def show(now: int) -> None:
        nonlocal done
        done = now
        display.update(now, str)

    try:
        yield show
    finally:
        display.stop()
    if display.is_shown and in_log:
        rate = f"{done / display.time_s:.3g} per second"
        display.print(f"{what}: {done:,} {unit} in {format_duration(display.time_s)}, {rate}")


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Tells on stderr of work that takes longer than two seconds and has no parts to count.

    One line when it turns out to be long, and one at its end with the time; of the first process.

    Args:
        what: Name of the work, as in "quantizing the base".
    """
    if process_rank() != "0":
        yield
        return
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    started_s = time.monotonic()
    timer = threading.Timer(_QUIET_S, lambda: console.print(f"{what} ...", markup=False))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
    time_s = time.monotonic() - started_s
    if time_s >= _QUIET_S:
        console.print(f"{what}: {format_duration(time_s)}", markup=False)


@contextmanager
def shown_tokenizing(what: str, num_bytes: int | None) -> Iterator[Callable[[SoFar], None]]:
    """Shows tokenizing that takes longer than two seconds on stderr.

    A terminal sees a line that moves, with the time that is left where ``num_bytes`` is known;
    anything else one line at the start and one every minute. Both see one at the end.

    Yields:
        Function to be called with the state of the work.
    """
    columns: list[ProgressColumn] = [BarColumn(20), TimeRemainingColumn()] if num_bytes else []
    columns.append(TextColumn("{task.fields[text]}", markup=False))
    display, so_far = _Display(what, columns, num_bytes, "bytes", f"tokenizing {what}"), SoFar()

    def show(now: SoFar) -> None:
        nonlocal so_far
        so_far = now
        display.update(now.bytes_read, lambda: now.text(display.time_s))

    try:
        yield show
    finally:
        display.stop()
    if display.is_shown:
        time_s = display.time_s
        display.print(f"tokenized {what}: {so_far.text(time_s)}, {time_s:.0f} s")
