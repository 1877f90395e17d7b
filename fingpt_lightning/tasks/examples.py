"""From a row of a file, in any of its task's shapes, to the texts that a model scores."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from fingpt_lightning.tasks.references import (
    Reference,
    entities_of,
    list_as_text,
    marked_lines,
    reference_of,
    tagged_spans,
    written,
)
from fingpt_lightning.tasks.task import Field, Shape, Task, Template, whole_number
from fingpt_lightning.terminal.messages import listed, nearest
from fingpt_lightning.terminal.shapes import kind_of

Row = Mapping[str, object]

_UNKNOWN_GOLD = ("", "-1")
_ASSISTANT = "assistant"
_ROLES = {
    **{name: name for name in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"},
}
"""The roles of turns, in OpenAI's names and in ShareGPT's."""
_VERBATIM = "gap"
"""The field that keeps its blanks: the text between a prompt in a file and its answer."""
_CONTEXT, _INSTRUCTION = {"context", "target"}, {"instruction", "output"}
_LISTS = ("choices", "contexts", "names", "answer")
"""The fields that may be lists of texts."""


class Turn(NamedTuple):
    """What one side of a conversation says."""

    role: str
    content: str


class Shot(NamedTuple):
    """An example with its answer before the question; the answer has the blank before it."""

    prompt: str
    answer: str


class Example(NamedTuple):
    """One question and its possible answers: ``prefix + prompt + choice`` is a whole text.

    Args:
        prefix: Text that is the same for all examples of a task.
        prompts: Texts after the prefix: one, or one per choice.
        choices: Answers, each with the blank before it.
        gold: Index of the right choice; None where it is not known.
        row: Number of the line of the file, from 1; in a Parquet file and on the hub, of the row.
        text: Text of the row itself.
        spans: First and last character of what may be cut of each prompt where the row is too
            long, None where nothing may; empty for a row of which nothing may be cut.
        message: The prompt as the user's message in a conversation, with what may be cut of it;
            None where that is ``prefix`` and the one of ``prompts``.
        turns: Turns of a conversation, the last of them the assistant's; prompts and choices are
            then empty texts. Every turn of the assistant is an answer.
        shots: Examples before the question.
        reference: Right answer of a kind whose answers are written.
        group: Value of the task's field ``group``.
    """

    prefix: str
    prompts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int | None
    row: int
    text: str
    spans: tuple[tuple[int, int] | None, ...] = ()
    message: tuple[str, tuple[int, int] | None] | None = None
    turns: tuple[Turn, ...] = ()
    shots: tuple[Shot, ...] = ()
    reference: Reference | None = None
    group: str = ""


def examples_of_row(task: Task, row: Row, number: int) -> Iterator[Example | None]:
    """Makes a row's examples; None stands for one with an empty text.

    Blanks around fields are removed, so that no prompt depends on those in a file.

    Raises:
        ValueError: The row lacks a column, or a label, an index or another value is not allowed.
    """
    shape = _shape_of_row(task, row)
    if shape.each is not None:
        for part in _objects(row, shape.each):
            yield from _examples_of_shape(task, shape, {**row, **part}, number)
    else:
        yield from _examples_of_shape(task, shape, row, number)


def _examples_of_shape(task: Task, shape: Shape, row: Row, number: int) -> Iterator[Example | None]:
    if shape.chat is not None:
        yield _conversation(shape.chat, row, number)
        return
    translated = shape.translated_columns
    columns = {
        name: _rendered(shape, name, _column(row, name), translated.get(name, ()))
        for name in shape.columns
    }
    for raw_fields in _expanded(shape, columns):
        fields = {
            name: value if name == _VERBATIM else _tidy(task, value)
            for name, value in raw_fields.items()
        }
        if _translate(shape, fields):
            yield _example(task, fields, number)


def _objects(row: Row, column: str) -> list[Row]:
    values = row[column]
    if not isinstance(values, list | tuple) or not all(isinstance(v, Mapping) for v in values):
        raise ValueError(f"field {column!r} is not a list of objects")
    return list(values)


def _conversation(column: str, row: Row, number: int) -> Example | None:
    """The example of a conversation; None where the assistant says nothing in it."""
    turns = [_turn(f"{column}, turn {i}", turn) for i, turn in enumerate(_objects(row, column), 1)]
    system = row.get("system")
    if isinstance(system, str) and system.strip() and turns and turns[0].role != "system":
        turns.insert(0, Turn("system", system))
    while turns and turns[-1].role != _ASSISTANT:
        turns.pop()  # there is nothing to learn of what nobody answers
    if not any(turn.role == _ASSISTANT and turn.content.strip() for turn in turns):
        return None
    text = next((turn.content for turn in turns if turn.role == "user"), turns[-1].content)
    return Example("", ("",), ("",), 0, number, text, turns=tuple(turns))


def _turn(place: str, turn: Row) -> Turn:
    names = ("role", "content") if "role" in turn else ("from", "value")
    for name in names:
        if name not in turn:
            raise ValueError(f"{place}: no field {name!r}; the fields are {listed(turn)}")
    role, content = (turn[name] for name in names)
    if role not in _ROLES:
        advice = nearest(str(role), _ROLES) or f"; there are {', '.join(_ROLES)}"
        raise ValueError(f"{place}: {names[0]} {role!r} is not known{advice}")
    if isinstance(content, list | tuple):
        content = "".join(_text_part(place, part) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{place}: {names[1]!r} holds {kind_of(content)}, not a text")
    return Turn(_ROLES[str(role)], _text(f"{place}, {names[1]}", content))


def _text_part(place: str, part: object) -> str:
    kind = part.get("type", "text") if isinstance(part, Mapping) else kind_of(part)
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(text, str):
        raise ValueError(f"{place}: a part of kind {kind}; texts alone are read")
    return text


def field_names(task: Task) -> tuple[str, ...]:
    """What the prompts and the text of a task are made of, whatever columns rows have."""
    templates = (*task.templates, task.text)
    return tuple(dict.fromkeys(name for template in templates for name in template.names))


def example_of_fields(task: Task, values: Row, number: int) -> Example | None:
    """Makes the example of a text that has no label yet; None where a field is empty.

    Args:
        task: Task of kind ``labels``, or of one whose answers are written.
        values: Value of each of `field_names`, translated as in the task's files.
        number: Number of the row, for messages.

    Raises:
        ValueError: A value is not allowed.
    """
    shape = task.shapes[0]
    known = {field: tuple(values) for field, values in shape.values.items()}
    forms = {
        name: shape.lists[source]
        for name, source in shape.fields.items()
        if isinstance(source, str) and source in shape.lists
    }
    fields: dict[str, Field] = {}
    for name in field_names(task):
        value = values[name]
        if name in forms and not isinstance(value, str):
            value = list_as_text(name, value, forms[name])
        fields[name] = _tidy(task, _text(name, value, known.get(name, ())))
    fields |= {"label": "", "answer": ""}
    # Of several templates each says what it needs.
    if len(task.templates) == 1 and not all(fields[name] for name in field_names(task)):
        return None
    return _example(task, fields, number) if _translate(task.shapes[0], fields) else None


def _shape_of_row(task: Task, row: Row) -> Shape:
    missing = {}
    for index, shape in enumerate(task.shapes):
        known = _with_first_part(row, shape)
        missing[index] = [name for name in shape.columns if not _has_column(known, name)]
        if not missing[index]:
            return shape
    _refuse_other_layouts(task, row)
    # The message is about the shape that was most likely meant.
    likely = min(missing, key=lambda i: (len(missing[i]), -len(task.shapes[i].columns)))
    name = missing[likely][0]
    advice = nearest(name, row)
    has_none = bool(row) and missing[likely] == list(task.shapes[likely].columns)
    if not advice and len(missing) > 1 and has_none:
        layouts = "; ".join(dict.fromkeys(", ".join(shape.columns) for shape in task.shapes))
        raise ValueError(f"the fields {', '.join(row)} are of none of the layouts {layouts}")
    advice = advice or f"; the fields are {listed(row)}"
    raise ValueError(f"no field {name!r}{advice}")


def _with_first_part(row: Row, shape: Shape) -> Row:
    if shape.each is None:
        return row
    parts = row.get(shape.each)
    first = parts[0] if isinstance(parts, list | tuple) and parts else None
    return {**row, **first} if isinstance(first, Mapping) else row


def _refuse_other_layouts(task: Task, row: Row) -> None:
    """Says what to do with rows to train on that a task to be scored is given.

    Raises:
        ValueError: It is such a row.
    """
    if task.kind == "instructions":
        return
    chat = next((key for key in ("messages", "conversations", "conversation") if key in row), None)
    if chat is not None and isinstance(row[chat], list | tuple):
        raise ValueError(
            f"task {task.name} does not read conversations such as {chat!r}; train on them as task"
            " alpaca or by data.train_files"
        )
    layout = next((names for names in (_CONTEXT, _INSTRUCTION) if names <= row.keys()), None)
    if layout is not None and task.kind in ("choices", "partial"):
        raise ValueError(
            f"rows of {' and '.join(sorted(layout))} have no choices to score, which task"
            f" {task.name} needs; train on them as task alpaca or by data.train_files"
        )


def _has_column(row: Row, name: str) -> bool:
    try:
        _column(row, name)
    except KeyError:
        return False
    return True


def _column(row: Row, name: str) -> object:
    value: object = row
    for key in name.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(name)
        value = value[key]
    return value


def _rendered(shape: Shape, name: str, value: object, known: Collection[str]) -> Field:
    """The value of a column as the shape has it; lists that it renders become texts."""
    if name in shape.lists and not isinstance(value, str):
        return list_as_text(name, value, shape.lists[name])
    return _text_or_texts(name, value, known)


def _text_or_texts(name: str, value: object, known: Collection[str] = ()) -> Field:
    if isinstance(value, list | tuple):
        return tuple(_text(name, item) for item in value)
    return _text(name, value, known)


def _text(name: str, value: object, known: Collection[str] = ()) -> str:
    """A text or number as text, nothing as an empty one.

    Args:
        name: Name of the column, for messages.
        value: Value of the row there.
        known: Values that the task translates, in lower case; other truth values are wrong.

    Raises:
        ValueError: It is none of these.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, bool) and str(value).casefold() in known:
        return str(value)
    if value is not None and not isinstance(value, str) and not is_number:
        raise ValueError(f"field {name!r} holds {kind_of(value)}, not a text")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"field {name!r} holds {value}, which is not a finite number")
    text = "" if value is None else str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = error.start
        raise ValueError(f"field {name!r}: half a surrogate pair at character {place}") from None
    return text


def _expanded(shape: Shape, columns: Mapping[str, Field]) -> Iterator[dict[str, Field]]:
    groups = _parsed(shape, columns)
    known = {**columns, **groups}
    fields = groups | {name: _field(name, source, known) for name, source in shape.fields.items()}
    if shape.spans:
        tokens, tags = (columns[shape.spans[key]] for key in ("tokens", "tags"))
        if isinstance(tokens, str) or isinstance(tags, str) or len(tokens) != len(tags):
            raise ValueError(f"{' and '.join(shape.spans.values())} must be lists of one length")
        for entity, tag in tagged_spans(tokens, tags):
            yield fields | {"text": " ".join(tokens), "entity": entity, "label": tag}
    elif shape.entities:
        tokens, tags = columns[shape.entities.tokens], columns[shape.entities.tags]
        if isinstance(tokens, str) or isinstance(tags, str):
            raise ValueError(f"{' and '.join(shape.entities[:2])} must be lists of one length")
        answer = entities_of(shape.entities, tokens, tags)
        yield fields | {"text": " ".join(tokens), "answer": answer}
    elif shape.marked:
        marks = columns[shape.marked.marks]
        if isinstance(marks, str):
            raise ValueError(f"field {shape.marked.marks!r} is not a list")
        text = _one_text(shape.marked.lines, columns[shape.marked.lines])
        yield fields | {"text": text, "answer": marked_lines(shape.marked, text, marks)}
    elif shape.questions:
        for column, question in shape.questions.items():
            yield fields | {"question": question, "label": _one_text(column, columns[column])}
    else:
        yield fields


def _parsed(shape: Shape, columns: Mapping[str, Field]) -> dict[str, Field]:
    groups: dict[str, Field] = {}
    for column, pattern in shape.parse.items():
        found = pattern.fullmatch(_one_text(column, columns[column]))
        if found is None:
            raise ValueError(f"field {column!r} is not of the form {pattern.pattern!r}")
        groups |= found.groupdict(default="")
    return groups


def _field(
    name: str, source: str | Template | tuple[Template, ...], known: Mapping[str, Field]
) -> Field:
    if isinstance(source, str):
        value = known[source]
        return value if name in _LISTS else _one_text(source, value)
    templates = source if isinstance(source, tuple) else (source,)
    for used in (column for template in templates for column in template.names):
        _one_text(used, known[used])
    texts = tuple(template.render(known) for template in templates)
    return texts if isinstance(source, tuple) else texts[0]


def _one_text(column: str, value: Field) -> str:
    if not isinstance(value, str):
        raise ValueError(f"field {column!r} holds a list, not a text")
    return value


def _tidy(task: Task, value: Field) -> Field:
    if isinstance(value, tuple):
        return tuple(_tidy_text(task, item) for item in value)
    return _tidy_text(task, value)


def _tidy_text(task: Task, text: str) -> str:
    text = text.strip()
    for pattern, replacement in task.substitute.items():
        text = pattern.sub(replacement, text)
    return text


def _translate(shape: Shape, fields: dict[str, Field]) -> bool:
    """Replaces the file's values by the task's own; False where the row is to be dropped."""
    if shape.bins and fields["label"]:
        fields["label"] = _label_of_number(shape.bins, str(fields["label"]))
    for name, values in shape.values.items():
        value = str(fields[name]).casefold()
        value = value if value in values else whole_number(value)
        if value in values:
            own = values[value]
            if own is None:
                return False
            fields[name] = own
        elif name not in ("label", "gold"):
            raise ValueError(f"{name} {fields[name]!r} is none of {', '.join(values)}")
    return True


def _label_of_number(bins: Mapping[str, float], text: str) -> str:
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"score {text!r} is not a number") from None
    for label, bound in bins.items():
        if number < bound:
            return label
    raise ValueError(f"score {text!r} is not a finite number")


def _example(task: Task, fields: dict[str, Field], number: int) -> Example | None:
    versions: list[dict[str, Field]] = [fields]
    if task.kind == "partial":
        versions = [fields | {"context": text} for text in _texts("contexts", fields)]
    template = _first_fitting(task.templates, versions)
    if template is None:
        return None
    prompts = tuple(template.render(version) for version in versions)
    spans = tuple(_own_text_span(task, template, version) for version in versions)
    choices: tuple[str, ...]
    gold: int | None
    reference: Reference | None = None
    match task.kind:
        case "labels":
            choices, gold = task.labels, _gold_label(task, str(fields["label"]))
        case "choices":
            choices = _texts("choices", fields)
            gold = _gold_index(fields, len(choices))
        case "partial":
            choices = (str(fields["continuation"]),) * len(prompts)
            gold = _gold_index(fields, len(choices))
        case "last_word":
            context, _, word = prompts[0].rpartition(" ")
            if not context.strip():
                raise ValueError(f"{word!r} is a single word, with nothing to foretell it by")
            prompts, choices, gold = (context,), (word,), 0
            spans = tuple(span and (span[0], min(span[1], len(context))) for span in spans)
        case "instructions":
            choices, gold = (str(fields["output"]),), 0
        case _:
            reference = reference_of(task, fields)
            # What is not known is not compared with anything: any text stands for it.
            choices = ("" if reference is None else written(reference),)
            gold = None if reference is None else 0
    if not all(choices) and gold is not None:
        return None
    delimiter = str(fields.get(_VERBATIM) or task.delimiter_after(template))
    answers = tuple(delimiter + choice for choice in choices)
    text = task.text.render(fields)
    message = None
    if task.kind == "instructions" and "instruction" in template.names:
        message = _message(fields)
    group = "" if task.group is None else str(fields[task.group])
    return Example(
        task.instruction,
        prompts,
        answers,
        gold,
        number,
        text,
        spans,
        message,
        reference=reference,
        group=group,
    )


def _message(fields: Mapping[str, Field]) -> tuple[str, tuple[int, int] | None]:
    """An instruction with its input as a user says them, and the place of the input."""
    instruction, given = str(fields["instruction"]), str(fields.get("input", ""))
    if not given:
        return instruction, None
    begin = len(instruction) + 2
    return f"{instruction}\n\n{given}", (begin, begin + len(given))


def _own_text_span(
    task: Task, template: Template, fields: Mapping[str, Field]
) -> tuple[int, int] | None:
    """The place of the text that a prompt may lose tokens of."""
    if task.shorten is not None:
        names = [task.shorten]
    elif "input" in template.names:
        names = ["input"]
    else:
        of_text = ["context" if name == "contexts" else name for name in task.text.names]
        names = [name for name in of_text if name in template.names and name != "instruction"]
    if not names:
        return None
    return template.span(fields, max(names, key=lambda name: len(fields.get(name, ""))))


def _first_fitting(
    templates: Sequence[Template], versions: Sequence[Mapping[str, Field]]
) -> Template | None:
    for template in templates:
        if all(version.get(name) for version in versions for name in template.names):
            return template
    return None


def _texts(name: str, fields: Mapping[str, Field]) -> tuple[str, ...]:
    value = fields[name]
    if isinstance(value, str) or len(value) < 2:
        raise ValueError(f"{name} {value!r} is not a list of two texts or more")
    return value


def _gold_label(task: Task, label: str) -> int | None:
    for spelled in (label.casefold(), whole_number(label.casefold())):
        for index, known in enumerate(task.labels):
            if spelled in (known.casefold(), whole_number(known.casefold())):
                return index
    label = whole_number(label)
    if label in _UNKNOWN_GOLD:
        return None
    allowed = ", ".join(task.labels)
    raise ValueError(f"label {label!r} is none of {allowed}{nearest(label, task.labels)}")


def _gold_index(fields: Mapping[str, Field], num_choices: int) -> int | None:
    gold = whole_number(str(fields["gold"]))
    if gold in _UNKNOWN_GOLD:
        return None
    names = fields.get("names", tuple(str(index) for index in range(num_choices)))
    if isinstance(names, str) or len(names) != num_choices:
        raise ValueError(f"names {names!r} are not one for each of the {num_choices} choices")
    names = tuple(map(whole_number, names))
    if gold not in names:
        raise ValueError(f"gold {gold!r} is none of {', '.join(names)}")
    return names.index(gold)
