"""Results of the same rows side by side, as a page."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fingpt_lightning.evaluation.paired import (
    Row,
    RowStatistics,
    intervals,
    is_right,
    mcnemar,
    row_statistics,
)
from fingpt_lightning.evaluation.run_evaluations import PREDICTIONS, RESULTS, check_results
from fingpt_lightning.metric_keys import EVAL_FIGURES, LESS_IS_BETTER
from fingpt_lightning.reporting.compare_options import refuse_missing_results
from fingpt_lightning.reporting.files import read_object, read_objects
from fingpt_lightning.reporting.page import (
    Block,
    Cell,
    Chart,
    Charts,
    Note,
    Page,
    Section,
    Table,
    number,
)
from fingpt_lightning.terminal.messages import listed, nearest

_TOLERANCE = 1e-6
_GRADED = {"figures", "values"}
"""Fields of rows whose answers are right to a degree, unless they say that they are right."""
_DIGITS = 12
"""Of a digest that are shown."""
_LONGEST_LABEL = 24
"""Characters of a name beside a drawing."""
_ROW = {
    "gold?": str | None,
    "prediction": str | None,
    "is_right?": bool,
    "is_dropped?": bool,
    "group?": str,
    "figures?": {"*": float},
    "counts?": (float, float, float),
    "values?": (float, float | None),
}
_PROMPT_SETTINGS = ("scoring", "calibrate", "chat_template_sha256", "too_long")


class Result(NamedTuple):
    """What an evaluation left.

    Attributes:
        name: Name in tables, which no other result has.
        folder: Folder of its files.
        head: Object in ``results.json`` without ``tasks``.
        tasks: Entry of each task in ``results.json``.
        rows: Rows of each task in ``predictions.jsonl``.
    """

    name: str
    folder: Path
    head: dict[str, Any]
    tasks: dict[str, dict[str, Any]]
    rows: dict[str, list[Row]]


class _Compared(NamedTuple):
    """A figure of several results on the same rows, with 95 % intervals.

    Attributes:
        values: Figure of each result.
        of_each: Interval of each.
        of_differences: Interval of the difference of each but the first from the first.
    """

    values: list[float]
    of_each: list[tuple[float, float]]
    of_differences: list[tuple[float, float]]


def comparison_page(
    paths: Sequence[Path], tasks: Sequence[str] | None = None, *, has_pictures: bool = False
) -> Page:
    """Compares results on each task that two of them have; the first is the baseline.

    Rows that one of them left out, because they do not fit its context, are left out of all.

    Args:
        paths: Folders with ``results.json`` and ``predictions.jsonl``, two at least.
        tasks: Names of tasks; None takes all that two results have.
        has_pictures: Whether the main figures and their differences are drawn too.

    Raises:
        ValueError: There is one path, results are of different rows or have no task in common, or
            a file is broken.
        FileNotFoundError: A folder or a file does not exist.
    """
    refuse_missing_results(paths)
    results = _with_own_names([read_result(path) for path in dict.fromkeys(paths)])
    shared = [
        task
        for task in dict.fromkeys(task for result in results for task in result.tasks)
        if sum(task in result.tasks for result in results) > 1
    ]
    if not shared:
        each = "; ".join(f"{one.name}: {listed(one.tasks)}" for one in results)
        raise ValueError(f"no two results have a task in common ({each})")
    for task in tasks or ():
        if task not in shared:
            advice = nearest(task, shared) or f"; there are {', '.join(shared)}"
            raise ValueError(f"task {task!r} is not one that two results have{advice}")
    sections = [_task_section(task, results, has_pictures) for task in tasks or shared]
    sections.append(_provenance_section(results))
    names = [result.name for result in results]
    alone = [
        f"{task}: only {result.name} has it."
        for result in results
        for task in result.tasks
        if task not in shared
    ]
    return Page(
        title="Comparison of results",
        subtitle=f"{', '.join(names[1:])} against {names[0]}, on the same rows",
        cards=(),
        labels=(),
        sections=sections,
        missing=alone,
    )


def read_result(folder: Path) -> Result:
    """Reads the files of an evaluation, which are there.

    Raises:
        ValueError: A file is broken.
    """
    found = read_object(folder / RESULTS)
    check_results(found, folder / RESULTS)
    tasks = found["tasks"]
    rows: dict[str, list[Row]] = {}
    for row in read_objects(folder / PREDICTIONS, _ROW):
        rows.setdefault(str(row.get("task")), []).append(row)
    head = {key: value for key, value in found.items() if key != "tasks"}
    return Result(folder.resolve().name, folder, head, tasks, rows)


def _with_own_names(results: Sequence[Result]) -> list[Result]:
    """The results, those of one name with the parent folder before it, else the whole path."""
    names = [result.name for result in results]
    longer = [
        result.name
        if names.count(result.name) == 1
        else f"{result.folder.resolve().parent.name}/{result.name}"
        for result in results
    ]
    return [
        result._replace(name=name if longer.count(name) == 1 else str(result.folder.resolve()))
        for result, name in zip(results, longer, strict=True)
    ]


def _task_section(task: str, results: Sequence[Result], has_pictures: bool) -> Section:
    having = [result for result in results if task in result.tasks]
    _check_same_rows(task, having)
    known = [_known_rows(task, result) for result in having]
    answered = [{place for place, row in enumerate(rows) if row is not None} for rows in known]
    common = sorted(set.intersection(*answered))
    if not common:
        raise ValueError(f"{task}: there is no row that all results have answered")
    compared = [[row for p in common if (row := rows[p]) is not None] for rows in known]
    entry = having[0].tasks[task]
    main = _compare(str(entry["main_metric"]), task, having, compared)
    blocks: list[Block] = [_pictures(task, having, main)] if has_pictures else []
    blocks += [
        _figures(task, having, compared, main),
        _differences(task, having, compared, main),
        Note(_remark(having)),
    ]
    for result, places in zip(having, answered, strict=True):
        if len(places) > len(common):
            blocks.append(
                Note(
                    f"{len(places) - len(common):,} rows that {result.name} answered are left out:"
                    " they do not fit the context of another one."
                )
            )
    blocks += [Note(text) for text in _other_prompts(task, having)]
    lead = (
        f"{len(common):,} rows of {task}, {entry.get('split_rule', entry.get('split', ''))};"
        f" digest {str(entry['rows_sha256'])[:_DIGITS]}."
    )
    return Section(task, task, lead, blocks)


def _check_same_rows(task: str, results: Sequence[Result]) -> None:
    for result in results:
        if "rows_sha256" not in result.tasks[task]:
            raise ValueError(
                f"{result.folder / RESULTS}: {task} names no rows (rows_sha256), as results of"
                " version 0.2 do; evaluate it again"
            )
        if result.tasks[task].get("main_metric") not in EVAL_FIGURES:
            raise ValueError(f"{result.folder / RESULTS}: {task} has no main_metric that is known")
    first = results[0]
    for other in results[1:]:
        ours, theirs = (result.tasks[task] for result in (first, other))
        if ours["rows_sha256"] != theirs["rows_sha256"]:
            raise ValueError(
                f"{task}: {first.name} and {other.name} are of different rows"
                f" ({_described(ours)}; {_described(theirs)})"
            )
        counts = [len(result.rows.get(task, ())) for result in (first, other)]
        if counts[0] != counts[1]:
            raise ValueError(
                f"{task}: {first.name} holds {counts[0]:,} answers and {other.name} {counts[1]:,}"
                f" to the same rows; one {PREDICTIONS} is not whole"
            )


def _described(entry: Mapping[str, Any]) -> str:
    digest = str(entry["rows_sha256"])[:_DIGITS]
    return f"{entry.get('split')}, {entry.get('n')} rows, digest {digest}"


def _known_rows(task: str, result: Result) -> list[Row | None]:
    """The rows with a right answer that were not left out; None in place of the others.

    Raises:
        ValueError: They do not give the figures of ``results.json``.
    """
    path = result.folder / PREDICTIONS
    rows = result.rows.get(task, [])
    known = [None if row.get("gold") is None or row.get("is_dropped") else row for row in rows]
    found = [row for row in known if row is not None]
    if not found:
        raise ValueError(f"{path}: no row of {task} has a right answer")
    entry = result.tasks[task]
    for figure in (entry["main_metric"], "accuracy"):
        try:
            statistics = row_statistics(figure, found, entry.get("labels", ()))
        except ValueError as error:
            raise ValueError(f"{path}: a row of {task}: {error}") from None
        if statistics is None or figure not in entry:
            continue
        stored = float(entry[figure])
        if abs(statistics.value - stored) > _TOLERANCE:
            raise ValueError(
                f"{path}: its rows of {task} have {figure} {statistics.value:.4f}, but"
                f" {RESULTS} {stored:.4f}: the files do not belong together"
            )
    return known


def _compare(
    figure: str, task: str, results: Sequence[Result], compared: Sequence[Sequence[Row]]
) -> _Compared | None:
    """A figure of all results; None where one of them has no statistics of it."""
    known: list[RowStatistics] = []
    for result, rows in zip(results, compared, strict=True):
        statistics = row_statistics(figure, rows, result.tasks[task].get("labels", ()))
        if statistics is None:
            return None
        known.append(statistics)
    return _Compared([one.value for one in known], *intervals(known))


def _pictures(task: str, results: Sequence[Result], compared: _Compared | None) -> Charts:
    """The main figure of each result, and its difference from the first, with intervals."""
    # Not at the top: it imports torch, which a comparison in a terminal does without.
    from fingpt_lightning.reporting.charts import Interval, interval_chart

    if compared is None:
        return Charts([])
    values, of_each, of_differences = compared
    names = [_short(result.name) for result in results]
    title = EVAL_FIGURES[str(results[0].tasks[task]["main_metric"])]
    shown = [Interval(n, v, *ends) for n, v, ends in zip(names, values, of_each, strict=True)]
    gains = [
        Interval(name, value - values[0], *ends)
        for name, value, ends in zip(names[1:], values[1:], of_differences, strict=True)
    ]
    return Charts(
        [
            Chart(f"{task}: {title}", interval_chart(shown, title), "Bars hold 95 %."),
            Chart(
                f"Difference from {results[0].name}",
                interval_chart(gains, f"difference of {title}", reference=0.0, first=1),
                "A bar across the dashed line: no difference is shown by these rows.",
            ),
        ]
    )


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else f"...{name[3 - _LONGEST_LABEL :]}"


def _figures(
    task: str,
    results: Sequence[Result],
    compared: Sequence[Sequence[Row]],
    main: _Compared | None,
) -> Table:
    """A line for each result, with all figures of its rows."""
    entries = [result.tasks[task] for result in results]
    main_key = str(entries[0]["main_metric"])
    keys = [main_key, *(key for key in EVAL_FIGURES if key != main_key)]
    columns: list[tuple[Cell, list[Cell]]] = []
    for key in keys:
        if not any(key in entry for entry in entries):
            continue
        found = main if key == main_key else _compare(key, task, results, compared)
        if found is None:
            continue
        values, of_each, _ = found
        best = (min if key in LESS_IS_BETTER else max)(values)
        is_told_apart = len(set(values)) > 1
        cells = [
            number(f"{value:.3f} ({low:.3f}-{high:.3f})", is_told_apart and value == best)
            for value, (low, high) in zip(values, of_each, strict=True)
        ]
        columns.append((number(f"{EVAL_FIGURES[key]} (95 %)"), cells))
    rows = [
        [Cell(result.name), *(cells[place] for _, cells in columns)]
        for place, result in enumerate(results)
    ]
    return Table([Cell("result"), *(head for head, _ in columns)], rows)


def _differences(
    task: str,
    results: Sequence[Result],
    compared: Sequence[Sequence[Row]],
    main: _Compared | None,
) -> Table:
    """A line for each result but the first: what it gains on the first, and whether by chance."""
    main_key = str(results[0].tasks[task]["main_metric"])
    is_tested = not any("is_right" not in row and _GRADED & row.keys() for row in compared[0])
    base = is_right(compared[0]) if is_tested else []
    rows = []
    for place, result in enumerate(results[1:], 1):
        difference = "-"
        if main is not None:
            low, high = main.of_differences[place - 1]
            gain = main.values[place] - main.values[0]
            difference = f"{gain:+.3f} ({low:+.3f} to {high:+.3f})"
        if not is_tested:
            rows.append([Cell(result.name), number(difference)])
            continue
        own = is_right(compared[place])
        both = sum(a and b for a, b in zip(base, own, strict=True))
        test = mcnemar(base, own)
        rows.append(
            [
                Cell(result.name),
                number(difference),
                number(f"{both:,}"),
                number(f"{test.only_second:,}"),
                number(f"{test.only_first:,}"),
                number(f"{len(base) - both - test.only_first - test.only_second:,}"),
                number(_p_value(test.p_value)),
                Cell("exact" if test.is_exact else "chi-squared"),
            ]
        )
    title = f"{EVAL_FIGURES[main_key]}: difference (95 %)"
    if not is_tested:
        return Table([Cell("result"), number(title)], rows, f"Against {results[0].name}")
    titles = (
        title,
        *("both right", "only it right", f"only {results[0].name}", "neither", "p"),
    )
    caption = f"Against {results[0].name}; McNemar's test of the rows that one of them has right"
    head = [Cell("result"), *(number(title) for title in titles), Cell("McNemar's test")]
    return Table(head, rows, caption)


def _p_value(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def _remark(results: Sequence[Result]) -> str:
    text = "Intervals hold 95 % of 1,000 bootstrap resamples of the rows, the same for all results."
    if len(results) > 2:
        text += " p-values are not corrected for the number of comparisons."
    return text


def _other_prompts(task: str, results: Sequence[Result]) -> list[str]:
    """What differs in how the rows were asked; the rows are the same."""
    found = []
    first = results[0]
    for other in results[1:]:
        ours, theirs = first.tasks[task], other.tasks[task]
        differing = [
            key
            for key in ("task_version", "template_sha256", "num_fewshot")
            if ours.get(key) != theirs.get(key)
        ]
        of_first, of_other = (result.head.get("settings", {}) for result in (first, other))
        differing += [key for key in _PROMPT_SETTINGS if of_first.get(key) != of_other.get(key)]
        if differing:
            what = ", ".join(differing)
            found.append(f"{other.name} was asked otherwise than {first.name}: {what}.")
    return found


def _provenance_section(results: Sequence[Result]) -> Section:
    """What each result is of: model, adapter, tokenizer, settings and versions."""
    lines: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "model": lambda head: str(head.get("model", "-")),
        "revision": lambda head: _digest(head.get("revision")),
        "adapter": lambda head: str(head.get("adapter") or "-"),
        "adapter digest": lambda head: _digest(head.get("adapter_sha256")),
        "tokenizer digest": lambda head: _digest(head.get("tokenizer_sha256")),
        "step": lambda head: str(head.get("step", "-")),
        "settings": lambda head: _settings(head.get("settings", {})),
        "versions": lambda head: _settings(head.get("versions", {})),
        "started at": lambda head: str(head.get("started_at", "-")),
    }
    rows = []
    for title, text in lines.items():
        cells = [text(result.head) for result in results]
        if any(cell != "-" for cell in cells):
            rows.append([Cell(title), *map(Cell, cells)])
    head = [Cell(""), *(Cell(result.name) for result in results)]
    return Section("provenance", "What was evaluated", "", [Table(head, rows)])


def _digest(value: object) -> str:
    return "-" if value is None else str(value)[:_DIGITS]


def _settings(settings: Mapping[str, Any]) -> str:
    shown = {
        key: str(value)[:_DIGITS] if key.endswith("sha256") else json.dumps(value).strip('"')
        for key, value in settings.items()
        if value is not None
    }
    return ", ".join(f"{key} {value}" for key, value in shown.items()) or "-"
