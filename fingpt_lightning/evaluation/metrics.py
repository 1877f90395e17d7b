"""Figures of a task from the answers, each with an interval where it is a mean over rows.

Axes: L labels, P = L + 1 predictions (the last is a missing answer), R resamples.
"""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

_NUM_RESAMPLES = 1000
_PERCENTILES = (2.5, 97.5)


class LabelMetrics(NamedTuple):
    """Figures of a task of labels; a missing answer counts as wrong.

    ``macro_f1`` is the mean over the labels that occur, in gold or answers, as in scikit-learn;
    ``confusion`` has a row per gold label, and a last column for missing answers. Intervals hold
    95 % of bootstrap resamples.
    """

    accuracy: float
    macro_f1: float
    weighted_f1: float
    mcc: float
    missing: float
    n: int
    accuracy_interval: tuple[float, float]
    macro_f1_interval: tuple[float, float]
    confusion: list[list[int]]


def label_metrics(
    gold: Sequence[int], predicted: Sequence[int | None], num_labels: int, seed: int = 0
) -> LabelMetrics:
    """Accuracy, F1, Matthews' correlation and confusion.

    Args:
        gold: Index of each row's label, at least one row.
        predicted: Index of each answer's label; None where it names none.
        num_labels: L.
        seed: Seed of the resamples.

    Raises:
        ValueError: There are no rows.
    """
    # Here, since it brings scipy and matplotlib, a seventh of the start of a command that labels.
    from torchmetrics.functional.classification import (
        multiclass_confusion_matrix,
        multiclass_matthews_corrcoef,
    )

    if not gold:
        raise ValueError("no row has a gold label")
    gold_N = torch.tensor(gold)
    predicted_N = torch.tensor([num_labels if p is None else p for p in predicted])
    confusion_PP = multiclass_confusion_matrix(predicted_N, gold_N, num_labels + 1)
    confusion_LP = confusion_PP[:-1].numpy()
    accuracies_R, f1s_R = _resampled(confusion_LP, seed)
    return LabelMetrics(
        accuracy=float(accuracy_of(confusion_LP)),
        macro_f1=float(macro_f1_of(confusion_LP)),
        weighted_f1=float(f1_of(confusion_LP) @ confusion_LP.sum(1) / len(gold)),
        mcc=float(multiclass_matthews_corrcoef(predicted_N, gold_N, num_labels + 1)),
        missing=sum(p is None for p in predicted) / len(gold),
        n=len(gold),
        accuracy_interval=_interval(accuracies_R),
        macro_f1_interval=_interval(f1s_R),
        confusion=confusion_LP.tolist(),
    )


class ChoiceMetrics(NamedTuple):
    """Figures of a task whose rows have choices of their own.

    ``accuracy_norm`` compares log-probabilities per character, as lm-evaluation-harness's
    ``acc_norm``; ``perplexity`` is that of the right answers as words. A figure is None where a
    task does not have it, or where it is too large for a float.
    """

    accuracy: float
    accuracy_interval: tuple[float, float]
    n: int
    accuracy_norm: float | None = None
    perplexity: float | None = None


def choice_metrics(
    gold: Sequence[int],
    predicted: Sequence[int | None],
    scores: Sequence[Sequence[float]],
    choices: Sequence[Sequence[str]],
    seed: int = 0,
) -> ChoiceMetrics:
    """Accuracy, plain and by length; where there is one choice per row, accuracy and perplexity.

    Args:
        gold: Index of each row's right choice, at least one row.
        predicted: Index of each row's most likely choice.
        scores: Log-probability of each choice.
        choices: Texts of the choices.
        seed: Seed of the resamples.

    Raises:
        ValueError: There are no rows.
    """
    if not gold:
        raise ValueError("no row has a gold answer")
    right = [g == p for g, p in zip(gold, predicted, strict=True)]
    num_right = np.random.default_rng(seed).binomial(
        len(right), sum(right) / len(right), _NUM_RESAMPLES
    )
    accuracy, interval = sum(right) / len(right), _interval(num_right / len(right))
    if all(len(own) == 1 for own in choices):
        mean = sum(own[0] for own in scores) / len(scores)
        # Beyond that the exponential is not a finite float.
        perplexity = math.exp(-mean) if -mean < math.log(sys.float_info.max) else None
        return ChoiceMetrics(accuracy, interval, len(right), perplexity=perplexity)
    by_length = [
        [score / len(text.strip()) for score, text in zip(own, texts, strict=True)]
        for own, texts in zip(scores, choices, strict=True)
    ]
    right_norm = [own.index(max(own)) == g for own, g in zip(by_length, gold, strict=True)]
    return ChoiceMetrics(accuracy, interval, len(right), sum(right_norm) / len(right))


def accuracy_of(confusion: Int[np.ndarray, "*R L P"]) -> Float[np.ndarray, "*R"]:
    """The share of rows on the diagonal."""
    hits = np.trace(confusion, axis1=-2, axis2=-1)
    return np.asarray(hits / confusion.sum((-2, -1)))


def f1_of(confusion: Int[np.ndarray, "*R L P"]) -> Float[np.ndarray, "*R L"]:
    """The F1 of each label, 0 where it does not occur."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    return np.asarray(2 * hits / np.maximum(_occurrences(confusion), 1))


def macro_f1_of(confusion: Int[np.ndarray, "*R L P"]) -> Float[np.ndarray, "*R"]:
    """The mean F1 over the labels that occur in gold or answers."""
    num_labels = (_occurrences(confusion) > 0).sum(-1)
    return np.asarray(f1_of(confusion).sum(-1) / num_labels)


def _occurrences(confusion: Int[np.ndarray, "*R L P"]) -> Int[np.ndarray, "*R L"]:
    return np.asarray(confusion.sum(-1) + confusion.sum(-2)[..., :-1])


def _resampled(
    confusion_LP: Int[np.ndarray, "L P"], seed: int
) -> tuple[Float[np.ndarray, "R"], Float[np.ndarray, "R"]]:
    """Drawing rows with replacement draws the cells of the confusion: all resamples at once."""
    num_rows = int(confusion_LP.sum())
    shares = confusion_LP.ravel() / num_rows
    drawn = np.random.default_rng(seed).multinomial(num_rows, shares, _NUM_RESAMPLES)
    drawn_RLP = drawn.reshape(_NUM_RESAMPLES, *confusion_LP.shape)
    return accuracy_of(drawn_RLP), macro_f1_of(drawn_RLP)


def _interval(values_R: Float[np.ndarray, "R"]) -> tuple[float, float]:
    low, high = np.percentile(values_R, _PERCENTILES)
    return float(low), float(high)
