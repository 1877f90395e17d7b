from pathlib import Path

import pytest

from fingpt_lightning.terminal.yaml_text import MAX_VALUES, parse_yaml


def test_aliases_are_values_as_often_as_they_stand() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x", Path("f.yaml")) == {"a": [1, 2], "b": [1, 2]}


def test_aliases_of_aliases_are_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 12):
        inner = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} [{inner}]")
    with pytest.raises(ValueError, match=rf"f.yaml: with its aliases .* more than {MAX_VALUES:,}"):
        parse_yaml("\n".join(lines), Path("f.yaml"))


@pytest.mark.parametrize("text", ["&a [*a]", "[" * 3000 + "]" * 3000])
def test_what_has_no_bottom_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"f.yaml is nested too deeply"):
        parse_yaml(text, Path("f.yaml"))
