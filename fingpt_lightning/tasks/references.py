"""Right answers of the kinds whose answers are written, and how they are written.

A list is written with `SEPARATOR` between its items, an empty one as `NOTHING`, an entity as
``name, type``, and a number's scale after it: ``12.5 million``. A generated answer is read by the
same rules.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from fingpt_lightning.tasks.task import Entities, Field, ListForm, Marked, Task
from fingpt_lightning.terminal.messages import nearest
from fingpt_lightning.terminal.shapes import kind_of

SEPARATOR, NOTHING = "; ", "none"
SCALES = ("thousand", "million", "billion", "percent")
_OUTSIDE = "O"
_YES_NO = ("yes", "no")


class Reference(NamedTuple):
    """A right answer.

    Args:
        texts: Items of it: one text, or those of a list, which may be empty.
        scale: Scale of its numbers, one of `SCALES` or empty.
        type: Type of the answer, by which figures are shown too; empty where there is none.
    """

    texts: tuple[str, ...]
    scale: str = ""
    type: str = ""


def written(reference: Reference) -> str:
    """The answer as a text, which a model learns to write.

    >>> written(Reference(("2019", "2018"))), written(Reference(("12.5",), "million"))
    ('2019; 2018', '12.5 million')
    """
    text = SEPARATOR.join(reference.texts) or NOTHING
    return f"{text} {reference.scale}" if reference.scale else text


def items_of(text: str) -> tuple[str, ...]:
    """The items of a written list.

    >>> items_of("Ann, person; Bank of Foo, organization"), items_of(" None.")
    (('Ann, person', 'Bank of Foo, organization'), ())
    """
    if text.strip().rstrip(".").casefold() == NOTHING:
        return ()
    return tuple(item for part in text.split(SEPARATOR.strip()) if (item := part.strip()))


def entity_of(item: str, types: Sequence[str]) -> tuple[str, str] | None:
    """An entity's name and type; None where the item is not of that form.

    >>> entity_of("Foo, Inc., Organization", ["person", "organization"])
    ('Foo, Inc.', 'organization')
    """
    name, _, kind = (part.strip() for part in item.rpartition(","))
    known = {one.casefold(): one for one in types}
    found = known.get(kind.rstrip(".").casefold())
    return None if found is None or not name else (name, found)


def reference_of(task: Task, fields: Mapping[str, Field]) -> Reference | None:
    """The right answer in a row's fields; None where it is not known.

    Raises:
        ValueError: It is not of the task's kind.
    """
    answer = fields["answer"]
    kind = str(fields.get("type", ""))
    scale = str(fields.get("scale", "")).casefold()
    if scale and scale not in SCALES:
        raise ValueError(f"scale {scale!r} is none of {', '.join(SCALES)}{nearest(scale, SCALES)}")
    if answer == "" or (answer == () and task.kind != "spans"):
        return None
    match task.kind:
        case "spans":
            texts = items_of(answer) if isinstance(answer, str) else answer
            for item in texts if task.labels else ():
                if entity_of(item, task.labels) is None:
                    types = ", ".join(task.labels)
                    raise ValueError(f"answer {item!r} is not a name, a comma and one of {types}")
        case "numeric":
            texts = (answer,) if isinstance(answer, str) else answer
            if task.numbers.rule == "value" and not (
                len(texts) == 1 and (is_float(texts[0]) or texts[0].casefold() in _YES_NO)
            ):
                raise ValueError(f"answer {answer!r} is neither a number nor yes or no")
        case _:
            if not isinstance(answer, str):
                raise ValueError(f"answer {answer!r} is a list, not one text")
            texts = (answer,)
            if task.kind == "regression" and not is_float(answer):
                raise ValueError(f"answer {answer!r} is not a number")
    return Reference(tuple(texts), scale, kind)


def is_float(text: str) -> bool:
    """Whether a text is a finite number, in decimal digits."""
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text.strip(), re.I) is not None


def entities_of(entities: Entities, tokens: Sequence[str], tags: Sequence[str]) -> tuple[str, ...]:
    """The entities of tagged tokens as written items, in their order.

    Raises:
        ValueError: There are not as many tags as tokens, or a tag is not known.
    """
    if len(tokens) != len(tags):
        raise ValueError(f"{' and '.join(entities[:2])} must be lists of one length")
    found = []
    for name, tag in tagged_spans(tokens, tags):
        if not entities.types:
            found.append(f"{name}, {tag.removeprefix('I-')}")
            continue
        known = tag.casefold()
        if known not in entities.types:
            names = ", ".join(entities.types)
            raise ValueError(f"tag {tag!r} is none of {names}{nearest(known, entities.types)}")
        if (kind := entities.types[known]) is not None:
            found.append(f"{name}, {kind}")
    return tuple(found)


def tagged_spans(tokens: Sequence[str], tags: Sequence[str]) -> list[tuple[str, str]]:
    """The runs of tokens that share a tag other than ``O``, and that tag.

    A tag with ``B-`` begins a run, which the same tag with ``I-`` continues.

    >>> tagged_spans(["Silicon", "Valley", "Bank", "lends"], ["B-ORG", "I-ORG", "I-ORG", "O"])
    [('Silicon Valley Bank', 'I-ORG')]
    """
    num_begun = 0
    keys = []
    for tag in tags:
        num_begun += tag.startswith("B-")
        keys.append(("I-" + tag.removeprefix("B-") if tag.startswith("B-") else tag, num_begun))
    runs = groupby(zip(tokens, keys, strict=True), key=lambda pair: pair[1])
    spans = [(" ".join(token for token, _ in run), tag) for (tag, _), run in runs]
    return [(entity, tag) for entity, tag in spans if tag != _OUTSIDE]


def marked_lines(marked: Marked, text: str, marks: Sequence[str]) -> str:
    """The marked lines of a text, in one line.

    Raises:
        ValueError: There are not as many marks as lines, or one is neither 0 nor 1.
    """
    lines = text.split("\n")
    if len(lines) != len(marks) or not set(marks) <= {"0", "1"}:
        raise ValueError(
            f"field {marked.marks!r} is not a list of 0 or 1 for each of the {len(lines)} lines of"
            f" {marked.lines!r}"
        )
    return " ".join(line.strip() for line, mark in zip(lines, marks, strict=True) if mark == "1")


def list_as_text(name: str, value: object, form: ListForm) -> str:
    r"""A list in a row as a text.

    A table has a line per row and ``" | "`` between cells, in which runs of blanks are one; other
    lists hold texts, or objects with a ``text``, and become lines or one line.

    Args:
        name: Name of the column, for messages.
        value: List, or None.
        form: Form of the text.

    Raises:
        ValueError: It is not such a list.

    >>> list_as_text("table", [["", "2019"], ["Net  sales", 3]], "table")
    ' | 2019\nNet sales | 3'
    """
    items = [] if value is None else value
    if not isinstance(items, list | tuple):
        raise ValueError(f"field {name!r} holds {kind_of(value)}, not a list")
    if form == "table":
        if not all(isinstance(row, list | tuple) for row in items):
            raise ValueError(f"field {name!r} is not a list of rows of cells")
        return "\n".join(" | ".join(_cell(name, cell) for cell in row) for row in items)
    texts = [_cell(name, one.get("text") if isinstance(one, Mapping) else one) for one in items]
    return ("\n" if form == "lines" else " ").join(text for text in texts if text)


def _cell(name: str, value: object) -> str:
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        raise ValueError(f"field {name!r}: {kind_of(value)} is not a text")
    return "" if value is None else " ".join(str(value).split())
