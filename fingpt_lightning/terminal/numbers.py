"""Numbers of the command line, by their ranges: types of an option that argparse calls."""

import argparse
import math

_LARGEST = 2**31 - 1
"""What threads, timers and sizes of arrays take for certain."""
_LARGEST_SEED = 2**32 - 1
"""What every generator of random numbers takes."""


def whole_number(text: str) -> int:
    """A whole number of at least 0.

    Raises:
        argparse.ArgumentTypeError: It is not such a number.
    """
    return _whole(text, 0, _LARGEST)


def positive_int(text: str) -> int:
    """A whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: It is not such a number.
    """
    return _whole(text, 1, _LARGEST)


def seed(text: str) -> int:
    """The seed of a generator of random numbers.

    Raises:
        argparse.ArgumentTypeError: It is not such a number.
    """
    return _whole(text, 0, _LARGEST_SEED)


def port(text: str) -> int:
    """The number of a TCP port, or 0.

    Raises:
        argparse.ArgumentTypeError: It is not such a number.
    """
    try:
        return _whole(text, 0, 65535)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535") from None


def number_above_0(text: str) -> float:
    """A finite number above 0.

    Raises:
        argparse.ArgumentTypeError: It is not such a number.
    """
    number = _finite(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def number_from_0(text: str) -> float:
    """A finite number of at least 0.

    Raises:
        argparse.ArgumentTypeError: It is not such a number.
    """
    number = _finite(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def share(text: str) -> float:
    """A number in (0, 1].

    Raises:
        argparse.ArgumentTypeError: It is not such a number.
    """
    number = _number(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is outside (0, 1]")
    return number


def share_from_0(text: str) -> float:
    """A number in [0, 1].

    Raises:
        argparse.ArgumentTypeError: It is not such a number.
    """
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is outside [0, 1]")
    return number


def part(text: str) -> float:
    """A number in (0, 1).

    Raises:
        argparse.ArgumentTypeError: It is not such a number.
    """
    number = _number(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} is outside (0, 1)")
    return number


def rank(text: str) -> int | float:
    """A rank, or with a decimal point the share of the largest one.

    Raises:
        argparse.ArgumentTypeError: It is neither.
    """
    return positive_int(text) if text.isdecimal() else share(text)


def compression(text: str) -> float:
    """How many times as many parameters the dense network has.

    Raises:
        argparse.ArgumentTypeError: It is not a finite number above 1: of 1 nothing gets smaller.
    """
    number = _finite(text)
    if number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 1 (dense over stored parameters)")
    return number


def _whole(text: str, least: int, most: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"{number} is below {least}")
    if number > most:
        raise argparse.ArgumentTypeError(f"{number} is above {most}")
    return number


def _finite(text: str) -> float:
    number = _number(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
