"""``fingpt tasks audit``: what occurs twice in the rows of tasks."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fingpt_lightning.tasks.audit import TRAIN, AuditedRows, Overlap, overlap, pairs_to_audit
from fingpt_lightning.tasks.examples import Example
from fingpt_lightning.tasks.library import find_task, task_names
from fingpt_lightning.tasks.rows import TaskRows, read_files, read_rows
from fingpt_lightning.tasks.sources import splits_in

_MAX_TEXT = 100
_OWN_FILES = "train_files"


def run(options: argparse.Namespace, console: Console) -> None:
    """Compares all splits that are there, prints a line for each pair, and examples.

    Args:
        options: Result of `parse_options`, whose first word is ``audit``.
        console: Console to print on.

    Raises:
        ValueError: There is nothing to compare, a row is wrong, or with ``--strict`` a row occurs
            twice in what is trained and tested on.
        FileNotFoundError: A file or folder is missing.
    """
    splits = _splits(options.words[1:], options.data_dir)
    if options.train_files:
        rows = read_files(find_task("alpaca"), options.train_files)
        splits.insert(0, _audited(_OWN_FILES, TRAIN, rows))
    if not splits:
        raise ValueError(f"data_dir {options.data_dir} holds no split of any task")
    found = [
        overlap(seen, audited, ngram=options.ngram, threshold=options.threshold)
        for seen, audited in pairs_to_audit(splits)
    ]
    console.print(_table(found))
    for one in found:
        for pair in one.examples:
            console.print(
                f"{one.seen} row {pair.seen}, {one.audited} row {pair.audited}"
                f" ({pair.share:.0%}): {_shortened(pair.text)}",
                soft_wrap=True,
            )
    leaks = [one for one in found if one.seen != one.audited and one.num_found]
    if options.strict and leaks:
        named = ", ".join(f"{one.num_found:,} rows of {one.audited} in {one.seen}" for one in leaks)
        raise ValueError(f"rows occur twice: {named}")


def _splits(names: list[str], data_dir: Path) -> list[AuditedRows]:
    """The splits of the named tasks; of all that have a folder there where none is named."""
    found = []
    folders: set[str] = set()
    for name in names or task_names():
        task = find_task(name)
        splits = splits_in(task, data_dir)
        if names and not splits:
            raise FileNotFoundError(f"task {task.name}: {data_dir / task.folder} holds no split")
        if not names and task.folder in folders:
            continue  # another task has the same rows
        folders.add(task.folder)
        found += [_audited(task.name, split, read_rows(task, data_dir, split)) for split in splits]
    return found


def _audited(task: str, split: str, rows: TaskRows) -> AuditedRows:
    """The rows of the file, each once, however many questions a row has."""
    of_file: dict[int, Example] = {}
    for example in rows.examples:
        of_file.setdefault(example.row, example)
    examples = list(of_file.values())
    texts = [_text(example) for example in examples]
    return AuditedRows(task, split, texts, list(of_file), [_answer(one) for one in examples])


def _text(example: Example) -> str:
    if example.turns:
        return "\n".join(turn.content for turn in example.turns if turn.role == "user")
    if example.message is not None:
        return example.message[0]
    return example.text


def _answer(example: Example) -> str | None:
    return None if example.gold is None else example.choices[example.gold]


def _table(found: list[Overlap]) -> Table:
    table = Table(box=None, pad_edge=False)
    titles = ("seen", "should be new", "rows", "equal", "other answer", "overlapping", "share")
    for place, title in enumerate(titles):
        table.add_column(title, justify="left" if place < 2 else "right", no_wrap=True)
    for one in found:
        audited = "its own later rows" if one.seen == one.audited else one.audited
        counts = (one.num_rows, one.num_equal, one.num_conflicting, one.num_overlapping)
        share = one.num_found / max(1, one.num_rows)
        table.add_row(one.seen, audited, *(f"{count:,}" for count in counts), f"{share:.2%}")
    return table


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 3]}..."
