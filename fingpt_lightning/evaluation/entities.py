"""Entities in written lists, counted as seqeval counts those of tagged tokens.

An entity is right where its words and its type are; each right one counts once, so that one that is
listed twice and occurs once is wrong the second time. Lists say not where an entity stands: of two
equal ones in a row, either counts for the other.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fingpt_lightning.tasks.references import entity_of, items_of

Entity = tuple[str, str]
"""The words of an entity, normalized, and its type; without types the type is empty."""

_NO_TYPE = "?"
"""The type of an item that is not a name with a known type: it is an entity that is wrong."""


class Counts(NamedTuple):
    """Entities that are right, that were listed, and that should have been."""

    hits: int
    predicted: int
    gold: int


def read_entities(text: str, types: Sequence[str]) -> list[Entity]:
    """The entities in a written list.

    >>> read_entities("Ann, person; Foo, planet", ["person", "organization"])
    [('ann', 'person'), ('foo, planet', '?')]
    """
    return [entity(item, types) for item in items_of(text)]


def entity(item: str, types: Sequence[str]) -> Entity:
    """The entity that an item of a list names."""
    if not types:
        return _plain(item), ""
    found = entity_of(item, types)
    return (_plain(item), _NO_TYPE) if found is None else (_plain(found[0]), found[1])


def count(predicted: Sequence[Entity], gold: Sequence[Entity]) -> Counts:
    """Counts the entities of one row."""
    hits = Counter(predicted) & Counter(gold)
    return Counts(hits.total(), len(predicted), len(gold))


def count_by_type(
    predicted: Sequence[Entity], gold: Sequence[Entity], types: Sequence[str]
) -> Mapping[str, Counts]:
    """Counts the entities of one row that are of each type."""
    return {
        kind: count([e for e in predicted if e[1] == kind], [e for e in gold if e[1] == kind])
        for kind in types
    }


def token_f1(predicted: Sequence[Entity], gold: Sequence[Entity]) -> float:
    """The F1 of the words of all entities, each as often as it occurs; 1 where both have none.

    >>> token_f1([("bank of foo", "organization")], [("foo", "organization")])
    0.5
    """
    said = Counter(word for words, _ in predicted for word in words.split())
    right = Counter(word for words, _ in gold for word in words.split())
    if not said and not right:
        return 1.0
    return 2 * (said & right).total() / (said.total() + right.total())


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
