"""``fingpt report``: folders in, a page out."""

import argparse

from rich.console import Console

from fingpt_lightning.reporting import write_report
from fingpt_lightning.units import format_bytes


def run(options: argparse.Namespace) -> None:
    """Writes the page and says where it is.

    Args:
        options: Of `parse_options`.

    Raises:
        ValueError: A folder or a file is not as it must be.
        FileNotFoundError: A path leads nowhere.
    """
    write_report(options.paths, options.output)
    size = format_bytes(options.output.stat().st_size)
    line = f"{options.output}: {size}, a page that needs no other file"
    Console().print(line, soft_wrap=True, markup=False, highlight=False)
