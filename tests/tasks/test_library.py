import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fingpt_lightning.tasks import find_task, task_names
from tests.tasks.sample_rows import only_example

_ROOT = Path(__file__).parents[2]
_OWN: dict[str, Any] = {
    "version": 1,
    "title": "Guidance of a quarter",
    "kind": "labels",
    "source": "our own desk",
    "license": "private",
    "main_metric": "macro_f1",
    "labels": ["down", "up"],
    "instruction": "Where does the guidance point?\n",
    "template": "{text}\nAnswer:",
    "shapes": [{"fields": {"text": "body", "label": "direction"}}],
}


def _write(
    folder: Path, changes: dict[str, object] | None = None, name: str = "guidance.yaml"
) -> Path:
    """Writes a task; a change to None leaves the key out."""
    merged = _OWN | (changes or {})
    contents = {key: value for key, value in merged.items() if value is not None}
    path = folder / name
    path.write_text(yaml.safe_dump(contents, sort_keys=False))
    return path


def test_the_shipped_tasks_are_there() -> None:
    assert task_names() == [
        *("alpaca", "arc_challenge", "arc_easy", "boolq", "cfa", "convfinqa"),
        *("credit_australian", "credit_german", "ectsum", "edtsum", "fin_ner", "fin_ner_types"),
        *("finer139", "finer_ord", "finqa", "fiqa_sa", "fiqa_sa_fingpt", "fiqa_sa_pixiu", "fnxl"),
        *("fomc", "fpb", "headline", "hellaswag", "lambada", "nwgi", "nwgi7", "openbookqa", "piqa"),
        *("stock_acl18", "stock_bigdata22", "stock_cikm18", "tatqa", "tfns", "winogrande"),
    ]


@pytest.mark.parametrize("name", task_names())
def test_a_shipped_task_loads_and_stands_in_the_docs(name: str) -> None:
    task = find_task(name)
    assert task.name == name
    table = (_ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    (line,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` ")]
    for fact in (task.title, task.kind, task.license, task.source, *task.labels):
        assert fact in line


def test_a_users_file_is_a_task(tmp_path: Path) -> None:
    path = _write(tmp_path)
    example = only_example(path, {"body": "We expect less.", "direction": "Down"})
    assert example.prefix + example.prompts[0] + example.choices[0] == (
        "Where does the guidance point?\nWe expect less.\nAnswer: down"
    )
    assert example.gold == 0
    task = find_task(str(path))
    assert (task.name, task.folder, task.main_metric) == ("guidance", "guidance", "macro_f1")


def test_the_worked_example_of_the_docs_is_a_task(tmp_path: Path) -> None:
    text = (_ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(version: .*?)```", text, re.DOTALL)
    (tmp_path / "guidance.yaml").write_text(block)
    row = {"body": "We raise our outlook.", "direction": 1}
    example = only_example(tmp_path / "guidance.yaml", row)
    assert example.gold is not None
    assert example.choices[example.gold] == " raised"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fbp", "task 'fbp' is neither shipped nor a .yaml file; did you mean fpb?"),
        ("qqqq", "task 'qqqq' is neither shipped nor a .yaml file; there are alpaca, arc_"),
    ],
)
def test_an_unknown_task_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        find_task(name)


def test_a_missing_file_is_told_with_its_neighbour(tmp_path: Path) -> None:
    _write(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"guidnce\.yaml; did you mean guidance\.yaml\?"):
        find_task(tmp_path / "guidnce.yaml")


_FIELDS = {"text": "body", "label": "direction"}
_NUMERIC: dict[str, object] = {
    "kind": "numeric",
    "main_metric": "exact_match",
    "labels": None,
    "shapes": [{"fields": {"text": "body", "answer": "number"}}],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lables": ["a"]}, ": no key 'lables'; did you mean labels?"),
        ({"zzz": 1}, ": no key 'zzz'; there are version, title,"),
        ({"title": None}, ": key 'title' is missing"),
        ({"kind": "label"}, ": kind: 'label' is none of labels, choices, partial, last_word, "
         "instructions, numeric, spans, summary, regression; did you mean labels?"),
        ({"main_metric": "acuracy"}, "; did you mean accuracy?"),
        ({"version": 0}, ": version: a whole number, 1 or above, is needed, not 0"),
        ({"version": True}, "is needed, not True"),
        ({"title": 3}, ": title: a text is needed, not 3"),
        ({"labels": [True, False]}, ": labels: True is not text; write yes, no and numbers in"),
        ({"labels": []}, ": labels: a text or a list of texts is needed, not []"),
        ({"labels": ["up"]}, ": labels: two or more different ones are needed, not ['up']"),
        ({"labels": ["up", "up"]}, ": labels: two or more different ones are needed"),
        ({"kind": "last_word"}, ": labels: a task of kind last_word has none"),
        ({"kind": "choices", "labels": None}, "kind choices needs the field 'choices'"),
        ({"distinct": "often"}, ": distinct: true or false is needed, not 'often'"),
        ({"template": "{txet}"}, ": template: no shape gives the field 'txet'; did you mean text?"),
        ({"text": "{labl}"}, ": text: no shape gives the field 'labl'; did you mean label?"),
        ({"substitute": {"[": ""}}, ": substitute: '[' is not a regular expression"),
        ({"shapes": []}, ": shapes: a list is needed, not []"),
        ({"shapes": [{"feilds": _FIELDS}]}, ": shapes, item 1: no key 'feilds'; did you mean fiel"),
        ({"shapes": [7]}, ": shapes, item 1: keys and values are needed, not 7"),
        ({"shapes": [{"fields": {"text": "a"}}]}, "item 1: a task of kind labels needs the field"),
        ({"shapes": [{"fields": {"label": "a"}}], "text": "x"},
         ": template: no shape gives the field 'text'"),
        ({"shapes": [{"fields": {"label": "a"}}, {"fields": _FIELDS}], "text": "x"},
         ": shapes, item 1: no template does with its fields, label"),
        ({"shapes": [{"fields": _FIELDS, "values": {"label": {0: "dwn"}}}]},
         ": shapes: 'dwn' is none of the labels; did you mean down?"),
        ({"shapes": [{"fields": _FIELDS, "values": {"label": {0: 1.5}}}]},
         "item 1: values: label: 0: a text, a whole number or null is needed, not 1.5"),
        ({"shapes": [{"fields": _FIELDS, "values": {"kind": {"a": "b"}}}]},
         "item 1: no shape gives the field 'kind'"),
        ({"shapes": [{"fields": _FIELDS, "parse": {"x": "("}}]}, "parse: x: '(' is not a regular"),
        ({"shapes": [{"fields": _FIELDS, "bins": {"up": 1.0, "down": 0.0}}]},
         "item 1: bins: the bounds [1.0, 0.0] must rise"),
        ({"shapes": [{"fields": _FIELDS, "bins": {"up": 0, "down": 1}}]},
         "item 1: bins: the last bound must be .inf"),
        ({"shapes": [{"fields": _FIELDS, "bins": {"up": "high"}}]},
         "item 1: bins: up: a number is needed, not 'high'"),
        ({"shapes": [{"spans": {"tokens": "a"}}]}, "item 1: spans: key 'tags' is missing"),
        ({"hub": {"name": "a/b"}}, ": hub: key 'splits' is missing"),
        ({"hub": {"name": "a/b", "splits": {"train": "a", "test": "b"}},
          "cut": {"test_size": 0.5, "seed": 1}}, ": hub: one split is needed"),
        ({"hub": {"name": "a/b", "splits": {"train": "a", "test": "b"}},
          "cut": {"test_size": 0.5, "seed": 1, "splits": ["train", "tset"]}},
         ": cut: hub has no split 'tset'; did you mean test?"),
        ({"main_metric": "exact_match"}, ": main_metric: a task of kind labels has accuracy"),
        ({"main_metric": "average_f1"}, ": main_metric: average_f1 needs the key group"),
        ({"group": "txet"}, ": group: shapes, item 1 gives no field 'txet'; did you mean text"),
        ({"stop": "\n"}, ": stop: a task of kind labels has none"),
        ({"max_new_tokens": 3}, ": max_new_tokens: a task of kind labels has none"),
        ({"numbers": {"rule": "tatqa"}}, ": numbers: a task of kind labels has none"),
        ({"shapes": [{"entities": {"tokens": "a", "tags": "b"}, "fields": {"label": "c"}}]},
         ": shapes, item 1: a task of kind labels reads no entities"),
        ({"shapes": [{"fields": _FIELDS, "lists": {"body": "tabel"}}]},
         "lists: body: 'tabel' is none of table, lines, sentences; did you mean table?"),
        (_NUMERIC | {"numbers": {"rule": "tatq"}}, "'tatq' is none of tatqa, value; did you"),
        (_NUMERIC | {"numbers": {"tolerance": 2}}, "numbers: tolerance: 2.0 is outside (0, 1)"),
        (_NUMERIC | {"stop": ["a", ""]}, ": stop: a text is empty"),
        (_NUMERIC | {"max_new_tokens": 0}, ": max_new_tokens: a whole number, 1 or above, is need"),
        (_NUMERIC | {"group": "text"}, ": group: a task of kind numeric has none"),
        (_NUMERIC | {"labels": ["a", "b"]}, ": labels: a task of kind numeric has none"),
        (_NUMERIC | {"shapes": [{"fields": {"text": "a"}}]}, "numeric needs the field 'answer'"),
        ({"kind": "spans", "main_metric": "entity_f1", "shapes": [{"entities": {
            "tokens": "a", "tags": "b", "types": {"I-UP": "upp"}}}]},
         ": shapes: 'upp' is none of the labels; did you mean up?"),
        ({"cut": {"test_size": 1, "seed": 1}}, ": cut: test_size: 1.0 is outside (0, 1)"),
        ({"line_file": {"names": "a.txt", "separator": "@", "columns": ["body", "direction"]}},
         ": line_file: a cut is needed"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_in_one_line(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = _write(tmp_path, changes)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        find_task(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_yaml_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("version: 1\nlabels: [a\nkind: labels\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: no YAML (")):
        find_task(path)
    path.write_bytes(b"title: \xe4")
    with pytest.raises(ValueError, match="no UTF-8 text at byte"):
        find_task(path)
    path.write_text("title: \x07")
    with pytest.raises(ValueError, match=re.escape(f"{path}:1: no YAML (")):
        find_task(path)


def test_a_tasks_name_is_fit_for_a_logged_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a task is named by its file: a-z, 0-9 and _"):
        find_task(_write(tmp_path, name="My-Task.yaml"))
