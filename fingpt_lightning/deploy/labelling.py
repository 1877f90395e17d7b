"""Labels for rows as they arrive, a chunk at a time."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fingpt_lightning.deploy.adapter_bank import AdapterBank
from fingpt_lightning.deploy.labelled_file import check_writable
from fingpt_lightning.evaluation.numbers import read_number
from fingpt_lightning.evaluation.runner import predict
from fingpt_lightning.evaluation.scoring import Prediction
from fingpt_lightning.tasks import Example, Task
from fingpt_lightning.tasks.examples import example_of_fields, field_names
from fingpt_lightning.tasks.row_files import CsvForm, open_rows
from fingpt_lightning.tasks.task import Kind
from fingpt_lightning.terminal.messages import listed, nearest
from fingpt_lightning.terminal.shapes import kind_of

CHUNK_ROWS = 1024
_NUMBERS: tuple[Kind, ...] = ("numeric", "regression")
"""The kinds of which a column holds the number that was read, too."""
Row = Mapping[str, object]


class Columns(NamedTuple):
    """The columns that hold what a task needs.

    Args:
        text: Name of the column of the field ``text``; other fields are columns of their own names.
        adapter: Name of the column with each row's adapter, or None.
    """

    text: str
    adapter: str | None = None

    def of(self, field: str) -> str:
        """The column of a field."""
        return self.text if field == "text" else field


class Labeller:
    """A model that labels rows of a task, or writes an answer to each.

    Args:
        network: Network in evaluation mode.
        tokenizer: Tokenizer of the network.
        task: Task of kind ``labels``, or of one whose answers are written.
        columns: Columns of the rows.
        calibrate: Whether the bias for labels without content is taken out.
        batch_tokens: Tokens of a batch, as in `fingpt_lightning.evaluation.scoring.score`.
        bank: Bank of the network's adapters, where rows name theirs.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        task: Task,
        columns: Columns,
        *,
        calibrate: bool = True,
        batch_tokens: int | None = None,
        bank: AdapterBank | None = None,
    ) -> None:
        self._network, self._tokenizer, self._task = network, tokenizer, task
        self._columns, self._calibrate, self._bank = columns, calibrate, bank
        self._batch_tokens = batch_tokens

    def label(self, rows: Sequence[Row], first: int) -> list[dict[str, object]]:
        """The rows, each with its label and probabilities, or with the answer that was written.

        They are None where the text is empty or the row does not fit the context without it.

        Rows of one adapter are run together: what their prompts begin with is run once per adapter.

        Args:
            rows: Rows in the order of the file.
            first: Number of the first row, for messages.
        """
        by_adapter: dict[str | None, list[tuple[int, Example]]] = {}
        for place, row in enumerate(rows):
            example = example_of_row(self._task, row, first + place, self._columns)
            if example is not None:
                name = adapter_of_row(row, self._columns)
                by_adapter.setdefault(name, []).append((place, example))
        nothing: dict[str, object] = dict.fromkeys(label_columns(self._task))
        labelled = [{**row, **nothing} for row in rows]
        for name, found in by_adapter.items():
            examples = [example for _, example in found]
            if self._bank is None:
                answers = self._predict(examples)
            else:
                with self._bank.rows(name):
                    answers = self._predict(examples)
            for (place, _), answer in zip(found, answers, strict=True):
                if (values := self._values(answer)) is not None:
                    labelled[place] |= zip(nothing, values, strict=True)
        return labelled

    def _values(self, answer: Prediction) -> list[object] | None:
        """The values of the added columns; None where there is no answer."""
        if self._task.kind in _NUMBERS:
            text = answer.answer.strip()
            return [text, read_number(text)] if text else None
        if self._task.is_generated:
            text = answer.answer.strip()
            return [text] if text else None
        if answer.choice is None:
            return None
        return [self._task.labels[answer.choice], *(round(math.exp(x), 6) for x in answer.scores)]

    def _predict(self, examples: list[Example]) -> list[Prediction]:
        return predict(
            self._network,
            self._tokenizer,
            self._task,
            examples,
            calibrate=self._calibrate,
            batch_tokens=self._batch_tokens,
        )


def label_columns(task: Task) -> list[str]:
    """The columns that labeling adds: the label and the probability of each, or the answer."""
    if task.is_generated:
        value = [f"{task.name}_value"] if task.kind in _NUMBERS else []
        return [f"{task.name}_answer", *value]
    return [f"{task.name}_label", *(f"{task.name}_{'_'.join(x.split())}" for x in task.labels)]


def example_of_row(task: Task, row: Row, number: int, columns: Columns) -> Example | None:
    """The example of a row; None where its text is empty.

    Raises:
        ValueError: A column is missing, or a value is not allowed.
    """
    values = {}
    for field in field_names(task):
        column = columns.of(field)
        if column not in row:
            hint = nearest(column, row) or f"; the columns are {listed(row)}"
            raise ValueError(f"no column {column!r}{hint}")
        values[field] = row[column]
    return example_of_fields(task, values, number)


def adapter_of_row(row: Row, columns: Columns) -> str | None:
    """The name of a row's adapter; None is the base.

    Raises:
        ValueError: The column is missing or holds no text.
    """
    if columns.adapter is None:
        return None
    if columns.adapter not in row:
        hint = nearest(columns.adapter, row)
        raise ValueError(f"no column {columns.adapter!r}{hint}")
    value = row[columns.adapter]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"column {columns.adapter!r} holds {kind_of(value)}, not a name")
    return value.strip() or None if value is not None else None


def checked_rows(
    task: Task,
    file: Path,
    columns: Columns,
    adapters: Sequence[str] = (),
    output_ending: str = ".jsonl",
    form: CsvForm | None = None,
) -> tuple[int, list[str]]:
    """Reads a whole file, so that hours of labeling do not end at a wrong row.

    Args:
        task: Task of kind ``labels``, or of one whose answers are written.
        file: Input file.
        columns: Columns of its rows.
        adapters: Names of the adapters that rows may have.
        output_ending: Ending of the file that all columns are to be written to.
        form: Form of a CSV file.

    Returns:
        Number of rows, and the names of all columns.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A row is wrong; the message begins with file and line.
    """
    if task.kind != "labels" and not task.is_generated:
        raise ValueError(f"task {task.name} is of kind {task.kind}: it has no labels to give")
    names: dict[str, None] = {}
    added, num_rows = set(label_columns(task)), 0
    for number, row in open_rows(file, form):
        num_rows += 1
        names |= dict.fromkeys(row)
        try:
            _check_characters(row)
            check_writable(row, output_ending)
            if taken := added & row.keys():
                raise ValueError(f"the column {min(taken)!r} is there already; rename it")
            example_of_row(task, row, number, columns)
            name = adapter_of_row(row, columns)
            if name is not None and name not in adapters:
                hint = nearest(name, adapters) or f"; there are {listed(adapters)}"
                raise ValueError(f"adapter {name!r} is not loaded{hint}")
        except ValueError as error:
            raise ValueError(f"{file}:{number}: {error}") from None
    if not num_rows:
        raise ValueError(f"{file} holds no row")
    return num_rows, list(names)


def _check_characters(row: Row) -> None:
    """Raises where a row could not be written: JSON may hold half of a surrogate pair."""
    for name, value in row.items():
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name!r} has half of a surrogate pair, which is not text") from None


def row_chunks(
    file: Path, num_done: int, form: CsvForm | None = None
) -> Iterator[tuple[int, list[Row]]]:
    """The chunks of a file, each with its number, from ``num_done`` on."""
    every = (row for _, row in open_rows(file, form))
    rows = islice(every, num_done * CHUNK_ROWS, None)
    number = num_done
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield number, chunk
        number += 1


def count_labels(task: Task, rows: Sequence[Row]) -> Counter[str | None]:
    """How often each label was given, or an answer at all; None counts rows without one."""
    column = label_columns(task)[0]
    counted: Counter[str | None] = Counter()
    for row in rows:
        label = row[column]
        counted[None if label in (None, "") else "" if task.is_generated else str(label)] += 1
    return counted
