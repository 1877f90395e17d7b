"""The section about a sweep: its course, its frontier, importances, trials."""

from fingpt_lightning.reporting.charts import Bar, Dot, bar_chart, scatter_chart
from fingpt_lightning.reporting.headline import compression, last_val_loss
from fingpt_lightning.reporting.page import (
    Block,
    Cell,
    Chart,
    Charts,
    Note,
    Section,
    Table,
    number,
)
from fingpt_lightning.reporting.runs import Sweep, Trial
from fingpt_lightning.reporting.search import Point, frontier, importances
from fingpt_lightning.units import format_duration

_MAX_ROWS = 20


def sweep_section(sweep: Sweep) -> Section:
    """All that a sweep adds to its best runs."""
    ranked = sweep.ranked()
    blocks: list[Block] = []
    charts = []
    if len(ranked) > 1:
        charts.append(_course(sweep, ranked))
    points = _points(ranked)
    if len({point.compression_ratio for point in points}) > 1:
        charts.append(_frontier(points))
    weights = importances([(t.parameters, t.value) for t in ranked if t.value is not None])
    if weights:
        bars = [Bar(name.rpartition(".")[2], [weight], 0) for name, weight in weights.items()]
        caption = "How much of the order of the trials each parameter explains alone, 0 to 1."
        charts.append(Chart("Importance of parameters", bar_chart(bars, "share", 1.0), caption))
    if charts:
        blocks.append(Charts(charts))
    if ranked and not weights:
        text = "Importances need four trials with a value and a parameter that repeats values."
        blocks.append(Note(text))
    if ranked and not points:
        text = "Frontier: the trials have no compression and loss to compare."
        blocks.append(Note(text))
    blocks.append(_trials(sweep, ranked))
    left = sum(trial.state != "running" for trial in sweep.trials)
    lead = (
        f"{sweep.method}, to {sweep.goal} {sweep.metric}: {left} of {len(sweep.trials)} trials"
        " have ended. The best ones are the runs below."
    )
    return Section(f"sweep-{sweep.name}", f"Sweep {sweep.name}", lead, blocks)


def _course(sweep: Sweep, ranked: list[Trial]) -> Chart:
    """Each trial's value, and the best so far."""
    pick = max if sweep.goal == "maximize" else min
    values = sorted((t.number, t.value) for t in ranked if t.value is not None)
    so_far: list[tuple[float, float]] = []
    for place, value in values:
        so_far.append((place, pick(value, so_far[-1][1]) if so_far else value))
    dots = [Dot(place, value, "", is_on=False) for place, value in values]
    best = [Dot(place, value, "", is_on=True) for place, value in so_far]
    svg = scatter_chart([*dots, *best], "trial", sweep.metric)
    return Chart("Value of each trial", svg, "Blue: the best so far.")


def _points(ranked: list[Trial]) -> list[Point]:
    found = []
    for trial in ranked:
        if trial.run is not None:
            ratio = compression(trial.run, "total_parameter_ratio")
            loss = last_val_loss(trial.run)
            if ratio is not None and loss is not None:
                found.append(Point(trial.number, ratio, loss))
    return found


def _frontier(points: list[Point]) -> Chart:
    best = frontier(points)
    dots = [Dot(p.compression_ratio, p.loss, str(p.number), p in best) for p in points]
    svg = scatter_chart(dots, "dense over stored parameters", "validation loss")
    caption = "Blue: trials that no other one beats in both; numbers are trials."
    return Chart("Frontier of compression and loss", svg, caption)


def _trials(sweep: Sweep, ranked: list[Trial]) -> Table:
    pruned = [trial for trial in sweep.trials if trial.state == "pruned"]
    others = [trial for trial in sweep.trials if trial not in (*ranked, *pruned)]
    shown = [*[*ranked, *pruned][:_MAX_ROWS], *others]
    names = list(dict.fromkeys(name for trial in shown for name in trial.parameters))
    has_errors = any(trial.error for trial in shown)
    rows = []
    for trial in shown:
        value = "-" if trial.value is None else f"{trial.value:.4f}"
        cells = [
            number(str(trial.number)),
            number(value, is_best=trial is (ranked[0] if ranked else None)),
            *(number(_short(trial.parameters.get(name))) for name in names),
            number("-" if trial.seconds is None else format_duration(trial.seconds)),
            Cell(trial.state),
        ]
        rows.append([*cells, Cell(trial.error or "")] if has_errors else cells)
    head = [
        number("trial"),
        number(sweep.metric),
        *(number(name.removeprefix("model.init_args.")) for name in names),
        number("time"),
        Cell("state"),
    ]
    hidden = max(0, len(ranked) + len(pruned) - _MAX_ROWS)
    caption = f"Best trials; {hidden} more are not shown" if hidden else "Trials, the best first"
    return Table([*head, Cell("error")] if has_errors else head, rows, caption)


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
