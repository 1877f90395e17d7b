"""Numbers in written answers: read, and compared with the right ones.

The rule ``tatqa`` is that of TAT-QA's scorer (https://github.com/NExTplusplus/TAT-QA,
``tatqa_metric.py``), its oddities included, so that figures can be compared with published ones:
``(8,100)`` is not negative there, because of the comma, and a number is rounded to two decimals
before its scale is applied. `read_number` reads numbers as people write them.
"""

import math
import re
import string
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fingpt_lightning.tasks.references import SCALES, Reference, items_of
from fingpt_lightning.tasks.task import Numbers

_FACTORS: dict[str, int | float] = {
    "hundred": 100,
    "thousand": 1_000,
    "million": 1_000_000,
    "billion": 1_000_000_000,
    "percent": 0.01,
}
_UNITS = {
    **_FACTORS,
    **{"%": 0.01, "trillion": 1e12, "k": 1e3, "m": 1e6, "mn": 1e6, "bn": 1e9},
}
_NUMBER = re.compile(
    r"(?<![\w.])(?P<open>\(\s*)?(?P<sign>[-+\u2212]\s?)?[$\u20ac\u00a3\u00a5]?(?P<inner>[-+\u2212(])?"
    r"(?P<digits>\d[\d,]*(?:\.\d+)?|\.\d+)(?P<exponent>e[-+]?\d+\b)?"
    r"(?:\s?(?P<unit>%|(?:percent|hundred|thousand|million|billion|trillion|bn|mn|k|m)\b))?"
    r"(?P<close>\s*\)\s?(?P<after>%)?)?",
    re.IGNORECASE,
)
_MINUS = ("-", "\u2212")
_YES_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
_DECIMALS = 5
"""To which FinQA's scorer rounds what a program gives."""


class NumberFigures(NamedTuple):
    """How well a row is answered.

    Attributes:
        exact_match: 1 where the answer is right by the rule, else 0.
        f1: Overlap of words, by the rule ``tatqa``; of numbers the exact match.
        close_match: 1 where the answer is right or its value deviates by the tolerance at most.
    """

    exact_match: float
    f1: float
    close_match: float


def read_number(text: str) -> float | None:
    """The first number in a text, with its sign, scale and percent; None where there is none.

    A number in parentheses is negative, as in accounts.

    >>> read_number("It fell by (1,647) thousand"), read_number("18.02%"), read_number("Q4")
    (-1647000.0, 0.1802, None)
    """
    found = _NUMBER.search(text)
    if found is None:
        return None
    value = float(found["digits"].replace(",", "") + (found["exponent"] or ""))
    unit = (found["unit"] or found["after"] or "").casefold()
    if not unit and found["close"]:
        # The scale may stand behind the parenthesis.
        word = re.match(r"\s*([a-z]+)", text[found.end() :], re.IGNORECASE)
        unit = word[1].casefold() if word else ""
    value *= _UNITS.get(unit, 1.0)
    is_open = found["open"] is not None or found["inner"] == "("
    signs = ((found["sign"] or "").strip(), found["inner"])
    is_negative = (is_open and found["close"] is not None) or any(sign in _MINUS for sign in signs)
    value = -value if is_negative else value
    # Products with 0.01 would end in 0.18020000000000003.
    return float(f"{value:.12g}") if math.isfinite(value) else None


def number_figures(answer: str, reference: Reference, numbers: Numbers) -> NumberFigures:
    """Compares a written answer with the right one.

    Args:
        answer: Text that was written.
        reference: Right answer.
        numbers: Rule and tolerance.
    """
    if numbers.rule == "value":
        exact, f1 = _same_value(answer, reference.texts[0]), 0.0
    else:
        exact, f1 = tatqa_figures(answer, reference)
    close = exact
    if not close and (right := _right_number(reference)) is not None:
        value = read_number(answer)
        if value is not None:
            close = float(abs(value - right) <= numbers.tolerance * abs(right))
    return NumberFigures(exact, f1, close)


def is_missing(answer: str, reference: Reference, numbers: Numbers) -> bool:
    """Whether there is no answer to read: no text, or no number where the right one is a number."""
    if not answer.strip():
        return True
    if read_number(answer) is not None:
        return False
    if numbers.rule == "value":
        return _YES_NO.match(answer) is None
    return reference.type in ("arithmetic", "count")


def _right_number(reference: Reference) -> float | None:
    """The right answer's value, where it is one number and nothing else."""
    if len(reference.texts) != 1 or not _is_number(reference.texts[0]):
        return None
    text = f"{reference.texts[0]} {reference.scale}".strip()
    return read_number(text)


def _same_value(answer: str, right: str) -> float:
    if yes_no := _YES_NO.match(answer):
        return float(yes_no[1].casefold() == right.casefold())
    value, expected = read_number(answer), read_number(right)
    if value is None or expected is None:
        return 0.0
    return float(round(value, _DECIMALS) == round(expected, _DECIMALS))


def tatqa_figures(answer: str, reference: Reference) -> tuple[float, float]:
    """The exact match and the F1 of TAT-QA's scorer.

    It is given items and a scale, which are read from the text: a last word that is a scale. A
    text without such a word, or one that ends in it by itself, is tried as it stands too; the
    better of both counts, as for the several readings of its own.

    Args:
        answer: Text that was written.
        reference: Right answer.
    """
    gold = _answer_string(reference.texts, reference.scale)
    found = (0.0, 0.0)
    for items, scale in _readings(answer):
        strings = [_answer_string(items, scale)]
        # A fraction may stand for a percentage: 0.2342 for 23.42 percent.
        if len(items) == 1 and not scale and "%" not in items[0] and _is_number(items[0]):
            number = _to_number(items[0])
            strings += [] if number is None else [f"{number:.4f}"]
        for text in strings:
            found = max(found, _match(text, gold))
    exact, f1 = found
    return exact, exact if reference.type in ("arithmetic", "count") else f1


def _readings(answer: str) -> list[tuple[tuple[str, ...], str]]:
    text = answer.strip()
    if not text:
        return []
    found: list[tuple[tuple[str, ...], str]] = [(items_of(text) or (text,), "")]
    found.append(((text,), ""))
    before, _, last = text.rpartition(" ")
    scale = last.rstrip(".").casefold()
    if scale in SCALES and before.strip():
        found.append((items_of(before) or (before,), scale))
        found.append(((before.strip(),), scale))
    return found


_NOT_OF_NUMBERS = str.maketrans("", "", "'\"\\$\u20ac\u00a3\u00a5%(),[]")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _factor(word: str) -> int | float:
    word = word.casefold()
    return next((factor for name, factor in _FACTORS.items() if name in word), 1)


def _is_number(text: str) -> bool:
    """Whether the scorer takes a text for a number: a number, and a scale if anything follows."""
    words = [word for part in text.split() if (word := part.translate(_NOT_OF_NUMBERS))]
    try:
        is_there = bool(words) and not math.isnan(float(words[0]))
    except ValueError:
        return False
    return is_there and (len(words) < 2 or _factor(words[1]) != 1)


def _to_number(text: str) -> int | float | None:
    found = re.search(r"([+-]?\d+(\.\d+)?)|([+-]?\.\d+)", text.translate(_NOT_OF_NUMBERS))
    if found is None or not found[1]:
        return None
    # A whole number stays one: 2019 and 2019.0 are different words.
    value: int | float = float(found[1]) if "." in found[1] else int(found[1])
    if scaled := re.search(r"[\d.]+\s?[a-zA-Z]+", text):
        value *= _factor(scaled[0])
    if re.search(r"\([\d.\s]+\)", text):
        value = -value
    if re.search(r"[\d.\s]+%", text):
        value *= 0.01
    return round(value, 4)


def _answer_string(items: Sequence[str], scale: str) -> str:
    parts = []
    for item in sorted(items):
        number = _to_number(item) if _is_number(item) else None
        if number is None:
            parts.append(f"{item} {scale}" if scale else item)
        elif "%" in item:
            parts.append(f"{number:.4f}")
        else:
            parts.append(f"{round(number, 2) * _factor(scale):.4f}")
    return " ".join(parts)


def _match(answer: str, gold: str) -> tuple[float, float]:
    answer, gold = _normalized(answer), _normalized(gold)
    said, right = set(answer.split()), set(gold.split())
    shared = len(said & right)
    precision = shared / len(said) if said else 1.0
    recall = shared / len(right) if right else 1.0
    f1 = 2 * precision * recall / (precision + recall) if shared or not (said or right) else 0.0
    # As NumPy rounds, which differs from Python's at halves.
    return float(answer == gold), float(np.round(f1, 2))


def _normalized(text: str) -> str:
    parts = []
    for word in text.casefold().split(" "):
        plain = word if _is_number(word) else word.translate(_PUNCTUATION)
        if _is_number(plain):
            plain = str(_to_number(plain))
        parts.append(" ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split()))
    return " ".join(part for part in parts if part)
