"""``fingpt tasks``: what is shipped, where it comes from, and what its prompts look like."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fingpt_lightning.tasks import audit_command
from fingpt_lightning.tasks.examples import Example
from fingpt_lightning.tasks.library import find_task, task_names
from fingpt_lightning.tasks.options import AUDIT
from fingpt_lightning.tasks.rows import read_rows
from fingpt_lightning.tasks.sources import splits_in
from fingpt_lightning.tasks.task import Task

_WIDTH = 160


def run(options: argparse.Namespace) -> None:
    """Lists the tasks, shows one, or audits their rows.

    Args:
        options: Result of `parse_options`.

    Raises:
        ValueError: There is no such task, or a row of it is wrong.
        FileNotFoundError: The task's file or the data folder is missing.
    """
    # Rich takes 80 columns for a file, which would cut the sources.
    console = Console(width=max(Console().width, _WIDTH), highlight=False, markup=False)
    folder = options.data_dir
    if folder is not None and not folder.expanduser().is_dir():
        raise FileNotFoundError(f"data_dir: no folder {folder}")
    if options.words[:1] == [AUDIT]:
        audit_command.run(options, console)
    elif not options.words:
        console.print(_table([find_task(name) for name in task_names()], folder))
    else:
        _show(find_task(options.words[0]), folder, console)


def _table(tasks: list[Task], data_dir: Path | None) -> Table:
    table = Table(box=None, pad_edge=False)
    names = ("task", "kind", *(() if data_dir is None else ("rows",)), "license", "source")
    for name in names:
        table.add_column(name, overflow="fold", no_wrap=name in ("task", "kind"))
    for task in tasks:
        rows = () if data_dir is None else (_counts(task, data_dir) or "-",)
        table.add_row(task.name, task.kind, *rows, task.license, task.source)
    return table


def _counts(task: Task, data_dir: Path) -> str:
    """The number of examples of each split that is there."""
    found = [
        f"{split} {len(read_rows(task, data_dir, split).examples):,}"
        for split in splits_in(task, data_dir)
    ]
    return ", ".join(found)


def _show(task: Task, data_dir: Path | None, console: Console) -> None:
    hub = None if task.hub is None else f"{task.hub.name}: {', '.join(task.hub.splits)}"
    layouts = "; ".join(
        f"{', '.join(shape.columns)}{f' (each of {shape.each})' if shape.each else ''}"
        for shape in task.shapes
    )
    facts = {
        "task": f"{task.name}, version {task.version}: {task.title}",
        "kind": f"{task.kind}, by {task.main_metric}",
        "labels": ", ".join(task.labels),
        "rows": None if data_dir is None else _counts(task, data_dir) or "none there",
        "columns": layouts,
        "hub": hub,
        "license": task.license,
        "source": task.source,
    }
    for name, fact in facts.items():
        if fact:
            console.print(f"{name:8} {fact}", soft_wrap=True)
    for template in task.templates:
        answer = "|".join(task.labels) or "{answer}"
        delimiter = task.delimiter_after(template)
        text = f"{task.instruction}{template.pattern}{delimiter}{answer}"
        console.print(f"\ntemplate:\n{text}", soft_wrap=True)
    example = None if data_dir is None else _first(task, data_dir)
    if example is not None:
        console.print(f"\nfirst row:\n{_text(example)}", soft_wrap=True)


def _first(task: Task, data_dir: Path) -> Example | None:
    for split in splits_in(task, data_dir):
        if found := read_rows(task, data_dir, split).examples:
            return found[0]
    return None


def _text(example: Example) -> str:
    if example.turns:
        return "\n".join(f"{turn.role}: {turn.content}" for turn in example.turns)
    gold = example.gold or 0
    prompt = example.prompts[gold if len(example.prompts) > 1 else 0]
    answer = example.choices[gold] if example.gold is not None else " (its answer is not known)"
    return f"{example.prefix}{prompt}{answer}"
