"""The pieces of a page, and how they become HTML."""

from collections.abc import Sequence
from typing import NamedTuple

from fingpt_lightning.reporting.answers import Confusion


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        text: Text of the cell.
        is_number: Whether it is aligned to the right, its digits below each other.
        is_best: Whether it is the best of its row or column.
        run: Number of the run whose color stands before it.
    """

    text: str
    is_number: bool = False
    is_best: bool = False
    run: int | None = None


class Table(NamedTuple):
    """Rows below a head; ``caption`` stands above."""

    head: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    kind: str = "table"


class Chart(NamedTuple):
    """A drawing with its title and what to see in it."""

    title: str
    svg: str
    caption: str = ""
    is_wide: bool = False


class Charts(NamedTuple):
    """Drawings beside each other, as many as fit on the screen.

    Attributes:
        charts: Charts of one subject.
        parts: Names of the parts, by color; empty where colors are of runs.
        choices: Names of the charts in a switch that shows one of them; empty where all are shown.
        chosen: Number of the chart that is shown at first.
    """

    charts: Sequence[Chart]
    parts: Sequence[str] = ()
    choices: Sequence[str] = ()
    chosen: int = 0
    kind: str = "charts"


class Matrix(NamedTuple):
    """A confusion with a title."""

    title: str
    confusion: Confusion

    def share(self, row: int, column: int) -> float:
        """The cell's share of its row."""
        counts = self.confusion.counts[row]
        return counts[column] / max(1, sum(counts))


class Matrices(NamedTuple):
    """Confusions beside each other."""

    caption: str
    matrices: Sequence[Matrix]
    kind: str = "matrices"


class Note(NamedTuple):
    """A sentence."""

    text: str
    kind: str = "note"


class Details(NamedTuple):
    """Text as it is, shown on request."""

    title: str
    text: str
    kind: str = "details"


Block = Table | Charts | Matrices | Note | Details


class Section(NamedTuple):
    """A part of the page."""

    key: str
    title: str
    lead: str
    blocks: Sequence[Block]


class Card(NamedTuple):
    """A figure that the page opens with."""

    label: str
    value: str
    note: str = ""
    run: int | None = None


class Label(NamedTuple):
    """A run in the legend."""

    name: str
    run: int
    state: str


class Page(NamedTuple):
    """The whole page."""

    title: str
    subtitle: str
    cards: Sequence[Card]
    labels: Sequence[Label]
    sections: Sequence[Section]
    missing: Sequence[str]
    refresh_s: int | None = None


def to_html(page: Page) -> str:
    """One file that needs no other."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fingpt_lightning.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(page=page)


def number(text: str, is_best: bool = False) -> Cell:
    """A cell with a figure."""
    return Cell(text, is_number=True, is_best=is_best)
