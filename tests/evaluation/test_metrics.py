import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics  # type: ignore[import-untyped]

from fingpt_lightning.evaluation.metrics import (
    accuracy_of,
    choice_metrics,
    f1_of,
    label_metrics,
    macro_f1_of,
)

_PAIRS = st.lists(
    st.tuples(st.integers(0, 3), st.one_of(st.none(), st.integers(0, 3))), min_size=1, max_size=30
)


@given(pairs=_PAIRS)
def test_figures_are_those_of_scikit_learn_with_missing_answers_wrong(
    pairs: list[tuple[int, int | None]],
) -> None:
    gold = [g for g, _ in pairs]
    predicted = [p for _, p in pairs]
    answers = [4 if p is None else p for p in predicted]
    found = label_metrics(gold, predicted, 4)
    occurring = sorted({*gold, *answers} - {4})
    f1 = {
        average: sklearn_metrics.f1_score(
            gold, answers, labels=occurring, average=average, zero_division=0
        )
        for average in ("macro", "weighted")
    }
    assert found.accuracy == pytest.approx(sklearn_metrics.accuracy_score(gold, answers))
    assert found.macro_f1 == pytest.approx(f1["macro"])
    assert found.weighted_f1 == pytest.approx(f1["weighted"])
    if len({*gold, *answers}) > 1:  # scikit-learn warns of a single label
        mcc = sklearn_metrics.matthews_corrcoef(gold, answers)
        assert found.mcc == pytest.approx(mcc, abs=1e-6)
    confusion = sklearn_metrics.confusion_matrix(gold, answers, labels=range(5))
    assert found.confusion == confusion[:4].tolist()
    assert found.missing == predicted.count(None) / len(gold)
    assert found.n == len(gold)


def test_intervals_are_those_of_resampled_rows() -> None:
    generator = np.random.default_rng(1)
    gold = generator.integers(0, 3, 200)
    predicted = np.where(generator.random(200) < 0.6, gold, generator.integers(0, 4, 200))
    answers = [None if p == 3 else int(p) for p in predicted]
    found = label_metrics(gold.tolist(), answers, 3)
    rows = generator.integers(0, 200, (1000, 200))
    accuracies = (gold[rows] == predicted[rows]).mean(1)
    f1s = [
        sklearn_metrics.f1_score(gold[own], predicted[own], labels=range(3), average="macro")
        for own in rows[:400]
    ]
    expected = np.percentile(accuracies, (2.5, 97.5))
    assert found.accuracy_interval == pytest.approx(expected, abs=0.02)
    assert found.macro_f1_interval == pytest.approx(np.percentile(f1s, (2.5, 97.5)), abs=0.02)
    assert label_metrics(gold.tolist(), answers, 3) == found
    assert label_metrics(gold.tolist(), answers, 3, seed=1) != found


def test_figures_of_many_confusions_are_those_of_each() -> None:
    confusions = np.random.default_rng(0).integers(0, 5, (7, 3, 4))
    confusions[0, 1] = 0
    for figure in (accuracy_of, f1_of, macro_f1_of):
        np.testing.assert_allclose(figure(confusions), [figure(own) for own in confusions])


def test_choices_are_compared_whole_and_by_length() -> None:
    found = choice_metrics(
        gold=[1, 0],
        predicted=[0, 0],
        scores=[(-4.0, -5.0), (-1.0, -9.0)],
        choices=[(" abcd", " abcdefghij"), (" ab", " cd")],
    )
    assert (found.accuracy, found.accuracy_norm, found.n) == (0.5, 1.0, 2)
    assert found.accuracy_interval == (0.0, 1.0)
    assert found.perplexity is None


def test_single_choices_have_a_perplexity() -> None:
    found = choice_metrics([0, 0], [0, None], [(np.log(0.5),), (np.log(0.125),)], [("a",), ("b",)])
    assert found.perplexity == pytest.approx(4.0)
    assert (found.accuracy, found.accuracy_norm) == (0.5, None)


def test_no_rows_have_no_figures() -> None:
    with pytest.raises(ValueError, match="no row has a gold label"):
        label_metrics([], [], 3)
    with pytest.raises(ValueError, match="no row has a gold answer"):
        choice_metrics([], [], [], [])
