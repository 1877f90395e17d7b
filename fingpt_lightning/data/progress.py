"""What a terminal or a log sees while text is tokenised."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

_QUIET_S = 2.0


class SoFar(NamedTuple):
    """How much has been tokenised."""

    num_documents: int = 0
    num_tokens: int = 0
    bytes_read: int = 0

    def told(self, time_s: float) -> str:
        """One line with the rate.

        >>> SoFar(1200, 3_000_000, 14_000_000).told(2.0)
        '1,200 documents, 14 MB, 3.0 M tokens, 1,500 k tokens/s'
        """
        read = f"{self.bytes_read / 1e6:,.0f} MB, " if self.bytes_read else ""
        tokens = f"{self.num_tokens / 1e6:.1f} M tokens"
        rate = f"{self.num_tokens / max(time_s, 1e-9) / 1e3:,.0f} k tokens/s"
        return f"{self.num_documents:,} documents, {read}{tokens}, {rate}"


@contextmanager
def shown_progress(what: str, num_bytes: int | None) -> Iterator[Callable[[SoFar], None]]:
    """Shows work that takes longer than two seconds on stderr.

    A terminal sees a line that moves, with the time that is left where ``num_bytes`` is known;
    anything else one line at the start. Both see one at the end.

    Yields:
        What is to be called with the state of the work.
    """
    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False)]
    if num_bytes:
        columns += [BarColumn(20), TimeRemainingColumn()]
    columns.append(TextColumn("{task.fields[told]}", markup=False))
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    display = Progress(*columns, console=console, transient=True)
    task = display.add_task(what, total=num_bytes, told="")
    started_s = time.monotonic()
    so_far, is_shown = SoFar(), False

    def show(now: SoFar) -> None:
        nonlocal so_far, is_shown
        so_far, time_s = now, time.monotonic() - started_s
        if not is_shown:
            if time_s < _QUIET_S:
                return
            is_shown = True
            if console.is_terminal:
                display.start()
            else:
                console.print(f"tokenising {what}", markup=False)
        display.update(task, completed=now.bytes_read, told=now.told(time_s))

    try:
        yield show
    finally:
        if display.live.is_started:
            display.stop()
    if is_shown:
        time_s = time.monotonic() - started_s
        console.print(f"tokenised {what}: {so_far.told(time_s)}, {time_s:.0f} s", markup=False)
