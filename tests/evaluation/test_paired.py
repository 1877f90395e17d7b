import math
import random

import numpy as np
import pytest
from scipy.stats import binomtest  # type: ignore[import-untyped]
from sklearn.metrics import (  # type: ignore[import-untyped]
    f1_score,
    matthews_corrcoef,
)

from fingpt_lightning.evaluation.metrics import label_metrics
from fingpt_lightning.evaluation.paired import (
    Row,
    intervals,
    is_right,
    mcnemar,
    row_statistics,
)

_LABELS = ("down", "flat", "up")


def _rows(seed: int, skill: float, num_rows: int = 211) -> list[Row]:
    """Answers to the same rows whatever the seed; some are missing."""
    golds, chance = random.Random(0), random.Random(seed)
    found: list[Row] = []
    for _ in range(num_rows):
        gold = golds.choice(_LABELS)
        said = gold if chance.random() < skill else chance.choice([*_LABELS, None])
        found.append({"gold": gold, "prediction": said})
    return found


@pytest.mark.parametrize("figure", ["accuracy", "macro_f1", "weighted_f1", "mcc", "missing"])
def test_a_figure_of_rows_is_that_of_the_results(figure: str) -> None:
    rows = _rows(1, 0.6)
    gold = [_LABELS.index(row["gold"]) for row in rows]
    said = [None if row["prediction"] is None else _LABELS.index(row["prediction"]) for row in rows]
    expected = label_metrics(gold, said, len(_LABELS))._asdict()[figure]
    found = row_statistics(figure, rows, _LABELS)
    assert found is not None
    assert found.value == pytest.approx(expected, abs=1e-7)


def test_f1_and_mcc_of_a_resample_are_scikit_learns() -> None:
    rows = _rows(1, 0.6, 29)
    drawn = np.random.default_rng(4).integers(0, len(rows), len(rows))
    weights = np.bincount(drawn, minlength=len(rows)).astype(float)
    gold = [rows[i]["gold"] for i in drawn]
    said = [rows[i]["prediction"] or "missing" for i in drawn]
    labels = sorted({*gold, *said} - {"missing"})
    for figure, expected in {
        "macro_f1": f1_score(gold, said, labels=labels, average="macro", zero_division=0),
        "weighted_f1": f1_score(gold, said, labels=labels, average="weighted", zero_division=0),
        "mcc": matthews_corrcoef(gold, said),
    }.items():
        found = row_statistics(figure, rows, _LABELS)
        assert found is not None
        assert float(found.figure(weights @ found.values, len(rows))) == pytest.approx(expected)


def test_a_figure_that_is_no_sum_over_rows_is_none() -> None:
    assert row_statistics("perplexity", _rows(1, 0.5), _LABELS) is None
    assert row_statistics("macro_f1", _rows(1, 0.5), ()) is None


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (6, 0), (3, 9), (12, 12), (24, 0)])
def test_few_discordant_rows_are_tested_by_the_binomial(counts: tuple[int, int]) -> None:
    first = [True] * counts[0] + [False] * counts[1] + [True, False]
    second = [False] * counts[0] + [True] * counts[1] + [True, False]
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == counts
    assert found.is_exact
    expected = binomtest(counts[0], sum(counts)).pvalue if sum(counts) else 1.0
    assert found.p_value == pytest.approx(expected)


def test_many_discordant_rows_are_tested_by_chi_squared() -> None:
    found = mcnemar([True] * 25 + [False] * 15, [False] * 25 + [True] * 15)
    assert not found.is_exact
    assert found.p_value == pytest.approx(math.erfc(math.sqrt(81 / 40 / 2)))
    assert found.p_value == pytest.approx(binomtest(25, 40).pvalue, abs=0.01)
    assert mcnemar([True] * 13 + [False] * 13, [False] * 13 + [True] * 13).p_value == 1.0


def test_intervals_hold_the_truth_and_differences_are_of_the_same_rows() -> None:
    good, bad = _rows(1, 0.8), _rows(2, 0.4)
    statistics = [row_statistics("accuracy", rows, ()) for rows in (good, bad, good)]
    of_each, of_differences = intervals([one for one in statistics if one is not None])
    share = sum(is_right(good)) / len(good)
    error = math.sqrt(share * (1 - share) / len(good))
    assert of_each[0] == pytest.approx((share - 1.96 * error, share + 1.96 * error), abs=0.02)
    assert of_each[0] == of_each[2]
    low, high = of_differences[0]
    difference = sum(is_right(bad)) / len(bad) - share
    assert low < difference < high < 0
    assert of_differences[1] == (0.0, 0.0), "a result does not differ from itself"


def test_rows_say_themselves_whether_they_are_right() -> None:
    rows: list[Row] = [
        {"gold": "a", "prediction": "a"},
        {"gold": "a", "prediction": "a", "is_right": False},
    ]
    assert is_right(rows) == [True, False]


def test_average_f1_is_the_mean_of_the_weighted_f1_of_each_group() -> None:
    rows = [row | {"group": "ab"[place % 2]} for place, row in enumerate(map(dict, _rows(1, 0.6)))]
    found = row_statistics("average_f1", rows, _LABELS)
    assert found is not None
    expected = []
    for group in "ab":
        own = [row for row in rows if row["group"] == group]
        gold, said = [row["gold"] for row in own], [row["prediction"] or "" for row in own]
        f1 = f1_score(gold, said, labels=list(_LABELS), average="weighted", zero_division=0)
        expected.append(f1)
    assert found.value == pytest.approx(np.mean(expected))
    ((low, high),), _ = intervals([found])
    assert low < found.value < high
    assert row_statistics("average_f1", _rows(1, 0.6), _LABELS) is None
