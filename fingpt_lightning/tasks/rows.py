"""The examples of one split of a task, and a digest that identifies the data."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fingpt_lightning.tasks.examples import Example, examples_of_row
from fingpt_lightning.tasks.sources import Source, open_file, open_split
from fingpt_lightning.tasks.task import Task


class TaskRows(NamedTuple):
    """What a split holds.

    Args:
        examples: Examples in the order of the file.
        path: Path of the file; for the hub, its name, config and split.
        sha256: Digest of all examples' texts, choices and gold, whatever the form of the file.
        num_skipped: Number of examples left out because their text is empty.
        split_rule: Rule that selects the rows of the split.
    """

    examples: list[Example]
    path: Path
    sha256: str
    num_skipped: int
    split_rule: str


def read_rows(
    task: Task,
    data_dir: str | Path | None,
    split: str,
    *,
    strict: bool = False,
    separator: str | None = None,
    encoding: str | None = None,
) -> TaskRows:
    """Reads a split from ``<data_dir>/<task.folder>/<split>.*``, or from the hub.

    Args:
        task: Task that ``find_task`` returned.
        data_dir: Folder of all sets; None reads from the Hugging Face hub.
        split: Name of the split, ``train``, ``validation`` or another that the set has.
        strict: Whether an empty text is an error rather than left out.
        separator: Separator of its CSV file; None takes the task's or detects it.
        encoding: Encoding of its CSV file; None takes that of the byte order mark, else UTF-8.

    Raises:
        ValueError: A row is wrong; the message begins with file and line. Or the task is not on
            the hub.
        FileNotFoundError: The folder or the split is missing.
        RuntimeError: The hub cannot be reached or its set does not load.
    """
    source = open_split(task, data_dir, split, separator=separator, encoding=encoding)
    return _read(task, [source], strict)


def read_files(
    task: Task,
    paths: Sequence[Path],
    *,
    separator: str | None = None,
    encoding: str | None = None,
) -> TaskRows:
    """Reads files by path, whatever their names.

    Args:
        task: Task whose rows they hold.
        paths: Files, at least one; the first stands for all in the result.
        separator: Separator of CSV files, as in `read_rows`.
        encoding: Encoding of CSV files, as in `read_rows`.

    Raises:
        ValueError: A row or a setting is wrong; the message begins with file and line.
        FileNotFoundError: A file is missing.
    """
    return _read(task, [open_file(task, path, separator, encoding) for path in paths], False)


def _read(task: Task, sources: Sequence[Source], strict: bool) -> TaskRows:
    examples = []
    num_skipped = 0
    seen = set()
    for path, number, row in ((one.path, *row) for one in sources for row in one.rows):
        try:
            made = list(examples_of_row(task, row, number))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        for example in made:
            if example is None:
                if strict:
                    raise ValueError(f"{path}:{number}: the text is empty")
                num_skipped += 1
            elif not task.distinct:
                examples.append(example)
            elif (question := (example.prompts, example.choices)) not in seen:
                examples.append(example)
                seen.add(question)
    rule = " and ".join(dict.fromkeys(source.split_rule for source in sources))
    return TaskRows(examples, sources[0].path, examples_sha256(examples), num_skipped, rule)


def examples_sha256(examples: Iterable[Example]) -> str:
    """The digest of the examples' texts, choices and gold, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        more = [part for part in (example.turns, example.reference) if part]
        line = json.dumps([example.text, example.choices, example.gold, *more])
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()
