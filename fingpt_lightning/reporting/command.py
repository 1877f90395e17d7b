"""``fingpt report``: folders in, a page out."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fingpt_lightning.units import format_bytes


def run(options: argparse.Namespace) -> None:
    """Writes the page and prints where it is.

    Args:
        options: Result of `parse_options`.

    Raises:
        ValueError: A folder or a file is not valid.
        FileNotFoundError: A path does not exist.
    """
    _write(options.paths, options.output, options.watch)
    size = format_bytes(options.output.stat().st_size)
    line = f"{options.output}: {size}, a page that needs no other file"
    Console().print(line, soft_wrap=True, markup=False, highlight=False)


def _write(paths: Sequence[Path], output: Path, every_s: int | None) -> None:
    """Writes the page once, or again and again until no run goes on or Ctrl-C ends it."""
    from fingpt_lightning.reporting.report import write_page

    goes_on = write_page(paths, output, every_s)
    if every_s is None or not goes_on:
        return
    line = f"{output}: written every {every_s} s until the run ends; Ctrl-C ends it now"
    Console(stderr=True).print(line, soft_wrap=True, markup=False, highlight=False)
    try:
        while goes_on:
            time.sleep(every_s)
            goes_on = write_page(paths, output, every_s)
    except KeyboardInterrupt:  # as the line above says; the page that stays is not read again
        write_page(paths, output)
