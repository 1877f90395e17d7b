"""``fingpt compare``: results in, their figures side by side out."""

import argparse

from rich.console import Console

from fingpt_lightning.files import write_whole
from fingpt_lightning.reporting.compare_options import FORMS, check_inputs
from fingpt_lightning.reporting.comparison import comparison_page
from fingpt_lightning.reporting.markdown import to_markdown
from fingpt_lightning.reporting.page import to_html


def run(options: argparse.Namespace) -> None:
    """Compares results, and prints the comparison or writes it as a page.

    Args:
        options: Result of `parse_options`.

    Raises:
        ValueError: Results are of different rows, or a file or an option is not valid.
        FileNotFoundError: A path does not exist.
    """
    output = options.output
    check_inputs(options)
    is_html = output is not None and output.suffix == ".html"
    page = comparison_page(options.paths, options.tasks, has_pictures=is_html)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if output is None:
        console.print(to_markdown(page), end="")
        return
    written = dict(zip(FORMS, (to_html, to_markdown), strict=True))[output.suffix](page)
    write_whole(output, written)
    console.print(f"{output}: {page.subtitle}")
