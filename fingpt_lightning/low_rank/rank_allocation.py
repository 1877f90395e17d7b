"""Ranks from what is asked for: so many parameters in all, or so much of a spectrum.

A size is (in_features, out_features). A layer without a rank is dense.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

from fingpt_lightning.low_rank.rank import resolve_rank

Size = tuple[int, int]
_LEAST_SHARE = 0.25
"""Of the rank that all layers alike would get: what `allocate_ranks` leaves each at least."""


def largest_rank(in_features: int, out_features: int) -> int:
    """The largest rank whose pair is smaller than the dense layer; 0 where none is.

    >>> largest_rank(768, 768), largest_rank(768, 3072), largest_rank(1, 5)
    (383, 614, 0)
    """
    return (in_features * out_features - 1) // (in_features + out_features)


def num_parameters(rank: int | None, in_features: int, out_features: int) -> int:
    """Of a pair, or of the dense layer: the weight without the bias.

    >>> num_parameters(224, 768, 2304), num_parameters(None, 768, 2304)
    (688128, 1769472)
    """
    if rank is None:
        return in_features * out_features
    return rank * (in_features + out_features)


def total_parameters(sizes: Mapping[str, Size], ranks: Mapping[str, int | None]) -> int:
    """Of all layers."""
    return sum(num_parameters(ranks[name], *size) for name, size in sizes.items())


def ranks_at_ratio(sizes: Mapping[str, Size], ratio: float) -> dict[str, int | None]:
    """The ranks of layers that all get the share ``ratio`` of their smaller side."""
    return {name: resolve_rank(ratio, *size) for name, size in sizes.items()}


def ratio_for_parameters(sizes: Mapping[str, Size], target: int) -> float:
    """The one ratio r / min(in, out) with which all layers come nearest to so many parameters.

    Parameters grow with the ratio in steps, one for each rank of each size, and to the left and
    to the right of the target there is one step each: the nearer is taken, of two as near the
    larger.

    Args:
        sizes: Of the layers, by name.
        target: Parameters of all layers together.

    Raises:
        ValueError: Rank 1 everywhere takes more.

    >>> ratio = ratio_for_parameters({"a": (8, 24), "b": (8, 8)}, target=160)
    >>> ranks_at_ratio({"a": (8, 24), "b": (8, 8)}, ratio)
    {'a': 3, 'b': 3}
    """
    smaller = sorted({min(size) for size in sizes.values()})
    # Between two of these the rounded ranks do not change.
    edges = sorted({(k + 0.5) / m for m in smaller for k in range(1, m)})
    bounds = [0.5 / smaller[-1], *edges, 1.0]
    candidates = [(a + b) / 2 for a, b in itertools.pairwise(bounds)] + [1.0]

    def total(ratio: float) -> int:
        return total_parameters(sizes, ranks_at_ratio(sizes, ratio))

    if total(candidates[0]) > target:
        raise ValueError(f"rank 1 everywhere takes {total(candidates[0])}, more than {target}")
    first, last = 0, len(candidates) - 1
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (middle, last) if total(candidates[middle]) <= target else (first, middle)
    gaps = [abs(total(candidates[index]) - target) for index in (first, last)]
    return candidates[first] if gaps[0] < gaps[1] else candidates[last]


def energy_rank(energies: Sequence[float], share: float) -> int:
    """The smallest rank that keeps a share of the squared singular values.

    Args:
        energies: Squared singular values, downwards.
        share: In (0, 1].

    Raises:
        ValueError: ``share`` is out of range.

    >>> energy_rank([6.0, 3.0, 1.0], 0.9), energy_rank([6.0, 3.0, 1.0], 0.91)
    (2, 3)
    """
    if not 0 < share <= 1:
        raise ValueError(f"energy {share} is outside (0, 1]")
    # What is lost, not what is kept: the tail has digits that the sum has not.
    allowed, lost = (1 - share) * math.fsum(energies) * (1 + 1e-12), 0.0
    for rank in range(len(energies), 1, -1):
        lost += energies[rank - 1]
        if lost > allowed:
            return rank
    return 1


def dense_if_not_smaller(rank: int, size: Size) -> int | None:
    """The rank, or None where its pair is not smaller than the dense layer."""
    return rank if rank <= largest_rank(*size) else None


def allocate_ranks(
    energies: Mapping[str, Sequence[float]],
    sizes: Mapping[str, Size],
    target: int,
    least_share: float = _LEAST_SHARE,
) -> dict[str, int | None]:
    """Ranks under one budget, by what each further column is worth.

    A column's worth is its share of its layer's energy over the in + out parameters it takes;
    columns are given out from the worthiest down until no further one fits. First each layer gets
    ``least_share`` of the rank it would have if all were alike: a sum of errors knows nothing of
    a network that breaks at its narrowest layer. A layer whose next column would make its pair as
    large as the dense layer stays dense if the difference fits.

    Args:
        energies: Squared singular values of each layer, downwards; whitened where calibrated.
        sizes: Of the same layers.
        target: Parameters of all layers together.
        least_share: In [0, 1].

    Raises:
        ValueError: Rank 1 everywhere takes more than ``target``, or ``least_share`` is out of
            range.
    """
    if not 0 <= least_share <= 1:
        raise ValueError(f"least_share {least_share} is outside [0, 1]")
    alike = ranks_at_ratio(sizes, ratio_for_parameters(sizes, target))
    ranks: dict[str, int] = {}
    for name, size in sizes.items():
        even = alike[name]
        whole = largest_rank(*size) if even is None else even
        # A layer without a smaller pair costs what it costs: it is dense from the start.
        ranks[name] = min(max(1, math.floor(least_share * whole)), largest_rank(*size))
    left = target - sum(num_parameters(rank or None, *sizes[name]) for name, rank in ranks.items())
    columns = []
    for name, spectrum in energies.items():
        cost, whole_energy = sum(sizes[name]), math.fsum(spectrum) or 1.0
        start, end = ranks[name], largest_rank(*sizes[name])
        columns += [(spectrum[index] / whole_energy / cost, name) for index in range(start, end)]
    columns.sort(key=lambda column: column[0], reverse=True)
    for _, name in columns:
        cost = sum(sizes[name])
        if cost <= left:
            ranks[name] += 1
            left -= cost
    found: dict[str, int | None] = {}
    for name, rank in ranks.items():
        size = sizes[name]
        missing = num_parameters(None, *size) - num_parameters(rank, *size)
        if rank == largest_rank(*size) and (rank == 0 or missing <= left):
            found[name] = None
            left -= missing if rank else 0
        else:
            found[name] = rank
    return found
