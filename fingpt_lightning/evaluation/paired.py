"""Two or more results on the same rows: intervals of figures and differences, McNemar's test.

Every figure here is a function of sums over rows, so that a resample of rows is a vector of counts
and all resamples of all results are one matrix product each. Resamples are shared: a difference is
taken between figures of the same rows.

Axes: N rows, S statistics of a row, R resamples, L labels.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

Row = Mapping[str, Any]
"""A line of ``predictions.jsonl``."""

_NUM_RESAMPLES = 1000
_RESAMPLES_AT_ONCE = 50
_PERCENTILES = (2.5, 97.5)
_FEW_DISCORDANT = 25
"""Below it the chi-squared approximation is not used (Fagerland et al. 2013, section 2)."""


class RowStatistics(NamedTuple):
    """What a figure needs of each row.

    Attributes:
        values: Statistics of the rows, whose sums determine the figure.
        figure: Figure of the sums of any number of resamples, given the number of rows.
    """

    values: Float[np.ndarray, "N S"]
    figure: Callable[[Float[np.ndarray, "*R S"], int], Float[np.ndarray, "*R"]]

    @property
    def value(self) -> float:
        """The figure of all rows."""
        return float(self.figure(self.values.sum(0), len(self.values)))


class McNemar(NamedTuple):
    """McNemar's test that two results are right equally often.

    Attributes:
        only_first: Number of rows that the first result alone has right.
        only_second: Number of rows that the second result alone has right.
        p_value: Probability of counts that differ as much or more if neither is better.
        is_exact: Whether it is the binomial test; else chi-squared with continuity correction.
    """

    only_first: int
    only_second: int
    p_value: float
    is_exact: bool


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Compares which rows two results have right; those that both have right or wrong say nothing.

    Fewer than 25 discordant rows are tested exactly, two-sided.

    Args:
        first: Whether the first result has each row right.
        second: Whether the second result has each row right.

    >>> mcnemar([True] * 6 + [False], [False] * 6 + [False]).p_value
    0.03125
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    total = only_first + only_second
    if total < _FEW_DISCORDANT:
        tail = sum(math.comb(total, k) for k in range(min(only_first, only_second) + 1))
        return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**total), is_exact=True)
    statistic = max(0, abs(only_first - only_second) - 1) ** 2 / total
    # The upper tail of chi-squared with one degree of freedom.
    p_value = math.erfc(math.sqrt(statistic / 2))
    return McNemar(only_first, only_second, p_value, is_exact=False)


def row_statistics(figure: str, rows: Sequence[Row], labels: Sequence[str]) -> RowStatistics | None:
    """What a figure of ``results.json`` needs of each row of ``predictions.jsonl``.

    Args:
        figure: Key of the figure.
        rows: Rows with a known right answer, at least one.
        labels: Labels of the task; empty for other kinds.

    Returns:
        Statistics of the rows; None where the figure is not made of sums over these rows.
    """
    if figure == "missing":
        return _mean([float(row.get("prediction") is None) for row in rows])
    if all(figure in row.get("figures", {}) for row in rows):
        return _mean([float(row["figures"][figure]) for row in rows])
    if figure in _OF_COUNTS and all("counts" in row for row in rows):
        return RowStatistics(np.array([row["counts"] for row in rows], float), _OF_COUNTS[figure])
    if figure in _OF_VALUES and all("values" in row for row in rows):
        return RowStatistics(_value_products(rows), _OF_VALUES[figure])
    if any(key in rows[0] for key in ("figures", "counts", "values")):
        return None
    if figure == "accuracy":
        return _mean([float(_is_right(row)) for row in rows])
    if figure in ("macro_f1", "weighted_f1") and labels:
        macro, weighted = _macro_f1, _weighted_f1
        counts = _label_counts(rows, labels)
        return RowStatistics(counts, macro if figure == "macro_f1" else weighted)
    if figure == "average_f1" and labels:
        return _average_f1(rows, labels)
    if figure == "mcc" and labels:
        return RowStatistics(_confusion_cells(rows, labels), _mcc)
    return None


def is_right(rows: Sequence[Row]) -> list[bool]:
    """Whether each row's answer is the right one."""
    return [_is_right(row) for row in rows]


def intervals(
    compared: Sequence[RowStatistics], seed: int = 0
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """The intervals of a figure of several results, and of its differences from the first.

    They hold 95 % of 1,000 bootstrap resamples of the rows, which all results share.

    Args:
        compared: Statistics of the same rows, of each result.
        seed: Seed of the resamples.

    Returns:
        An interval for each result, and one for the difference of each but the first from the
        first.
    """
    num_rows = len(compared[0].values)
    parts = []
    for weights_RN in _resamples(num_rows, seed):
        parts.append([one.figure(weights_RN @ one.values, num_rows) for one in compared])
    values = [np.concatenate([part[place] for part in parts]) for place in range(len(compared))]
    return (
        [_interval(of_one) for of_one in values],
        [_interval(of_one - values[0]) for of_one in values[1:]],
    )


def _resamples(num_rows: int, seed: int) -> Iterator[Float[np.ndarray, "R N"]]:
    random = np.random.default_rng(seed)
    shares_N = np.full(num_rows, 1 / num_rows)
    for _ in range(0, _NUM_RESAMPLES, _RESAMPLES_AT_ONCE):
        yield random.multinomial(num_rows, shares_N, _RESAMPLES_AT_ONCE).astype(float)


def _interval(values_R: Float[np.ndarray, "R"]) -> tuple[float, float]:
    low, high = np.percentile(values_R, _PERCENTILES)
    return float(low), float(high)


def _is_right(row: Row) -> bool:
    return bool(row["is_right"] if "is_right" in row else row["gold"] == row["prediction"])


def _mean(values: Sequence[float]) -> RowStatistics:
    return RowStatistics(np.array(values, dtype=float)[:, None], _first_over_rows)


def _first_over_rows(sums: np.ndarray, num_rows: int) -> np.ndarray:
    return np.asarray(sums[..., 0] / num_rows)


def _label_counts(rows: Sequence[Row], labels: Sequence[str]) -> Float[np.ndarray, "N S"]:
    """Per label: right answers, gold rows, answers."""
    place = {label.strip(): index for index, label in enumerate(labels)}
    counts_NLC = np.zeros((len(rows), len(labels), 3))
    for number, row in enumerate(rows):
        gold, said = _gold_of(row, place), place.get(row["prediction"])
        counts_NLC[number, gold, 1] = 1
        if said is not None:
            counts_NLC[number, said, 2] = 1
            counts_NLC[number, gold, 0] = said == gold
    return counts_NLC.reshape(len(rows), -1)


def _gold_of(row: Row, place: Mapping[str, int]) -> int:
    if row["gold"] not in place:
        raise ValueError(f"gold {row['gold']!r} is none of {', '.join(place)}")
    return place[row["gold"]]


def _f1_of_labels(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The F1 of each label, and the counts of right answers, gold rows and answers."""
    counts = sums.reshape(*sums.shape[:-1], -1, 3)
    return 2 * counts[..., 0] / np.maximum(counts[..., 1] + counts[..., 2], 1), counts


def _macro_f1(sums: np.ndarray, num_rows: int) -> np.ndarray:
    f1, counts = _f1_of_labels(sums)
    return np.asarray(f1.sum(-1) / (counts[..., 1] + counts[..., 2] > 0).sum(-1))


def _weighted_f1(sums: np.ndarray, num_rows: int) -> np.ndarray:
    f1, counts = _f1_of_labels(sums)
    return np.asarray((f1 * counts[..., 1]).sum(-1) / num_rows)


def _confusion_cells(rows: Sequence[Row], labels: Sequence[str]) -> Float[np.ndarray, "N S"]:
    """The cell of each row in the confusion, in which a missing answer is a label of its own."""
    place = {label.strip(): index for index, label in enumerate(labels)}
    size = len(labels) + 1
    cells = np.zeros((len(rows), size * size))
    for number, row in enumerate(rows):
        said = place.get(row["prediction"], len(labels))
        cells[number, _gold_of(row, place) * size + said] = 1
    return cells


def _mcc(sums: np.ndarray, num_rows: int) -> np.ndarray:
    """Matthews' correlation of several classes; 0 where gold or answers are of one class."""
    size = math.isqrt(sums.shape[-1])
    confusion = sums.reshape(*sums.shape[:-1], size, size)
    of_gold, of_answers = confusion.sum(-1), confusion.sum(-2)
    hits = np.trace(confusion, axis1=-2, axis2=-1)
    product = (of_gold * of_answers).sum(-1)
    norm = (num_rows**2 - (of_gold**2).sum(-1)) * (num_rows**2 - (of_answers**2).sum(-1))
    covariance = hits * num_rows - product
    return np.asarray(np.where(norm > 0, covariance / np.sqrt(np.maximum(norm, 1)), 0.0))


def _average_f1(rows: Sequence[Row], labels: Sequence[str]) -> RowStatistics | None:
    """The mean over groups of the weighted F1 of each; None where rows have no groups."""
    if not all("group" in row for row in rows):
        return None
    groups = {group: place for place, group in enumerate(dict.fromkeys(r["group"] for r in rows))}
    counts_NC = _label_counts(rows, labels)
    values_NGC = np.zeros((len(rows), len(groups), counts_NC.shape[1]))
    values_NGC[np.arange(len(rows)), [groups[row["group"]] for row in rows]] = counts_NC

    def figure(sums: np.ndarray, num_rows: int) -> np.ndarray:
        f1, counts = _f1_of_labels(sums.reshape(*sums.shape[:-1], len(groups), -1))
        num_gold = counts[..., 1].sum(-1)
        of_groups = (f1 * counts[..., 1]).sum(-1) / np.maximum(num_gold, 1)
        # A resample may have no row of a group.
        return np.asarray(of_groups.sum(-1) / np.maximum((num_gold > 0).sum(-1), 1))

    return RowStatistics(values_NGC.reshape(len(rows), -1), figure)


def _precision(sums: np.ndarray, num_rows: int) -> np.ndarray:
    return np.asarray(sums[..., 0] / np.maximum(sums[..., 1], 1))


def _recall(sums: np.ndarray, num_rows: int) -> np.ndarray:
    return np.asarray(sums[..., 0] / np.maximum(sums[..., 2], 1))


def _f1(sums: np.ndarray, num_rows: int) -> np.ndarray:
    return np.asarray(2 * sums[..., 0] / np.maximum(sums[..., 1] + sums[..., 2], 1))


_OF_COUNTS = {"entity_precision": _precision, "entity_recall": _recall, "entity_f1": _f1}
"""Figures of what is right, what was answered and what should have been, over all rows."""


def _value_products(rows: Sequence[Row]) -> Float[np.ndarray, "N S"]:
    """x, y, xx, yy, xy, squared and absolute error of the right value x and the answer y.

    A missing answer counts as the end of the right values' range that is farther from x, so that
    none is gained by not answering.
    """
    x_N = np.array([row["values"][0] for row in rows], dtype=float)
    low, high = x_N.min(), x_N.max()
    far_N = np.where(x_N - low > high - x_N, low, high)
    said = [row["values"][1] for row in rows]
    y_N = np.array([far if y is None else y for y, far in zip(said, far_N, strict=True)], float)
    products = (x_N, y_N, x_N * x_N, y_N * y_N, x_N * y_N, (x_N - y_N) ** 2, np.abs(x_N - y_N))
    return np.stack(products, axis=1)


def _pearson(sums: np.ndarray, num_rows: int) -> np.ndarray:
    """Pearson's correlation; 0 where the right values or the answers are all the same."""
    x, y, xx, yy, xy = (sums[..., place] / num_rows for place in range(5))
    spread = np.sqrt(np.maximum(xx - x * x, 0) * np.maximum(yy - y * y, 0))
    # Rounding of the sums leaves some spread in constant values.
    is_known = spread > 1e-9 * np.sqrt(np.maximum(xx * yy, 1e-300))
    correlation = np.where(is_known, (xy - x * y) / np.where(is_known, spread, 1.0), 0.0)
    return np.asarray(correlation.clip(-1.0, 1.0))


def _rmse(sums: np.ndarray, num_rows: int) -> np.ndarray:
    return np.asarray(np.sqrt(sums[..., 5] / num_rows))


def _mae(sums: np.ndarray, num_rows: int) -> np.ndarray:
    return np.asarray(sums[..., 6] / num_rows)


_OF_VALUES = {"pearson": _pearson, "rmse": _rmse, "mae": _mae}
"""Figures of right values and answers."""
