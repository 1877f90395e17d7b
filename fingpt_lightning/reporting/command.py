"""``fingpt report``: folders in, a page out."""

import argparse

from rich.console import Console

from fingpt_lightning.reporting import write_report
from fingpt_lightning.units import format_bytes


def run(options: argparse.Namespace) -> None:
    """Writes the page and prints where it is.

    Args:
        options: Result of `parse_options`.

    Raises:
        ValueError: A folder or a file is not valid.
        FileNotFoundError: A path does not exist.
    """
    write_report(options.paths, options.output)
    size = format_bytes(options.output.stat().st_size)
    line = f"{options.output}: {size}, a page that needs no other file"
    Console().print(line, soft_wrap=True, markup=False, highlight=False)
