import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fingpt_lightning.evaluation.numbers import (
    is_missing,
    number_figures,
    read_number,
    tatqa_figures,
)
from fingpt_lightning.tasks.references import Reference, written
from fingpt_lightning.tasks.task import Numbers

_ROWS = Path(__file__).parents[3] / "shared" / "data" / "tatqa"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", 12), ("-12.5", -12.5), (" +3", 3), ("1,234,567.8", 1234567.8), (".5", 0.5),
        ("(42.7)", -42.7), ("$(8.1m)", -8.1e6), ("($1,647) thousand", -1647000), ("- 3 %", -0.03),
        ("18.02 percent", 0.1802), ("(2.3)%", -0.023), ("(2.3%)", -0.023), ("EUR 13.1 mn", 13.1e6),
        ("$2bn", 2e9), ("1e-3", 0.001), ("\u221212", -12), ("about 3 or 4", 3),
        ("5 million shares", 5e6), ("5 mills", 5), ("yes", None), ("", None), ("Q4", None),
        ("v1.2", None), ("\u00a3nil", None),
    ],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(text: str, number: float | None) -> None:
    assert read_number(text) == number


@given(st.integers(-(10**9), 10**9), st.integers(0, 3))
def test_a_number_with_commas_is_read_whatever_its_size(number: int, decimals: int) -> None:
    value = number / 10**decimals
    assert read_number(f"The answer is {value:,.{decimals}f}.") == pytest.approx(value)


# What TAT-QA's own scorer (tatqa_metric.py) gives for an answer of items and a scale.
_PUBLISHED: list[tuple[str, list[str], str, str, float, float]] = [
    ("arithmetic", ["-63.6"], "million", "-63.6 million", 1.0, 1.0),
    ("arithmetic", ["-63.6"], "million", "-63.6", 0.0, 0.0),
    ("arithmetic", ["-22.26"], "percent", "-22.26%", 1.0, 1.0),
    ("arithmetic", ["-22.26"], "percent", "-0.2226", 1.0, 1.0),
    ("arithmetic", ["-22.26"], "percent", "-22.26 percent", 1.0, 1.0),
    ("arithmetic", ["-1647"], "thousand", "(1,647) thousand", 0.0, 0.0),
    ("arithmetic", ["-1647"], "thousand", "(1647) thousand", 1.0, 1.0),
    ("arithmetic", ["12.35"], "million", "12.3501 million", 1.0, 1.0),
    ("arithmetic", ["12.35"], "percent", "0.1235", 1.0, 1.0),
    ("count", ["3"], "", "3", 1.0, 1.0),
    ("count", ["3"], "", "three", 0.0, 0.0),
    ("span", ["19.0%"], "", "19%", 1.0, 1.0),
    ("span", ["22,201"], "thousand", "22201 thousand", 1.0, 1.0),
    ("span", ["22,201"], "thousand", "$22.201 million", 1.0, 1.0),
    ("span", ["where future recoverability is uncertain."], "", "the future recoverability",
     0.0, 0.57),
    ("multi-span", ["2019", "2018"], "", "2018; 2019", 1.0, 1.0),
    ("multi-span", ["2019", "2018"], "", "2019", 0.0, 0.67),
    ("multi-span", ["19,812", "5,912"], "thousand", "19,812; 5,912 thousand", 1.0, 1.0),
    ("span", ["2019"], "", "2019 and 2018", 0.0, 0.0),
    ("span", ["the Company"], "", "a company", 1.0, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "gold", "scale", "answer", "exact", "f1"), _PUBLISHED)
def test_figures_are_those_of_tat_qas_scorer(
    kind: str, gold: list[str], scale: str, answer: str, exact: float, f1: float
) -> None:
    assert tatqa_figures(answer, Reference(tuple(gold), scale, kind)) == (exact, f1)


@pytest.mark.skipif(not _ROWS.is_dir(), reason="no rows of TAT-QA are there")
def test_every_right_answer_is_right_as_it_is_written() -> None:
    lines = (_ROWS / "validation.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 420
    for row in rows:
        answer = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        gold = Reference(tuple(map(str, answer)), row["scale"], row["answer_type"])
        found = number_figures(f" {written(gold)}", gold, Numbers("tatqa"))
        assert found == (1, 1, 1), row["answer"]
        assert not is_missing(written(gold), gold, Numbers("tatqa"))


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "close"),
    [
        ("0.93464", "0.93464", 1, 1), ("0.934639", "0.93464", 1, 1), ("0.93", "0.93464", 0, 1),
        ("93.464%", "0.93464", 1, 1), ("93.464", "0.93464", 0, 0), ("The ratio is 0.94.",
         "0.93464", 0, 1), ("380", "380.0", 1, 1), ("-0.2", "0.2", 0, 0), ("Yes.", "yes", 1, 1),
        ("no", "yes", 0, 0), ("", "0.5", 0, 0), ("unknown", "0.5", 0, 0), ("0", "0.0", 1, 1),
    ],
)  # fmt: skip
def test_values_are_compared_as_finqa_does_and_within_the_tolerance(
    answer: str, gold: str, exact: int, close: int
) -> None:
    found = number_figures(answer, Reference((gold,)), Numbers("value", 0.01))
    assert (found.exact_match, found.close_match) == (exact, close)


def test_the_tolerance_is_relative_and_only_for_numbers() -> None:
    gold = Reference(("-1647",), "thousand", "arithmetic")
    near = number_figures("(1,650) thousand", gold, Numbers("tatqa", 0.01))
    assert (near.exact_match, near.close_match) == (0, 1)
    assert number_figures("(1,650) thousand", gold, Numbers("tatqa", 0.001)).close_match == 0
    words = Reference(("2019 and 2018",), "", "span")
    assert number_figures("2019", words, Numbers("tatqa")).close_match == 0


@pytest.mark.parametrize(
    ("answer", "kind", "rule", "missing"),
    [
        (" ", "span", "tatqa", True), ("rose", "span", "tatqa", False),
        ("rose", "arithmetic", "tatqa", True), ("rose 3 %", "count", "tatqa", False),
        ("rose", "", "value", True), ("no", "", "value", False), ("3", "", "value", False),
    ],
)  # fmt: skip
def test_an_answer_is_missing_where_nothing_can_be_read(
    answer: str, kind: str, rule: str, missing: bool
) -> None:
    numbers = Numbers("value" if rule == "value" else "tatqa")
    assert is_missing(answer, Reference(("3",), "", kind), numbers) is missing
