"""The results of a run, a sweep or an evaluation on one page.

Importing this package imports nothing heavy.
"""

from collections.abc import Sequence
from pathlib import Path

__all__ = ["write_report"]


def write_report(paths: Sequence[Path], output: Path) -> None:
    """Writes one self-contained page about run folders, sweep folders and evaluations.

    The page is a single file without scripts that loads nothing. Of a sweep the best trials are
    shown as runs. The file is written aside and then renamed.

    Args:
        paths: Folders that ``fingpt fit``, ``fingpt sweep`` or ``fingpt evaluate`` left.
        output: File of the page, in a folder that exists.

    Raises:
        ValueError: There are no paths, one is not such a folder, a file in it is broken (file and
            line are named), or ``output`` is a folder.
        FileNotFoundError: A folder does not exist.
    """
    from fingpt_lightning.reporting.report import write_page

    write_page(paths, output)
