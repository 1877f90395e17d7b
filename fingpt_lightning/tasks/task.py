r"""What a task is: its texts, its labels, and how a row of its files becomes a prompt.

A template names fields in braces, ``{text}``, or ``{text|capitalize}`` for a first letter in upper
case and all others in lower. Braces around anything but a name, ``{Yes/No}``, are plain text.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from fingpt_lightning.tasks.row_files import CsvForm

# fmt: off
Kind = Literal[
    "labels", "choices", "partial", "last_word", "instructions",
    "numeric", "spans", "summary", "regression",
]
Metric = Literal[
    "accuracy", "accuracy_norm", "macro_f1", "weighted_f1", "average_f1", "mcc", "loss",
    "exact_match", "f1", "close_match", "entity_f1", "token_f1",
    "rouge1", "rouge2", "rouge_l", "pearson",
]
# fmt: on
NumberRule = Literal["tatqa", "value"]
ListForm = Literal["table", "lines", "sentences"]
Field = str | tuple[str, ...]

KINDS: tuple[Kind, ...] = get_args(Kind)
METRICS: tuple[Metric, ...] = get_args(Metric)
FIELDS_OF_KIND: Mapping[Kind, tuple[str, ...]] = {
    "labels": ("label",),
    "choices": ("choices", "gold"),
    "partial": ("contexts", "continuation", "gold"),
    "last_word": (),
    "instructions": ("output",),
    "numeric": ("answer",),
    "spans": ("answer",),
    "summary": ("answer",),
    "regression": ("answer",),
}
"""The fields that the rows of each kind have, besides those that the templates name."""

GENERATED: tuple[Kind, ...] = ("numeric", "spans", "summary", "regression")
"""The kinds whose answers are written, and read in what was written."""
METRICS_OF_KIND: Mapping[Kind, tuple[Metric, ...]] = {
    "labels": ("accuracy", "macro_f1", "weighted_f1", "average_f1", "mcc"),
    "choices": ("accuracy", "accuracy_norm"),
    "partial": ("accuracy",),
    "last_word": ("accuracy",),
    "instructions": ("loss",),
    "numeric": ("exact_match", "f1", "close_match"),
    "spans": ("entity_f1", "token_f1", "exact_match"),
    "summary": ("rouge_l", "rouge1", "rouge2"),
    "regression": ("pearson",),
}
"""The metrics that may be a kind's main one; of all of them more is better."""
NUMBER_RULES: tuple[NumberRule, ...] = get_args(NumberRule)
LIST_FORMS: tuple[ListForm, ...] = get_args(ListForm)

_WHOLE_FLOAT = re.compile(r"([+-]?\d+)\.0*")
_FIELD = re.compile(r"\{(\w+)(\|capitalize)?\}")


def whole_number(text: str) -> str:
    """A whole number without its point; anything else as it is.

    Where a value of a column is missing, tables hold the others as floats.

    >>> whole_number("1.0"), whole_number("1.5"), whole_number("rise")
    ('1', '1.5', 'rise')
    """
    found = _WHOLE_FLOAT.fullmatch(text)
    return found[1] if found else text


def _inserted(found: re.Match[str], fields: Mapping[str, Field]) -> str:
    value = fields[found[1]]
    text = value if isinstance(value, str) else " / ".join(value)
    return text.capitalize() if found[2] else text


@dataclass(frozen=True)
class Template:
    """A text with fields in braces.

    >>> Template("{q} {Yes/No}").render({"q": "Up?"})
    'Up? {Yes/No}'
    """

    pattern: str

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The fields, in the order of their first use."""
        return tuple(dict.fromkeys(found[1] for found in _FIELD.finditer(self.pattern)))

    def render(self, fields: Mapping[str, Field]) -> str:
        """Puts the fields in; a list becomes its items between slashes.

        Raises:
            KeyError: A field is not there.
        """
        return _FIELD.sub(lambda found: _inserted(found, fields), self.pattern)

    def span(self, fields: Mapping[str, Field], name: str) -> tuple[int, int] | None:
        """Where a field begins and ends in the rendered text, the last time; None if nowhere.

        >>> Template("Q: {q}?").span({"q": "Up"}, "q")
        (3, 5)
        """
        if name not in self._last_places:
            return None
        before, place = self._last_places[name]
        begin = len(before.render(fields))
        return begin, begin + len(_inserted(place, fields))

    @cached_property
    def _last_places(self) -> "dict[str, tuple[Template, re.Match[str]]]":
        """For each field, the template before its last place, and that place."""
        return {
            found[1]: (Template(self.pattern[: found.start()]), found)
            for found in _FIELD.finditer(self.pattern)
        }


class Entities(NamedTuple):
    """Columns of tagged tokens, which make up one row with all its entities.

    Args:
        tokens: Column of the tokens.
        tags: Column of their tags.
        types: Word of the task by tag, in lower case; None leaves entities of that tag out. Without
            any, the type is the tag without ``B-`` and ``I-``.
    """

    tokens: str
    tags: str
    types: Mapping[str, str | None]


class Marked(NamedTuple):
    """Columns of a text and of marks, which make up the text's summary.

    Args:
        lines: Column of the text, a sentence per line.
        marks: Column of a list with 1 for each line that belongs to the summary, else 0.
    """

    lines: str
    marks: str


class Numbers(NamedTuple):
    """How a written number is compared with the right one.

    Args:
        rule: Rule of the exact match: ``tatqa`` is that of TAT-QA's scorer, ``value`` that of
            FinQA's, on executed programs: equal after rounding to five decimals.
        tolerance: Relative deviation up to which a number counts as close.
    """

    rule: NumberRule = "value"
    tolerance: float = 0.01


_USUAL_NUMBERS = Numbers()


@dataclass(frozen=True)
class Shape:
    """One form in which a task's rows are shipped, and how its columns become the task's fields.

    A row has the first shape whose columns it has.

    Args:
        fields: Sources of the fields: a column (a dot leads into nested ones), a
            ``Template`` over columns and ``parse`` groups, or templates that make up a list.
        parse: Patterns that take columns apart, by column; their named groups are fields.
        values: Mapping from field to {value in the file, lower case: the task's own}; None drops
            the row.
        bins: Upper bounds, exclusive, of the numbers in ``label`` that mean a label, by label.
        questions: Questions by column: a row becomes one example for each, with the fields
            ``question`` and, from that column, ``label``.
        spans: Columns of ``tokens`` and ``tags``: a row becomes one example for each tagged span,
            with the fields ``text``, ``entity`` and, from the tag, ``label``.
        each: Column of a list of objects: a row becomes one for each, with its columns too.
        chat: Column of the turns of a conversation, of which such a row consists.
        entities: Columns of tagged tokens: the row has the fields ``text`` and ``answer``, a list
            of the entities with their types.
        marked: Columns of lines and marks: the row has the fields ``text`` and ``answer``, the
            lines that are marked, in one line.
        lists: Forms in which columns that hold lists become texts: a ``table`` of rows of cells,
            ``lines``, or ``sentences`` of one line.
    """

    fields: Mapping[str, str | Template | tuple[Template, ...]]
    parse: Mapping[str, re.Pattern[str]]
    values: Mapping[str, Mapping[str, str | None]]
    bins: Mapping[str, float]
    questions: Mapping[str, str]
    spans: Mapping[str, str]
    each: str | None = None
    chat: str | None = None
    entities: Entities | None = None
    marked: Marked | None = None
    lists: Mapping[str, ListForm] = field(default_factory=dict)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that a row of this shape has."""
        named: list[str] = []
        for source in self.fields.values():
            for part in source if isinstance(source, tuple) else (source,):
                named += part.names if isinstance(part, Template) else (part,)
        groups = self._groups()
        used = [name for name in named if name not in groups]
        own = [self.chat] if self.chat else []
        own += self.entities[:2] if self.entities else []
        own += self.marked or []
        return tuple(
            dict.fromkeys([*self.parse, *self.questions, *self.spans.values(), *used, *own])
        )

    @cached_property
    def translated_columns(self) -> dict[str, tuple[str, ...]]:
        """Columns mapped to the values, in lower case, that the task translates."""
        found: dict[str, tuple[str, ...]] = {}
        for name, values in self.values.items():
            source = self.fields.get(name)
            of_label = list(self.questions) if name == "label" else []
            for column in [source, *of_label] if isinstance(source, str) else of_label:
                found[column] = (*found.get(column, ()), *values)
        return found

    @cached_property
    def gives(self) -> tuple[str, ...]:
        """The fields that it makes."""
        made = [*self.fields, *self._groups()]
        made += ["question", "label"] if self.questions else []
        made += ["text", "entity", "label"] if self.spans else []
        made += ["text", "answer"] if self.entities or self.marked else []
        # A template of kind `partial` sees one of the contexts at a time.
        made += ["context"] if "contexts" in made else []
        return tuple(dict.fromkeys(made))

    def _groups(self) -> tuple[str, ...]:
        return tuple(group for pattern in self.parse.values() for group in pattern.groupindex)


@dataclass(frozen=True)
class Hub:
    """A data set on the Hugging Face hub; ``splits`` maps our names of its splits to its own."""

    name: str
    splits: Mapping[str, str]
    config: str | None = None
    data_dir: str | None = None
    revision: str | None = None


FILE_NAME = "file"
"""The column with the name of the file, which rows of tasks with published files have."""


@dataclass(frozen=True)
class LineFile:
    """A text file with one row per line: columns between separators, the first may hold some too.

    ``names`` are tried in order, so that of several files in a folder the first counts. One with
    the ending of another form, such as ``.csv``, is read as that.
    """

    names: tuple[str, ...]
    separator: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Cut:
    """How a set that is shipped whole becomes ``train`` and ``test``.

    It is what ``datasets.Dataset.train_test_split`` does.

    Args:
        test_size: Share of the rows that are the test.
        seed: Seed of the order.
        splits: Splits of the set that are put together first, in this order; none where it is
            shipped without splits.
    """

    test_size: float
    seed: int
    splits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    r"""One task, as its YAML file says.

    Args:
        name: Stem of the file; part of logged keys.
        kind: Kind of what is scored: one of the same ``labels`` in every row, each row's own
            ``choices``, one ``continuation`` after several contexts (``partial``), the
            ``last_word``, nothing (``instructions``: the output is there to train on), or what is
            written: a number or spans out of a report (``numeric``), a list of ``spans``, a
            ``summary``, a score (``regression``).
        version: Number that rises when results are no longer comparable with earlier ones.
        source: Place where the set comes from.
        license: License of the set, not of this project.
        folder: Folder in the data directory.
        labels: Answer words in canonical order, or the types of ``spans``.
        instruction: Text before every prompt. It ends where tokenizers split anyway, so that
            its keys and values are computed once for all rows: after the line end, not before it,
            because GPT-2's splits ``.\nInput`` into ``.``, ``\n``, ``Input``, but those of Llama 3
            and Qwen into ``.\n``, ``Input``; or before a blank that a word follows.
        templates: Templates of the prompt after the instruction. The first whose fields all exist
            and are not empty is taken; a row that fits none counts as empty.
        text: Template of the row's own text, for tables and for the digest.
        shorten: Field that loses tokens where a row is too long. None is ``input`` where the
            prompt has it, else the longest field of ``text`` in it, but never ``instruction``.
        delimiters: Text between prompt and answer, one for all templates or one for each. It
            belongs to the answer: its first token has the blank.
        distinct: Whether a prompt that a split repeats is taken once.
        substitute: Replacements by pattern, applied in order to every field.
        shapes: Forms of its rows.
        hub: Data set on the hub, for rows without a data directory.
        line_file: Form of its text file.
        csv: Form of its CSV files.
        cut: Way in which a set without splits is divided.
        files: Names under which each split is published, of which those that are there count. Rows
            then have the column `FILE_NAME`.
        stop: Texts before which a written answer ends.
        max_new_tokens: Largest number of tokens of a written answer.
        numbers: Comparison of numbers.
        group: Field by whose values ``average_f1`` is a mean, such as the question.
        other_folders: Folders in the data directory that count where ``folder`` is not there.
    """

    name: str
    title: str
    kind: Kind
    version: int
    source: str
    license: str
    folder: str
    main_metric: Metric
    labels: tuple[str, ...]
    instruction: str
    templates: tuple[Template, ...]
    text: Template
    shorten: str | None
    delimiters: tuple[str, ...]
    distinct: bool
    substitute: Mapping[re.Pattern[str], str]
    shapes: tuple[Shape, ...]
    hub: Hub | None
    line_file: LineFile | None
    csv: CsvForm
    cut: Cut | None
    files: Mapping[str, tuple[str, ...]]
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 0
    numbers: Numbers = _USUAL_NUMBERS
    group: str | None = None
    other_folders: tuple[str, ...] = ()

    @property
    def is_generated(self) -> bool:
        """Whether its answers are written, whatever the scoring."""
        return self.kind in GENERATED

    def folder_in(self, data_dir: Path) -> Path:
        """The folder of its rows: the first of its names that is there, else the first."""
        folders = [data_dir / name for name in (self.folder, *self.other_folders)]
        return next((folder for folder in folders if folder.is_dir()), folders[0])

    @cached_property
    def template_sha256(self) -> str:
        """The digest of all that makes a prompt and its answers of a row's fields."""
        substitute = [[pattern.pattern, by] for pattern, by in self.substitute.items()]
        patterns = [template.pattern for template in self.templates]
        parts = [self.instruction, patterns, self.delimiters, self.labels, substitute]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def delimiter_after(self, template: Template) -> str:
        """The text between the prompt of a template and the answer."""
        place = self.templates.index(template) if len(self.delimiters) > 1 else 0
        return self.delimiters[place]
