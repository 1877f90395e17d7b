import pytest
from hypothesis import given
from hypothesis import strategies as st

from fingpt_lightning.tasks import find_task
from fingpt_lightning.tasks.task import Template


@given(text=st.text(), other=st.text())
def test_fields_are_put_in_once_and_as_they_are(text: str, other: str) -> None:
    fields = {"a": text, "b": other}
    assert Template("{b}<{a}>{b} {x/y} {}").render(fields) == f"{other}<{text}>{other} {{x/y}} {{}}"


def test_a_template_knows_its_fields_and_can_capitalize() -> None:
    template = Template("{a} {b|capitalize} {a}")
    assert template.names == ("a", "b")
    assert template.render({"a": "x", "b": "the BANK"}) == "x The bank x"


def test_a_list_is_put_in_between_slashes() -> None:
    assert Template("{a}").render({"a": ("x", "y")}) == "x / y"


def test_a_shape_needs_its_columns_and_gives_groups_and_fields() -> None:
    shape = find_task("winogrande").shapes[1]
    assert shape.columns == ("sentence", "option1", "option2", "answer")
    assert shape.gives == ("contexts", "gold", "before", "continuation", "context")


def test_a_column_that_is_taken_apart_may_lend_its_name_to_a_field() -> None:
    assert find_task("fpb").shapes[2].columns == ("context", "target")


def test_tasks_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        find_task("fpb").__setattr__("version", 2)
