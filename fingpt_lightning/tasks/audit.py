"""Rows that occur twice: in a split, in two splits of a task, in a training set and a test set.

Two rows are equal where their texts are after normalizing: NFKD without combining marks, no case,
words alone. They overlap where one training row holds a share of ``threshold`` or more of the
evaluated row's word n-grams, each counted once. A row of fewer than n words is one n-gram.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

Words = tuple[str, ...]

NGRAM, THRESHOLD = 8, 0.5
"""The usual settings: half of a row's 8-grams."""
TRAIN = "train"
_WORD = re.compile(r"\w+")
_NUM_EXAMPLES = 3


@dataclass(frozen=True)
class AuditedRows:
    """The texts of one split, one for each row of its file.

    Args:
        task: Name of the task.
        split: Name of the split.
        texts: Text of each row.
        numbers: Number of each row in its file.
        answers: Right answer of each row; None where there is none to compare.
    """

    task: str
    split: str
    texts: Sequence[str]
    numbers: Sequence[int]
    answers: Sequence[str | None]

    @property
    def name(self) -> str:
        """The name in tables."""
        return f"{self.task}/{self.split}"

    @cached_property
    def words(self) -> list[Words]:
        """The normalized words of each text."""
        return [normalized_words(text) for text in self.texts]


class Pair(NamedTuple):
    """A row that occurs twice: its number in either set, and the share of n-grams seen."""

    seen: int
    audited: int
    share: float
    text: str


class Overlap(NamedTuple):
    """What a set of rows shares with the rows seen before it.

    Attributes:
        seen: Name of the rows that were seen first.
        audited: Name of the rows that should be new.
        num_rows: Number of the latter.
        num_equal: Number of them that are equal to one seen.
        num_overlapping: Number of the others that overlap with one seen.
        num_conflicting: Number of the equal ones that have another answer there.
        examples: Some of the pairs, equal ones first.
    """

    seen: str
    audited: str
    num_rows: int
    num_equal: int
    num_overlapping: int
    num_conflicting: int
    examples: tuple[Pair, ...]

    @property
    def num_found(self) -> int:
        """Rows that are equal to one seen or overlap with it."""
        return self.num_equal + self.num_overlapping


def normalized_words(text: str) -> Words:
    """The words of a text, normalized.

    >>> normalized_words("Profit: EUR 13.1 mn")
    ('profit', 'eur', '13', '1', 'mn')
    """
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return tuple(_WORD.findall("".join(x for x in decomposed if not unicodedata.combining(x))))


def overlap(
    seen: AuditedRows, audited: AuditedRows, *, ngram: int = NGRAM, threshold: float = THRESHOLD
) -> Overlap:
    """Finds the audited rows that are among the seen ones.

    Where both are the same object, each row is compared with those before it. Memory grows with
    the n-grams of the audited rows, time with those of both.

    Args:
        seen: Rows that were seen first, such as those of a training set.
        audited: Rows that should be new.
        ngram: Number of words of an n-gram, at least 1.
        threshold: Share of n-grams from which on rows overlap, in (0, 1].

    Raises:
        ValueError: ``ngram`` or ``threshold`` is out of range.
    """
    check_settings(ngram, threshold)
    is_same = seen is audited
    num_grams, by_words, by_gram = [], dict[Words, list[int]](), dict[Words, list[int]]()
    for place, words in enumerate(audited.words):
        grams = _ngrams(words, ngram)
        num_grams.append(len(grams))
        if words:
            by_words.setdefault(words, []).append(place)
        for gram in grams:
            by_gram.setdefault(gram, []).append(place)
    equal: dict[int, int] = {}
    overlapping: dict[int, tuple[float, int]] = {}
    for other, words in enumerate(seen.words):
        for place in by_words.get(words, ()):
            if not is_same or place > other:
                equal.setdefault(place, other)
        shared: Counter[int] = Counter()
        for gram in _ngrams(words, ngram):
            shared.update(by_gram.get(gram, ()))
        for place, count in shared.items():
            share = count / num_grams[place]
            is_new = not is_same or place > other
            if is_new and share >= threshold and share > overlapping.get(place, (0.0, 0))[0]:
                overlapping[place] = share, other
    for place in equal:
        overlapping.pop(place, None)
    answers = [(audited.answers[place], seen.answers[other]) for place, other in equal.items()]
    pairs = [(1.0, other, place) for place, other in equal.items()]
    pairs += sorted(((*found, place) for place, found in overlapping.items()), reverse=True)
    return Overlap(
        seen.name,
        audited.name,
        len(audited.texts),
        len(equal),
        len(overlapping),
        sum(None not in pair and pair[0] != pair[1] for pair in answers),
        tuple(
            Pair(seen.numbers[other], audited.numbers[place], share, audited.texts[place])
            for share, other, place in pairs[:_NUM_EXAMPLES]
        ),
    )


def check_settings(ngram: int, threshold: float) -> None:
    """Refuses settings that are out of range.

    Raises:
        ValueError: One of them is.
    """
    if ngram < 1:
        raise ValueError(f"ngram {ngram} is below 1")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold} is outside (0, 1]")


def pairs_to_audit(splits: Sequence[AuditedRows]) -> list[tuple[AuditedRows, AuditedRows]]:
    """Each split with itself, the splits of a task in pairs, and training rows with all test rows.

    Args:
        splits: Splits of any tasks; those named ``train`` are trained on, whatever the task.

    Returns:
        Pairs of rows seen first and rows that should be new.
    """
    # In order of their use, so that of two splits the one trained on has been seen first.
    ordered = sorted(splits, key=lambda one: one.split != TRAIN)
    pairs = [(one, one) for one in splits]
    for place, one in enumerate(ordered):
        for other in ordered[place + 1 :]:
            is_trained_and_tested = one.split == TRAIN != other.split
            if one.task == other.task or is_trained_and_tested:
                pairs.append((one, other))
    return pairs


def _ngrams(words: Words, size: int) -> set[Words]:
    if not words:
        return set()
    return {words[first : first + size] for first in range(max(1, len(words) - size + 1))}
