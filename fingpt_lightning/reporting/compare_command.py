"""``fingpt compare``: results in, their figures side by side out."""

import argparse

from rich.console import Console

from fingpt_lightning.files import write_whole
from fingpt_lightning.reporting.comparison import comparison_page
from fingpt_lightning.reporting.markdown import to_markdown
from fingpt_lightning.reporting.page import to_html
from fingpt_lightning.terminal.messages import nearest

_FORMS = {".html": to_html, ".md": to_markdown}


def run(options: argparse.Namespace) -> None:
    """Compares results, and prints the comparison or writes it as a page.

    Args:
        options: Result of `parse_options`.

    Raises:
        ValueError: Results are of different rows, or a file or an option is not valid.
        FileNotFoundError: A path does not exist.
    """
    output = options.output
    if output is not None:
        if output.suffix not in _FORMS:
            advice = nearest(output.suffix, _FORMS)
            raise ValueError(f"output {output} ends in none of {', '.join(_FORMS)}{advice}")
        if not output.resolve().parent.is_dir():
            raise FileNotFoundError(f"output {output}: there is no folder {output.parent}")
        if output.is_dir():
            raise ValueError(f"output {output} is a folder; name a file")
    page = comparison_page(options.paths, options.tasks)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if output is None:
        console.print(to_markdown(page), end="")
        return
    write_whole(output, _FORMS[output.suffix](page))
    console.print(f"{output}: {page.subtitle}")
