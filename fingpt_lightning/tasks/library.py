"""The shipped tasks and those of a user's own YAML files, checked when they are read."""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

from fingpt_lightning.tasks.row_files import CsvForm, checked_encoding, checked_separator
from fingpt_lightning.tasks.task import (
    FIELDS_OF_KIND,
    GENERATED,
    KINDS,
    LIST_FORMS,
    METRICS,
    METRICS_OF_KIND,
    NUMBER_RULES,
    Cut,
    Entities,
    Hub,
    LineFile,
    Marked,
    Numbers,
    Shape,
    Task,
    Template,
    whole_number,
)
from fingpt_lightning.tasks.yaml_block import YamlBlock, read_yaml
from fingpt_lightning.terminal.messages import nearest

_FOLDER = Path(__file__).parent
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_REQUIRED_KEYS = ("version", "title", "kind", "source", "license", "main_metric", "shapes")
_KEYS = (
    *_REQUIRED_KEYS,
    *("folder", "labels", "instruction", "template", "text", "shorten", "delimiter", "distinct"),
    *("substitute", "hub", "line_file", "csv", "cut", "files"),
    *("stop", "max_new_tokens", "numbers", "group"),
)
_GENERATED_KEYS = ("stop", "max_new_tokens")
_STOP, _MAX_NEW_TOKENS = ("\n",), 64
_SHAPE_KEYS = tuple(field.name for field in fields(Shape))


def task_names() -> list[str]:
    """The tasks that are shipped, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def find_task(name: str | Path) -> Task:
    """Reads a shipped task, or a user's.

    Args:
        name: One of ``task_names()``, or the path of a YAML file.

    Raises:
        ValueError: No such task is shipped, or its file contains something that is not allowed.
        FileNotFoundError: A path does not exist.
    """
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            siblings = [sibling.name for sibling in path.parent.glob("*.y*ml")]
            raise FileNotFoundError(f"task: no file {path}{nearest(path.name, siblings)}")
        return _read_task(path)
    names = task_names()
    if str(name) not in names:
        advice = nearest(str(name), names) or f"; there are {', '.join(names)}"
        raise ValueError(f"task {str(name)!r} is neither shipped nor a .yaml file{advice}")
    return _read_task(_FOLDER / f"{name}.yaml")


def find_scored_task(name: str | Path) -> Task:
    """A task that has right answers, as `find_task` finds it.

    Raises:
        ValueError: No such task is shipped, or it is there to train on.
        FileNotFoundError: A path does not exist.
    """
    task = find_task(name)
    if task.kind == "instructions":
        raise ValueError(f"task {task.name} is there to train on: it has no right answers")
    return task


def find_label_task(name: str | Path) -> Task:
    """A task whose answers are labels, as `find_task` finds it.

    Raises:
        ValueError: No such task is shipped, or it is of another kind.
        FileNotFoundError: A path does not exist.
    """
    task = find_task(name)
    if task.kind != "labels":
        raise ValueError(f"task {task.name} is of kind {task.kind}: it has no labels to give")
    return task


def _read_task(path: Path) -> Task:
    if not _NAME.fullmatch(path.stem):
        raise ValueError(f"{path}: a task is named by its file: a-z, 0-9 and _, a letter first")
    block = read_yaml(path, _KEYS, _REQUIRED_KEYS)
    shapes = tuple(_shape(item) for item in block.blocks("shapes", _SHAPE_KEYS))
    kind = block.word("kind", KINDS)
    folders = block.texts("folder") if "folder" in block else (path.stem,)
    is_generated = kind in GENERATED
    task = Task(
        name=path.stem,
        title=block.text("title"),
        kind=kind,
        version=block.integer("version", 1),
        source=block.text("source"),
        license=block.text("license"),
        folder=folders[0],
        other_folders=folders[1:],
        main_metric=block.word("main_metric", METRICS),
        labels=block.texts("labels") if "labels" in block else (),
        instruction=block.text("instruction", ""),
        templates=_templates(block, "template") if "template" in block else (Template("{text}"),),
        text=Template(block.text("text", "{text}")),
        shorten=block.text("shorten") if "shorten" in block else None,
        delimiters=block.texts("delimiter") if "delimiter" in block else (" ",),
        distinct=block.flag("distinct"),
        substitute=block.replacements("substitute"),
        shapes=shapes,
        hub=_hub(block) if "hub" in block else None,
        line_file=_line_file(block) if "line_file" in block else None,
        csv=_csv(block, shapes),
        cut=_cut(block) if "cut" in block else None,
        files=block.mapping("files", YamlBlock.texts),
        stop=block.texts("stop") if "stop" in block else _STOP if is_generated else (),
        max_new_tokens=(
            block.integer("max_new_tokens", 1)
            if "max_new_tokens" in block
            else _MAX_NEW_TOKENS * is_generated
        ),
        numbers=_numbers(block),
        group=block.text("group") if "group" in block else None,
    )
    if len(task.delimiters) not in (1, len(task.templates)):
        raise block.error("delimiter", f"one is needed, or one for each of {len(task.templates)}")
    _check_labels(task, block)
    _check_fields(task, block)
    _check_kind(task, block)
    return task


def _templates(block: YamlBlock, key: str) -> tuple[Template, ...]:
    return tuple(Template(text) for text in block.texts(key))


def _shape(block: YamlBlock) -> Shape:
    bins = block.mapping("bins", YamlBlock.number)
    if not all(below < above for below, above in pairwise(bins.values())):
        raise block.error("bins", f"the bounds {list(bins.values())} must rise")
    if bins and max(bins.values()) != math.inf:
        raise block.error("bins", "the last bound must be .inf, so that every number has a label")
    spans = block.block("spans", ("tokens", "tags"), ("tokens", "tags") if "spans" in block else ())
    return Shape(
        fields=block.mapping("fields", _field_source),
        parse=block.mapping("parse", YamlBlock.pattern),
        values=block.mapping("values", _values),
        bins=bins,
        questions=block.mapping("questions", YamlBlock.text),
        spans={key: spans.text(key) for key in ("tokens", "tags") if key in spans},
        each=block.text("each") if "each" in block else None,
        chat=block.text("chat") if "chat" in block else None,
        entities=_entities(block) if "entities" in block else None,
        marked=_marked(block) if "marked" in block else None,
        lists=block.mapping("lists", lambda inner, name: inner.word(name, LIST_FORMS)),
    )


def _entities(block: YamlBlock) -> Entities:
    inner = block.block("entities", ("tokens", "tags", "types"), ("tokens", "tags"))
    types = inner.mapping("types", YamlBlock.value) if "types" in inner else {}
    return Entities(
        inner.text("tokens"),
        inner.text("tags"),
        {tag.casefold(): own for tag, own in types.items()},
    )


def _marked(block: YamlBlock) -> Marked:
    inner = block.block("marked", ("lines", "marks"), ("lines", "marks"))
    return Marked(inner.text("lines"), inner.text("marks"))


def _numbers(block: YamlBlock) -> Numbers:
    inner = block.block("numbers", ("rule", "tolerance"))
    rule = inner.word("rule", NUMBER_RULES) if "rule" in inner else Numbers().rule
    tolerance = inner.number("tolerance") if "tolerance" in inner else Numbers().tolerance
    if not 0 < tolerance < 1:
        raise inner.error("tolerance", f"{tolerance} is outside (0, 1)")
    return Numbers(rule, tolerance)


def _field_source(block: YamlBlock, field: str) -> str | Template | tuple[Template, ...]:
    templates = _templates(block, field)
    if block.is_list(field):
        return templates
    return templates[0] if templates[0].names else templates[0].pattern


def _values(block: YamlBlock, field: str) -> dict[str, str | None]:
    return {
        whole_number(value.strip().casefold()): own
        for value, own in block.mapping(field, YamlBlock.value).items()
    }


def _hub(block: YamlBlock) -> Hub:
    optional = ("config", "data_dir", "revision")
    inner = block.block("hub", ("name", "splits", *optional), ("name", "splits"))
    config, data_dir, revision = (inner.text(key) if key in inner else None for key in optional)
    splits = inner.mapping("splits", YamlBlock.text)
    return Hub(inner.text("name"), splits, config, data_dir, revision)


def _line_file(block: YamlBlock) -> LineFile:
    keys = ("names", "separator", "columns")
    inner = block.block("line_file", keys, keys)
    return LineFile(inner.texts("names"), inner.text("separator"), inner.texts("columns"))


def _csv(block: YamlBlock, shapes: Sequence[Shape]) -> CsvForm:
    inner = block.block("csv", ("separator", "encoding", "columns"))
    separator, encoding = None, None
    try:
        if "separator" in inner:
            separator = checked_separator(inner.text("separator"))
        if "encoding" in inner:
            encoding = checked_encoding(inner.text("encoding"))
    except ValueError as error:
        raise block.error("csv", str(error)) from None
    columns = inner.texts("columns") if "columns" in inner else ()
    headers = tuple(frozenset(name.partition(".")[0] for name in shape.columns) for shape in shapes)
    if columns and not any(names <= set(columns) for names in headers):
        raise block.error("csv", f"no shape has the columns {', '.join(columns)} alone")
    return CsvForm(separator, None, encoding, columns, headers)


def _cut(block: YamlBlock) -> Cut:
    inner = block.block("cut", ("test_size", "seed", "splits"), ("test_size", "seed"))
    test_size = inner.number("test_size")
    if not 0 < test_size < 1:
        raise inner.error("test_size", f"{test_size} is outside (0, 1)")
    splits = inner.texts("splits") if "splits" in inner else ()
    return Cut(test_size, inner.integer("seed", 0), splits)


def _check_kind(task: Task, block: YamlBlock) -> None:
    """Refuses keys and metrics that the task's kind does not have."""
    allowed = METRICS_OF_KIND[task.kind]
    if task.main_metric not in allowed:
        raise block.error(
            "main_metric",
            f"a task of kind {task.kind} has {', '.join(allowed)}, not {task.main_metric}"
            f"{nearest(task.main_metric, allowed)}",
        )
    keys = {"numbers": task.kind == "numeric", "group": task.kind == "labels"}
    for key, is_allowed in {**keys, **dict.fromkeys(_GENERATED_KEYS, task.is_generated)}.items():
        if key in block and not is_allowed:
            raise block.error(key, f"a task of kind {task.kind} has none")
    if not all(task.stop) and task.stop:
        raise block.error("stop", "a text is empty")
    if (task.main_metric == "average_f1") > (task.group is not None):
        raise block.error("main_metric", "average_f1 needs the key group, the field it is over")
    if task.group is not None:
        for number, shape in enumerate(task.shapes, start=1):
            if task.group not in shape.gives:
                advice = nearest(task.group, shape.gives)
                raise block.error(
                    "group", f"shapes, item {number} gives no field {task.group!r}{advice}"
                )
    for number, shape in enumerate(task.shapes, start=1):
        if shape.entities is not None and task.kind != "spans":
            raise block.error(
                f"shapes, item {number}", f"a task of kind {task.kind} reads no entities"
            )
        for own in shape.entities.types.values() if shape.entities else ():
            if own is not None and own not in task.labels:
                advice = nearest(own, task.labels)
                raise block.error("shapes", f"{own!r} is none of the labels{advice}")


def _check_labels(task: Task, block: YamlBlock) -> None:
    if task.kind not in ("labels", "spans") and task.labels:
        raise block.error("labels", f"a task of kind {task.kind} has none")
    if task.kind == "labels" and len(set(task.labels)) < max(2, len(task.labels)):
        raise block.error(
            "labels", f"two or more different ones are needed, not {list(task.labels)}"
        )
    for shape in task.shapes:
        given = [*shape.bins, *shape.values.get("label", {}).values()]
        for label in given:
            if label is not None and label not in task.labels:
                advice = nearest(label, task.labels)
                raise block.error("shapes", f"{label!r} is none of the labels{advice}")


def _check_fields(task: Task, block: YamlBlock) -> None:
    if task.line_file and not task.cut:
        raise block.error("line_file", "a cut is needed, since the file holds the whole set")
    if task.hub and task.cut and not task.cut.splits and len(task.hub.splits) != 1:
        raise block.error("hub", "one split is needed, the whole set that is cut")
    for split in task.cut.splits if task.hub and task.cut else ():
        if task.hub and split not in task.hub.splits:
            raise block.error("cut", f"hub has no split {split!r}{nearest(split, task.hub.splits)}")
    given = {name for shape in task.shapes for name in shape.gives}
    for template in task.templates:
        _refuse_unknown_fields(template.names, given, "template", block)
    in_prompts = {name for template in task.templates for name in template.names}
    if task.shorten is not None and task.shorten not in in_prompts:
        advice = nearest(task.shorten, in_prompts)
        raise block.error("shorten", f"no template has the field {task.shorten!r}{advice}")
    for number, shape in enumerate(task.shapes, start=1):
        key = f"shapes, item {number}"
        if shape.chat is not None:
            if task.kind != "instructions":
                raise block.error(key, f"a task of kind {task.kind} does not read chats")
            continue
        for field in FIELDS_OF_KIND[task.kind]:
            if field not in shape.gives:
                raise block.error(key, f"a task of kind {task.kind} needs the field {field!r}")
        _refuse_unknown_fields(task.text.names, shape.gives, "text", block)
        _refuse_unknown_fields(tuple(shape.values), shape.gives, key, block)
        if not any(set(template.names) <= set(shape.gives) for template in task.templates):
            raise block.error(key, f"no template does with its fields, {', '.join(shape.gives)}")


def _refuse_unknown_fields(
    names: Collection[str], given: Collection[str], key: str, block: YamlBlock
) -> None:
    for name in names:
        if name not in given:
            raise block.error(key, f"no shape gives the field {name!r}{nearest(name, given)}")
