"""A page as Markdown: tables and sentences, for a terminal or a repository."""

from collections.abc import Iterator, Sequence

from fingpt_lightning.reporting.page import Cell, Details, Note, Page, Table


def to_markdown(page: Page) -> str:
    """The page without its drawings, its tables aligned so that they can be read as they are."""
    return "\n\n".join(_parts(page)) + "\n"


def _parts(page: Page) -> Iterator[str]:
    yield f"# {page.title}"
    yield page.subtitle
    for section in page.sections:
        yield f"## {section.title}"
        if section.lead:
            yield section.lead
        for block in section.blocks:
            if isinstance(block, Table):
                if block.caption:
                    yield block.caption
                yield _table(block)
            elif isinstance(block, Note):
                yield block.text
            elif isinstance(block, Details):
                yield f"{block.title}:\n\n```\n{block.text}\n```"
    yield from page.missing


def _table(table: Table) -> str:
    rows = [[_text(cell) for cell in row] for row in (table.head, *table.rows)]
    widths = [max(3, *(len(row[place]) for row in rows)) for place in range(len(table.head))]
    are_numbers = [cell.is_number for cell in table.head]
    rule = [
        "-" * (width - 1) + ":" if is_number else "-" * width
        for width, is_number in zip(widths, are_numbers, strict=True)
    ]
    lines = [_line(row, widths, are_numbers) for row in (rows[0], rule, *rows[1:])]
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int], are_numbers: Sequence[bool]) -> str:
    padded = [
        cell.rjust(width) if is_number else cell.ljust(width)
        for cell, width, is_number in zip(cells, widths, are_numbers, strict=True)
    ]
    return f"| {' | '.join(padded)} |"


def _text(cell: Cell) -> str:
    text = " ".join(cell.text.split()).replace("|", "\\|")
    return f"**{text}**" if cell.is_best else text
