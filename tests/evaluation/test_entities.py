import random
from collections.abc import Sequence

import pytest

from fingpt_lightning.evaluation.entities import count, entity, read_entities, token_f1
from fingpt_lightning.tasks.references import entities_of, items_of
from fingpt_lightning.tasks.task import Entities

_TYPES = ("PER", "ORG", "LOC")
_COLUMNS = Entities(
    "tokens", "tags", {f"{place}-{kind}".casefold(): kind for place in "bi" for kind in _TYPES}
    | {"o": None},
)  # fmt: skip
_GOLD = [
    ["B-PER", "I-PER", "O", "B-ORG", "O"], ["O", "O"], ["I-LOC", "I-LOC", "O", "I-PER"],
    ["B-ORG", "B-ORG", "O"],
]  # fmt: skip
_SAID = [
    ["B-PER", "I-PER", "O", "B-LOC", "O"], ["B-PER", "O"], ["I-LOC", "O", "O", "I-PER"],
    ["B-ORG", "I-ORG", "O"],
]  # fmt: skip


def _entities(tags: Sequence[str], row: int) -> list[tuple[str, str]]:
    """As they are written and read again; every token is another one."""
    tokens = [f"w{row}x{place}" for place in range(len(tags))]
    text = "; ".join(entities_of(_COLUMNS, tokens, tags)) or "none"
    return read_entities(text, _TYPES)


def _by_position(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The chunks of tags, as seqeval's ``get_entities`` finds them: type, first and last token."""
    found = set()
    begin, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, own = tag.partition("-")
        if kind and (prefix in ("O", "B") or own != kind):
            found.add((kind, begin, place - 1))
            kind = ""
        if not kind and prefix != "O":
            begin, kind = place, own
    return found


def test_counts_are_seqevals() -> None:
    counts = [
        count(_entities(said, row), _entities(gold, row))
        for row, (gold, said) in enumerate(zip(_GOLD, _SAID, strict=True))
    ]
    hits, predicted, gold = (sum(column) for column in zip(*counts, strict=True))
    # seqeval 1.2.2 gives precision, recall and F1 of 1/3 each, and a support of 6.
    assert (hits, predicted, gold) == (2, 6, 6)


def test_counts_are_those_of_positions() -> None:
    chance = random.Random(3)
    tags = ["O", "O", "O", *(f"{place}-{kind}" for place in "BI" for kind in _TYPES)]
    for row in range(200):
        gold = [chance.choice(tags) for _ in range(9)]
        said = [tag if chance.random() < 0.7 else chance.choice(tags) for tag in gold]
        right, listed = _by_position(gold), _by_position(said)
        expected = (len(right & listed), len(listed), len(right))
        assert count(_entities(said, row), _entities(gold, row)) == expected, (gold, said)


def test_an_entity_listed_twice_counts_once() -> None:
    ann = entity("Ann, PER", _TYPES)
    assert count([ann, ann], [ann]) == (1, 2, 1)
    assert count([ann, ann], [ann, ann, ann]) == (2, 2, 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ann, PER", [("ann", "PER")]),
        ("Ann , per ;Foo, Inc., ORG.", [("ann", "PER"), ("foo, inc.", "ORG")]),
        ("none", []),
        ("Ann", [("ann", "?")]),
        ("Ann, planet", [("ann, planet", "?")]),
        (", PER", [(", per", "?")]),
    ],
)
def test_lists_are_read(text: str, expected: list[tuple[str, str]]) -> None:
    assert read_entities(text, _TYPES) == expected


def test_spans_without_types_are_compared_by_their_words() -> None:
    assert read_entities("Net  Sales; costs", ()) == [("net sales", ""), ("costs", "")]


def test_token_f1_counts_words_as_often_as_they_occur() -> None:
    gold = [entity(item, _TYPES) for item in items_of("Bank of Foo, ORG; Ann, PER")]
    said = [entity(item, _TYPES) for item in items_of("Foo, ORG; Foo, ORG; Ann, ORG")]
    assert token_f1(said, gold) == pytest.approx(2 * 2 / (3 + 4))
    assert token_f1([], []) == 1
    assert token_f1([], gold) == 0
