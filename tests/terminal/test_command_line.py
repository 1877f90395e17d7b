import argparse

import pytest

from fingpt_lightning.terminal.command_line import OptionParser, WrongOptions, names
from fingpt_lightning.terminal.numbers import positive_int


def _parser() -> OptionParser:
    parser = OptionParser("fingpt test", "Nothing.")
    parser.add_argument("--tasks", type=names)
    parser.add_argument("--limit", type=positive_int)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"))
    return parser


def test_options_are_read() -> None:
    assert _parser().read(["--tasks", "a, b,", "--limit", "3"]).tasks == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limt", "3"], "--limt 3.*did you mean '?--limit"),
        (["--limit", "0"], "0 is below 1"),
        (["--limit", "x"], "'x' is not a whole number"),
        (["--tasks", ","], "no name is given"),
        (["--dtype", "bfloat61"], r"invalid choice: 'bfloat61' \(.*\); did you mean bfloat16\?$"),
        (["--dtype", "x"], r"invalid choice: 'x' \(choose from .*\)$"),
    ],
)
def test_a_wrong_word_is_named(words: list[str], message: str) -> None:
    with pytest.raises(WrongOptions, match=message):
        _parser().read(words)


def test_help_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().read(["--help"])
    assert "usage: fingpt test" in capsys.readouterr().out
    assert issubclass(OptionParser, argparse.ArgumentParser)
