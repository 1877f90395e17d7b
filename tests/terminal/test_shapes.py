import re
from typing import Any

import pytest

from fingpt_lightning.terminal.shapes import check_shape, kind_of

_SHAPE = {
    "n": float,
    "name?": str | None,
    "tasks": {"*": {"labels?": [str], "span?": (float, float)}},
}
_TASK = "tasks.fpb"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "it holds nothing, not an object"),
        ([], "it holds a list, not an object"),
        ({"tasks": {}}, "'n' is missing"),
        ({"n": "1", "tasks": {}}, "'n' holds a text, not a number"),
        ({"n": True, "tasks": {}}, "'n' holds true, not a number"),
        ({"n": 1, "name": [], "tasks": {}}, "'name' holds a list, not a text or nothing"),
        ({"n": 1, "tasks": {"fpb": 3}}, f"'{_TASK}' holds a number, not an object"),
        (
            {"n": 1, "tasks": {"fpb": {"labels": {}}}},
            f"'{_TASK}.labels' holds an object, not a list",
        ),
        (
            {"n": 1, "tasks": {"fpb": {"labels": ["a", None]}}},
            f"'{_TASK}.labels.1' holds nothing, not a text",
        ),
        ({"n": 1, "tasks": {"fpb": {"span": [1]}}}, f"'{_TASK}.span' has 1 values, not 2"),
    ],
    ids=str,
)
def test_a_value_of_another_kind_is_named_by_its_keys(found: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^a.json: {re.escape(message)}$"):
        check_shape(found, _SHAPE, "a.json")


def test_what_fits_passes_with_keys_that_no_shape_names() -> None:
    check_shape({"n": 1, "name": None, "tasks": {}, "more": object()}, _SHAPE, "a.json")
    check_shape({"n": 0.5, "tasks": {"fpb": {"labels": [], "span": [0, 1.5]}}}, _SHAPE, "a.json")


def test_kinds_are_words_and_no_names_of_types() -> None:
    values: list[Any] = [None, False, 3, 1.5, "a", b"a", [1], (1,), {}]
    assert [kind_of(one) for one in values] == [
        *("nothing", "false", "a number", "a number", "a text", "bytes", "a list", "a list"),
        "an object",
    ]
