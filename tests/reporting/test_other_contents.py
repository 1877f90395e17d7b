"""Whatever stands in the JSON files of runs, sweeps and results, messages are in plain words."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fingpt_lightning.pipeline import Pass, Work, chrome_trace
from fingpt_lightning.reporting.comparison import comparison_page
from fingpt_lightning.reporting.runs import read_folder
from tests.reporting.folders import make_evaluation, make_run, make_sweep
from tests.reporting.test_comparison import make_result

_OTHERS = (None, 3, "x", [3])
_PYTHON = re.compile(
    r"Error|NoneType|'(int|str|list|dict|bool|float)'|object has no|argument|unhashable|subscript"
    r"|iterable|not supported|literal|convert|operand|index|\bNone\b|__"
)


def _keys(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield keys
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(min(len(value), 1)):
            yield from _keys(value[key], (*keys, key))


def _changed(value: Any, keys: tuple[Any, ...]) -> Iterator[Any]:
    """Each way in which the value at some keys is another one, or missing."""
    if not keys:
        yield from _OTHERS
        return
    for other in (*_OTHERS, ...):
        changed = inner = copy.deepcopy(value)
        for key in keys[:-1]:
            inner = inner[key]
        if other is not ...:
            inner[keys[-1]] = other
        elif isinstance(inner, dict):
            del inner[keys[-1]]
        yield changed


def _trace(run: Path) -> Path:
    path = run / "pipeline" / "step_1.json"
    path.parent.mkdir()
    path.write_text(json.dumps(chrome_trace([Pass(0, 0, 0, Work.FORWARD, 0.0, 0.5)])))
    return path


def _cases(folder: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    run = make_run(folder / "run", 2, tasks=["fpb"])
    evaluation, sweep = make_evaluation(folder / "one"), make_sweep(folder / "sweep", 3, 2)
    pair = [make_result(folder / name, seed, 0.9, num_rows=9) for seed, name in enumerate("ab")]
    report, compare = partial(partial, read_folder), partial(comparison_page, pair)
    return {
        "summary": (run / "summary.json", report(run)),
        "evaluation-of-a-run": (run / "eval" / "2" / "results.json", report(run)),
        "trace": (_trace(run), report(run)),
        "results": (evaluation / "results.json", report(evaluation)),
        "predictions": (evaluation / "predictions.jsonl", report(evaluation)),
        "sweep": (sweep / "sweep.json", report(sweep)),
        "compared-results": (pair[1] / "results.json", compare),
        "compared-predictions": (pair[1] / "predictions.jsonl", compare),
    }


@pytest.mark.parametrize(
    "name",
    [
        *("summary", "evaluation-of-a-run", "trace", "results", "predictions", "sweep"),
        *("compared-results", "compared-predictions"),
    ],
)
def test_a_message_names_the_file_and_no_type_of_python(name: str, tmp_path: Path) -> None:
    file, read = _cases(tmp_path)[name]
    read()
    first, *rest = file.read_text().splitlines(keepends=True)
    contents, told = json.loads(first), set()
    for keys in _keys(contents):
        for changed in _changed(contents, keys):
            file.write_text("".join([f"{json.dumps(changed)}\n", *rest]))
            try:
                read()
            except ValueError as error:
                message = str(error).replace(str(tmp_path), "")
                assert not _PYTHON.search(message), (keys, message)
                assert len(message.splitlines()) == 1
                told.add(message)
    assert len(told) > 5
