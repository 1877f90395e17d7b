import argparse
from collections.abc import Callable

import pytest

from fingpt_lightning.terminal import numbers

_RANGES: dict[Callable[[str], float], tuple[tuple[str, ...], dict[str, str]]] = {
    numbers.whole_number: (
        ("0", "7", "2147483647"),
        {
            "-1": "-1 is below 0",
            "2147483648": "2147483648 is above 2147483647",
            "1.5": "'1.5' is not a whole number",
            "nan": "'nan' is not a whole number",
            "x": "'x' is not a whole number",
            "": "'' is not a whole number",
        },
    ),
    numbers.positive_int: (("1", "12"), {"0": "0 is below 1", "many": "'many' is not a whole"}),
    numbers.seed: (
        ("0", "4294967295"),
        {"-1": "-1 is below 0", "4294967296": "4294967296 is above 4294967295"},
    ),
    numbers.port: (("0", "65535"), dict.fromkeys(("65536", "-1", "x"), "is not a port from 0 to")),
    numbers.number_above_0: (
        ("0.1", "3", "1e9"),
        {"0": "0 is not above 0", "-1": "-1 is not above 0", "inf": "inf is not a finite number",
         "nan": "nan is not a finite number", "x": "'x' is not a number"},
    ),
    numbers.number_from_0: (("0", "0.5"), {"-1": "-1 is below 0", "nan": "not a finite number"}),
    numbers.share: (
        ("0.1", "1"),
        {"0": "0 is outside (0, 1]", "1.1": "1.1 is outside (0, 1]", "nan": "nan is outside (0, 1]",
         "x": "'x' is not a number"},
    ),
    numbers.share_from_0: (
        ("0", "0.1", "1"),
        {"-0.1": "-0.1 is outside [0, 1]", "1.1": "1.1 is outside [0, 1]",
         "nan": "nan is outside [0, 1]"},
    ),
    numbers.part: (("0.1",), {"0": "0 is outside (0, 1)", "1": "1 is outside (0, 1)"}),
    numbers.rank: (
        ("3", "0.5"),
        {"0": "0 is below 1", "1.5": "1.5 is outside (0, 1]", "-2": "-2 is outside (0, 1]"},
    ),
    numbers.compression: (
        ("1.01", "2.64"),
        {"1": "1 is not above 1 (dense over stored parameters)",
         "0.5": "0.5 is not above 1 (dense over stored parameters)",
         "inf": "inf is not a finite number"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("read", _RANGES)
def test_numbers_in_range_are_taken_and_others_named(read: Callable[[str], float]) -> None:
    taken, refused = _RANGES[read]
    assert [read(text) for text in taken] == [float(text) for text in taken]
    for text, message in refused.items():
        with pytest.raises(argparse.ArgumentTypeError) as error:
            read(text)
        assert message in str(error.value)


def test_a_rank_is_whole_and_its_share_is_not() -> None:
    assert isinstance(numbers.rank("1"), int)
    assert isinstance(numbers.rank("1."), float)
