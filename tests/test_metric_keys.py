"""Writers, readers and docs/metrics.md name the same figures, and `metric_keys` alone spells them.

Keys are compared as they stand in `metric_keys`, with ``TASK`` for the name of a task.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import callbacks as package
from fingpt_lightning import metric_keys
from fingpt_lightning.metric_keys import LOGGED_BY, MEDIA, SUMMARY_FIGURES, TASK
from fingpt_lightning.modules import LanguageModelingModule

_REPOSITORY = Path(__file__).parents[1]
_DOCUMENT = _REPOSITORY / "docs" / "metrics.md"
_SOURCES = ("fingpt_lightning", "callbacks", "benchmarks")
_ALL = {key for keys in (*LOGGED_BY.values(), *MEDIA.values()) for key in keys}
_GROUPS = {key.partition("/")[0] for key in _ALL}
# A key, or the beginning of one that goes on behind a placeholder.
_KEY = re.compile(rf"(?<![\w./-])(?:{'|'.join(sorted(_GROUPS))})/(?:[a-z_]|$)")
# The end of one behind a placeholder.
_NAMES = {key.rpartition("/")[2] for key in _ALL}
_END = re.compile(rf"^/(?:{'|'.join(sorted(_NAMES, key=len, reverse=True))})$")


def _named(text: str | None) -> set[str]:
    return set(re.findall(r"``?([a-z]+/(?:TASK/)?[a-z0-9_]+)``?", text or ""))


def _by_section() -> dict[str, set[str]]:
    parts = re.split(r"^## .*`(?:callbacks\.)?(\w+)`.*$", _DOCUMENT.read_text(), flags=re.M)
    return {name: _named(text) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def test_every_key_is_documented_and_every_documented_key_exists() -> None:
    documented = _by_section()
    assert documented.keys() == LOGGED_BY.keys()
    for name, keys in LOGGED_BY.items():
        media = set(MEDIA.get(name, ()))
        assert documented[name] - media == set(keys), name
        assert len(set(keys)) == len(keys) > 0


def test_the_docstring_of_each_writer_names_its_keys() -> None:
    for name, keys in LOGGED_BY.items():
        writer = getattr(package, name, LanguageModelingModule)
        assert writer.__name__ == name
        promised = _named(writer.__doc__) - set(MEDIA.get(name, ()))
        # What a summary is made of is named too.
        assert promised - {metric_keys.VAL_LOSS} == set(keys) - {metric_keys.VAL_LOSS}, name


def test_keys_are_lower_case_and_of_a_known_shape() -> None:
    for key in _ALL:
        assert re.fullmatch(r"[a-z]+/(?:TASK/)?[a-z][a-z0-9_]*", key), key


def test_no_other_file_spells_out_a_key() -> None:
    files = [path for name in _SOURCES for path in sorted((_REPOSITORY / name).rglob("*.py"))]
    files.remove(_REPOSITORY / "fingpt_lightning" / "metric_keys.py")
    found = [
        f"{path.relative_to(_REPOSITORY)}:{line}: {text!r}"
        for path in files
        for line, text in _spelled_out(path.read_text(encoding="utf-8"))
    ]
    assert len(files) > 150
    assert found == [], "take these from fingpt_lightning.metric_keys"


@pytest.mark.parametrize(
    "source",
    [
        "log('train/loss', 1)",
        "log(f'memory/{part}_mib', 1)",
        "log(f'eval/{task}/accuracy', 1)",
        "log(f'{split}/loss', 1)",
        "log(f'{task}/accuracy_after', 1)",
        "x = {'throughput/mfu': 1}",
        "raise ValueError('metric needs a name, such as {name: val/loss}')",
        "key.startswith('test/')",
        "def f():\n    return 'pipeline/timeline'",
    ],
)
def test_a_key_that_is_spelled_out_is_found(source: str) -> None:
    assert list(_spelled_out(source))


@pytest.mark.parametrize(
    "source",
    [
        '"""The key ``train/loss``."""',
        "class A:\n    '''Logs ``val/loss``.'''",
        "open('texts/train/loss.txt')",
        "f'{folder}/validation.jsonl'",
        "'tokens/s'",
        "f'{data}/fed_text/train.jsonl'",
        "Path('eval')",
        "# train/loss",
    ],
)
def test_what_is_no_key_is_left_alone(source: str) -> None:
    assert list(_spelled_out(source)) == []


def test_every_constant_is_used_by_a_writer_or_a_reader() -> None:
    used: set[str] = set()
    for path in (p for name in _SOURCES for p in (_REPOSITORY / name).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.name != "metric_keys.py":
            used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    values = {name: value for name, value in vars(metric_keys).items() if name.isupper()}
    assert len(values) > 30
    # The memory's parts are read by way of a table, and TEST_* by way of their split.
    by_table = {name for name in values if name.startswith("TEST_")}
    by_table |= {"COMPRESSION_FIGURES", "EVAL_MEDIA", "MEDIA", "SUMMARY_FIGURES"}
    assert sorted(values.keys() - used - by_table) == []


def test_readers_ask_the_summary_for_figures_that_it_has() -> None:
    asked = []
    for path in sorted((_REPOSITORY / "fingpt_lightning" / "reporting").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(attr="get", value=ast.Attribute(attr="summary")),
                    args=[ast.Constant(value=str(figure)), *_],
                ):
                    asked.append(figure)
    assert len(asked) > 5
    assert set(asked) <= set(SUMMARY_FIGURES)


def test_configs_and_sweeps_name_keys_that_exist() -> None:
    found: set[str] = set()
    for folder in ("configs", "sweeps"):
        for path in sorted((_REPOSITORY / folder).rglob("*.yaml")):
            found |= set(_texts(yaml.safe_load(path.read_text(encoding="utf-8"))))
    keys = {text for text in found if text.partition("/")[0] in _GROUPS and "/" in text}
    assert metric_keys.VAL_LOSS in keys
    assert {re.sub(r"^eval/[^/]+/", f"eval/{TASK}/", key) for key in keys} <= _ALL


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _spelled_out(source: str) -> Iterator[tuple[int, str]]:
    """The line and text of each string outside of docstrings that is a key or a part of one."""
    tree = ast.parse(source)
    documents = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    in_templates = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values[1:]
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            is_end = id(node) in in_templates and _END.match(node.value)
            if id(node) not in documents and (_KEY.search(node.value) or is_end):
                yield node.lineno, node.value
