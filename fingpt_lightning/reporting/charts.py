"""Charts as SVG that is embedded in a page and takes its colors from it.

Matplotlib draws with stand-in colors, which become CSS variables: ``--ink``, ``--muted``,
``--grid`` and ``--surface`` of the page, ``--run-0`` to ``--run-7`` of runs, ``--part-0`` to
``--part-4`` of parts. So one drawing is right on dark and on light pages.
"""

import io
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fingpt_lightning.pipeline import Pass, Work

NUM_RUN_COLORS = 8
_NUM_PART_COLORS = 5
_INK, _MUTED, _GRID, _SURFACE = "#a20001", "#a20002", "#a20003", "#a20004"
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _GRID: "--grid",
    _SURFACE: "--surface",
    **{f"#a1000{i}": f"--run-{i}" for i in range(NUM_RUN_COLORS)},
    **{f"#a3000{i}": f"--part-{i}" for i in range(_NUM_PART_COLORS)},
}
# Points of a PDF, which are pixels of a page: at a phone's width a chart is shown in its own size.
_WIDTH, _HEIGHT = 360, 216
_MARKERS = "osD^vPX*"
_WORK_PARTS = {Work.FORWARD: 0, Work.BACKWARD: 1, Work.INPUT: 1, Work.WEIGHT: 2}
_number = itertools.count()


class Line(NamedTuple):
    """One curve.

    Attributes:
        run: Number of the run that it belongs to: its color, and the shape of its marks.
        points: Values of x and y.
        has_marks: Whether points are marked and joined, or only joined by a thin line.
    """

    run: int
    points: Sequence[tuple[float, float]]
    has_marks: bool = False


class Bar(NamedTuple):
    """A row of consecutive segments.

    Attributes:
        label: Text before the row.
        pieces: Lengths, each in the color of its part.
        run: Number of the run whose color the whole row has.
        is_reference: Whether the whole row is gray, as something to compare with.
    """

    label: str
    pieces: Sequence[float]
    run: int | None = None
    is_reference: bool = False


class Dot(NamedTuple):
    """A labeled point of a scatter; ``is_on`` marks those that are joined."""

    x: float
    y: float
    label: str
    is_on: bool


class Interval(NamedTuple):
    """A value and what it may be by chance."""

    label: str
    value: float
    low: float
    high: float


def line_chart(lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """Curves over a common axis; the page's legend names the colors."""

    def draw(axis: Any) -> None:
        for line in lines:
            x, y = [p[0] for p in line.points], [p[1] for p in line.points]
            color, again = _run(line.run), line.run >= NUM_RUN_COLORS
            style = {"color": color, "linestyle": "--" if again else "-"}
            if line.has_marks:
                mark = _MARKERS[line.run % len(_MARKERS)]
                axis.plot(x, y, marker=mark, markersize=4, lw=1.8, zorder=3, **style)
            else:
                axis.plot(x, y, lw=1.1, alpha=0.55, **style)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        _robust_limits(axis, [y for line in lines for _, y in line.points])

    return _svg(draw)


def bar_chart(bars: Sequence[Bar], x_label: str, limit: float | None = None) -> str:
    """Rows from left to right.

    Args:
        bars: Rows from the top.
        x_label: Label of the axis, with the unit.
        limit: End of the axis, for charts that are compared.
    """

    def draw(axis: Any) -> None:
        for place, bar in enumerate(bars):
            left = 0.0
            for part, piece in enumerate(bar.pieces):
                color = _part(part) if bar.run is None else _run(bar.run)
                color = _part(_NUM_PART_COLORS - 1) if bar.is_reference else color
                edge = {"edgecolor": _SURFACE, "linewidth": 0.8}
                axis.barh(place, piece, left=left, height=0.62, color=color, **edge)
                left += piece
        axis.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axis.tick_params(axis="y", length=0, labelcolor=_INK)
        axis.set_ylim(len(bars) - 0.5, -0.5)
        axis.set_xlim(0, limit)
        axis.set_xlabel(x_label)
        axis.grid(visible=False, axis="y")

    return _svg(draw, height=54 + 27 * max(2, len(bars)))


def interval_chart(
    intervals: Sequence[Interval], x_label: str, reference: float | None = None, first: int = 0
) -> str:
    """Rows from the top, each a mark with a bar from the low to the high end.

    Args:
        intervals: Rows, in the colors of runs.
        x_label: Label of the axis.
        reference: Value at which there is a line through all rows.
        first: Number of the color of the first row.
    """

    def draw(axis: Any) -> None:
        if reference is not None:
            axis.axvline(reference, color=_MUTED, lw=1.2, linestyle="--", zorder=1)
        for place, one in enumerate(intervals):
            color = _run(first + place)
            axis.plot([one.low, one.high], [place, place], color=color, lw=2.4, zorder=2)
            axis.plot([one.value], [place], "o", color=color, markersize=6.5, zorder=3)
        axis.set_yticks(range(len(intervals)), [one.label for one in intervals])
        axis.tick_params(axis="y", length=0, labelcolor=_INK)
        axis.set_ylim(len(intervals) - 0.5, -0.5)
        axis.set_xlabel(x_label)
        axis.grid(visible=False, axis="y")

    return _svg(draw, height=54 + 27 * max(2, len(intervals)))


def scatter_chart(dots: Sequence[Dot], x_label: str, y_label: str) -> str:
    """Points, of which some are joined in the order of x."""

    def draw(axis: Any) -> None:
        joined = sorted((dot.x, dot.y) for dot in dots if dot.is_on)
        axis.plot([x for x, _ in joined], [y for _, y in joined], color=_run(0), lw=1.6, zorder=2)
        for dot in dots:
            color = _run(0) if dot.is_on else _MUTED
            axis.plot([dot.x], [dot.y], "o", color=color, markersize=5, zorder=3)
            place = {"xytext": (5, 4), "textcoords": "offset points"}
            axis.annotate(dot.label, (dot.x, dot.y), color=_INK, fontsize=8.5, **place)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.margins(0.12)

    return _svg(draw)


def timeline_chart(passes: Sequence[Pass]) -> str:
    """A row per rank over time; numbers are microbatches."""
    start_s = min(p.start_s for p in passes)
    whole_ms = 1e3 * (max(p.end_s for p in passes) - start_s)
    ranks = sorted({p.rank for p in passes})

    def draw(axis: Any) -> None:
        for p in passes:
            left_ms, length_ms = 1e3 * (p.start_s - start_s), 1e3 * (p.end_s - p.start_s)
            color = _part(_WORK_PARTS[p.work])
            edge = {"edgecolor": _SURFACE, "linewidth": 0.6}
            axis.barh(p.rank, length_ms, left=left_ms, height=0.86, color=color, **edge)
            if length_ms > whole_ms / 45:
                place = (left_ms + length_ms / 2, p.rank)
                text = {"ha": "center", "va": "center", "fontsize": 8, "color": _SURFACE}
                axis.text(*place, str(p.microbatch), **text)
        axis.set_yticks(ranks, [f"rank {rank}" for rank in ranks])
        axis.tick_params(axis="y", length=0, labelcolor=_INK)
        axis.invert_yaxis()
        axis.set_xlim(0, whole_ms)
        axis.set_xlabel("milliseconds")
        axis.grid(visible=False)

    return _svg(draw, width=2 * _WIDTH, height=54 + 30 * len(ranks))


def tick_text(value: float | int, place: float | int | None = None) -> str:
    """A tick's number, short enough for an axis on a phone.

    >>> [tick_text(x) for x in (250_000, 1_500_000, 0.25, 400, 1e-4)]
    ['250k', '1.5M', '0.25', '400', '0.0001']
    """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _run(number: int) -> str:
    return f"#a1000{number % NUM_RUN_COLORS}"


def _part(number: int) -> str:
    return f"#a3000{number % _NUM_PART_COLORS}"


def _robust_limits(axis: Any, values: Sequence[float]) -> None:
    """Keeps a few values far above the rest, as of a diverging step, from flattening a chart."""
    if len(values) < 20:
        return
    ordered = sorted(values)
    low, high = ordered[0], ordered[int(0.98 * (len(ordered) - 1))]
    if ordered[-1] - low > 3 * (high - low) > 0:
        axis.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))


def _svg(draw: Callable[[Any], None], width: int = _WIDTH, height: int = _HEIGHT) -> str:
    import matplotlib as mpl  # takes a second
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import AutoLocator, MaxNLocator

    number = next(_number)
    style: Any = {  # mypy knows every name of them
        "svg.fonttype": "none",
        "svg.hashsalt": f"chart {number}",
        "text.parse_math": False,
        "font.size": 9.5,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _MUTED,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "grid.color": _GRID,
        "grid.linewidth": 0.8,
        "xtick.color": _GRID,
        "ytick.color": _GRID,
        "xtick.labelcolor": _MUTED,
        "ytick.labelcolor": _MUTED,
        "ytick.major.size": 0,
        "text.color": _INK,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        figure.patch.set_visible(False)
        FigureCanvasSVG(figure)
        axis = figure.add_subplot()
        axis.patch.set_visible(False)
        draw(axis)
        for scale in (axis.xaxis, axis.yaxis):
            if isinstance(scale.get_major_locator(), AutoLocator):
                scale.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
                scale.set_major_formatter(tick_text)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _for_page(buffer.getvalue(), number)


def _for_page(svg: str, number: int) -> str:
    """Only the drawing, as wide as its place, with names of its own and the page's colors."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="c{number}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1c{number}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg.replace("<svg", '<svg role="img"', 1)
