"""The results of a sweep: its frontier, and which parameters mattered."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_MIN_TRIALS = 4
_NUM_BINS = 3


class Point(NamedTuple):
    """A trial with two objectives; compression above 1 is smaller than the dense baseline."""

    number: int
    compression_ratio: float
    loss: float


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points for which no other has less loss without being larger, the largest model first.

    >>> points = [Point(0, 2.0, 4.0), Point(1, 3.0, 3.9), Point(2, 4.0, 4.5)]
    >>> [point.number for point in frontier(points)]
    [1, 2]
    """
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.compression_ratio, p.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept[::-1]


def importances(trials: Sequence[tuple[Mapping[str, Any], float]]) -> dict[str, float]:
    """How much of the order of the trials each parameter explains alone, the most first.

    Values of the metric become ranks, so that a diverged trial weighs no more than the worst; the
    trials are grouped by the parameter's value, numbers with many values by thirds. The share of
    the variance between the groups, less what groups of that size would explain by chance (epsilon
    squared), is between 0 and 1. Parameters that never change are left out.

    Args:
        trials: Parameters and value of each trial that has one.

    Returns:
        Share of each parameter; nothing for fewer than 4 trials.

    Source: Kelley, An unbiased correlation ratio measure, PNAS 21 (1935).
    """
    if len(trials) < _MIN_TRIALS:
        return {}
    ranks = _ranks([value for _, value in trials])
    names = dict.fromkeys(name for parameters, _ in trials for name in parameters)
    found = {}
    for name in names:
        groups = _groups([parameters.get(name) for parameters, _ in trials])
        if 1 < len(set(groups)) < len(trials):
            found[name] = _epsilon_squared(ranks, groups)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _ranks(values: Sequence[float]) -> list[float]:
    """Places from the least to the most; equal values share the mean of theirs."""
    array = np.asarray(values, dtype=np.float64)
    below = (array[None, :] < array[:, None]).sum(1)
    equal = (array[None, :] == array[:, None]).sum(1)
    return [float(x) for x in below + (equal - 1) / 2]


def _groups(values: Sequence[Any]) -> list[str]:
    distinct = {json.dumps(value, default=str) for value in values}
    are_numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if are_numbers and len(distinct) > max(_NUM_BINS, len(values) // 2):
        edges = np.quantile(np.asarray(values), [i / _NUM_BINS for i in range(1, _NUM_BINS)])
        return [str(int(np.searchsorted(edges, value))) for value in values]
    return [json.dumps(value, default=str) for value in values]


def _epsilon_squared(values: Sequence[float], groups: Sequence[str]) -> float:
    array = np.asarray(values)
    names = np.asarray(groups)
    total = float(((array - array.mean()) ** 2).sum())
    if total == 0:
        return 0.0
    kinds = sorted(set(groups))
    within = sum(float(((array[names == k] - array[names == k].mean()) ** 2).sum()) for k in kinds)
    chance = (len(kinds) - 1) * within / (len(array) - len(kinds))
    return min(1.0, max(0.0, (total - within - chance) / total))
