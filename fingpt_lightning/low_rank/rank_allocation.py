"""Ranks from a target: a number of parameters in all, or a share of a spectrum.

A size is (in_features, out_features). A layer without a rank is dense.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

from fingpt_lightning.low_rank.rank import largest_rank, resolve_rank

Size = tuple[int, int]
_LEAST_SHARE = 0.25
"""Share of the rank of layers all alike that `allocate_ranks` leaves each layer at least."""
LEAST_SHARE_BY_LOSS = 0.5
"""The same for scores of a loss: an expansion to second order holds for small changes alone."""


def num_parameters(rank: int | None, in_features: int, out_features: int) -> int:
    """Parameters of the factors, or of the dense layer: the weight without the bias.

    >>> num_parameters(224, 768, 2304), num_parameters(None, 768, 2304)
    (688128, 1769472)
    """
    if rank is None:
        return in_features * out_features
    return rank * (in_features + out_features)


def total_parameters(sizes: Mapping[str, Size], ranks: Mapping[str, int | None]) -> int:
    """Parameters of all layers."""
    return sum(num_parameters(ranks[name], *size) for name, size in sizes.items())


def ranks_at_ratio(
    sizes: Mapping[str, Size], ratio: float, multiple: int = 1
) -> dict[str, int | None]:
    """The ranks of layers that all get the share ``ratio`` of their smaller side."""
    return {name: resolve_rank(ratio, *size, multiple) for name, size in sizes.items()}


def ratio_for_parameters(sizes: Mapping[str, Size], target: int, multiple: int = 1) -> float:
    """The one ratio r / min(in, out) with which all layers come nearest to so many parameters.

    Parameters grow with the ratio in steps, one for each rank of each size, and to the left and
    to the right of the target there is one step each: the nearer is taken, of two as near the
    larger.

    Args:
        sizes: Sizes of the layers, by name.
        target: Parameters of all layers together.
        multiple: Number whose multiples ranks are rounded to, as in `resolve_rank`.

    Raises:
        ValueError: The lowest ranks take more.

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
        return total_parameters(sizes, ranks_at_ratio(sizes, ratio, multiple))

    if total(candidates[0]) > target:
        least = total(candidates[0])
        raise ValueError(f"rank {multiple} everywhere takes {least}, more than {target}")
    first, last = 0, len(candidates) - 1
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (middle, last) if total(candidates[middle]) <= target else (first, middle)
    gaps = [abs(total(candidates[index]) - target) for index in (first, last)]
    return candidates[first] if gaps[0] < gaps[1] else candidates[last]


def parameters_left(
    sizes: Mapping[str, Size],
    compression: float,
    dense: int,
    fixed: int,
    requested: str,
    hint: str,
    multiple: int = 1,
) -> int:
    """What a total compression leaves for some layers.

    Args:
        sizes: Sizes of the layers, by name.
        compression: All parameters of the dense network over all that are stored.
        dense: All parameters of the dense network.
        fixed: Stored parameters beside these layers.
        requested: The target as it was requested, for the message.
        hint: Way to make the fixed parameters fewer, for the message.
        multiple: Number whose multiples ranks are rounded to, as in `resolve_rank`.

    Raises:
        ValueError: The lowest ranks take more.

    >>> parameters_left({"a": (8, 24)}, 2.0, dense=300, fixed=90, requested="", hint="")
    60
    """
    left = round(dense / compression) - fixed
    lowest = {name: resolve_rank(1, *size, multiple) for name, size in sizes.items()}
    least = total_parameters(sizes, lowest)
    if least > left:
        highest = dense / (fixed + least)
        raise ValueError(
            f"{requested} is out of reach: rank {multiple} everywhere gives {highest:.2f}, for"
            f" {fixed:,} parameters stay as they are; {hint}"
        )
    return left


def energy_rank(energies: Sequence[float], share: float) -> int:
    """The smallest rank that keeps a share of the squared singular values.

    Args:
        energies: Squared singular values, downwards.
        share: Share in (0, 1].

    Raises:
        ValueError: ``share`` is out of range.

    >>> energy_rank([6.0, 3.0, 1.0], 0.9), energy_rank([6.0, 3.0, 1.0], 0.91)
    (2, 3)
    """
    if not 0 < share <= 1:
        raise ValueError(f"energy {share} is outside (0, 1]")
    # The lost part is summed, not the kept one: the tail has digits that the sum has not.
    allowed, lost = (1 - share) * math.fsum(energies) * (1 + 1e-12), 0.0
    for rank in range(len(energies), 1, -1):
        lost += energies[rank - 1]
        if lost > allowed:
            return rank
    return 1


def dense_if_not_smaller(rank: int, size: Size) -> int | None:
    """The rank, or None where its factors are not smaller than the dense layer."""
    return rank if rank <= largest_rank(*size) else None


def allocate_ranks(
    energies: Mapping[str, Sequence[float]],
    sizes: Mapping[str, Size],
    target: int,
    least_share: float = _LEAST_SHARE,
    *,
    is_loss: bool = False,
) -> dict[str, int | None]:
    """Ranks under one budget, by what each further parameter is worth.

    Of each layer the share of its energy that is kept counts, or what is kept of a loss, which is
    one quantity for all layers. For a price per parameter, each layer
    takes the rank, or stays dense, where what it keeps less what it pays is largest: columns worth
    their in + out parameters, and all of them where that is dearer by less than what the rest is
    worth. The price is the lowest that the budget bears, and no other ranks of as many parameters
    keep more; the remainder goes to the columns worth most. Each layer gets at least
    ``least_share`` of the rank it would have if all were
    alike: a sum of errors knows nothing of a network that breaks at its narrowest layer.

    Args:
        energies: Squared singular values of each layer, downwards, whitened where calibrated; or
            scores of a loss in the order in which columns are taken.
        sizes: Sizes of the same layers.
        target: Parameters of all layers together.
        least_share: Share in [0, 1].
        is_loss: Whether the numbers of several layers compare as they are.

    Raises:
        ValueError: Rank 1 everywhere takes more than ``target``, or ``least_share`` is out of
            range.
    """
    if not 0 <= least_share <= 1:
        raise ValueError(f"least_share {least_share} is outside [0, 1]")
    alike = ranks_at_ratio(sizes, ratio_for_parameters(sizes, target))
    layers = [
        _Layer(name, size, energies[name], alike[name], least_share, is_loss)
        for name, size in sizes.items()
    ]
    prices = sorted({worth for layer in layers for worth in layer.worths()}, reverse=True)

    def ranks_at(price: float) -> dict[str, int | None]:
        return {layer.name: layer.rank_at(price) for layer in layers}

    first, last = -1, len(prices)  # every price up to the first is borne, none from the last on
    while last - first > 1:
        middle = (first + last) // 2
        is_borne = total_parameters(sizes, ranks_at(prices[middle])) <= target
        first, last = (middle, last) if is_borne else (first, middle)
    ranks = ranks_at(math.inf if first < 0 else prices[first])
    return _filled(ranks, layers, target - total_parameters(sizes, ranks))


class _Layer:
    """What the ranks of a layer keep and cost.

    Args:
        name: Name of the layer.
        size: Size of the layer.
        energies: Its squared singular values, or scores.
        alike: Its rank if all were alike.
        least_share: Least share of that rank.
        is_loss: Whether they count as they are, in place of their share of the layer's sum.
    """

    def __init__(
        self,
        name: str,
        size: Size,
        energies: Sequence[float],
        alike: int | None,
        least_share: float,
        is_loss: bool,
    ) -> None:
        self.name, self.size, self.column_cost = name, size, sum(size)
        whole = 1.0 if is_loss else math.fsum(energies) or 1.0
        shares = [energy / whole for energy in energies]
        self.kept = list(itertools.accumulate(shares, initial=0.0))
        self.largest = largest_rank(*size)
        even = self.largest if alike is None else alike
        # A layer without smaller factors can only stay dense.
        self.least = min(max(1, math.floor(least_share * even)), self.largest)
        self._falling = falling(shares[self.least : self.largest])

    def worth_of_column(self, index: int) -> float:
        """What is kept per parameter, by the column after so many."""
        return self._falling[index - self.least] / self.column_cost

    def worth_of_rest(self, rank: int) -> float:
        """What is kept per parameter, by all that factors of this rank leave out."""
        missing = num_parameters(None, *self.size) - num_parameters(rank, *self.size)
        return (self.kept[-1] - self.kept[rank]) / max(1, missing)

    def worths(self) -> list[float]:
        """The prices at which the layer takes more or less."""
        ranks = range(self.least, self.largest + 1)
        columns = [self.worth_of_column(rank) for rank in ranks if rank < self.largest]
        return columns + [self.worth_of_rest(rank) for rank in ranks]

    def rank_at(self, price: float) -> int | None:
        """The best rank at a price per parameter; None is dense."""
        if self.largest == 0:
            return None
        low, high = self.least, self.largest
        while low < high:  # columns are worth less and less
            middle = (low + high) // 2
            if self.worth_of_column(middle) >= price:
                low = middle + 1
            else:
                high = middle
        return None if self.worth_of_rest(low) >= price else low


def falling(values: Sequence[float]) -> list[float]:
    """Values that never rise, those of a run that rises replaced by its mean.

    Their sums up to each place are the least concave bound of the sums of the values, which a
    price per column touches at the best ranks alone.

    >>> falling([5.0, 1.0, 3.0, 2.0])
    [5.0, 2.0, 2.0, 2.0]
    """
    runs: list[tuple[float, int]] = []
    for value in values:
        mean, length = value, 1
        while runs and runs[-1][0] < mean:
            before, number = runs.pop()
            mean = (mean * length + before * number) / (length + number)
            length += number
        runs.append((mean, length))
    return [mean for mean, length in runs for _ in range(length)]


def _filled(
    ranks: dict[str, int | None], layers: Sequence[_Layer], left: int
) -> dict[str, int | None]:
    """Spends the rest of a budget on the columns worth most."""
    columns = []
    for layer in layers:
        rank = ranks[layer.name]
        if rank is not None:
            ends = range(rank, layer.largest)
            columns += [(layer.worth_of_column(index), layer) for index in ends]
    columns.sort(key=lambda column: column[0], reverse=True)
    for _, layer in columns:
        rank = ranks[layer.name]
        if rank is not None and layer.column_cost <= left:
            ranks[layer.name] = rank + 1
            left -= layer.column_cost
    for layer in layers:
        if ranks[layer.name] == layer.largest and layer.largest:
            size = layer.size
            missing = num_parameters(None, *size) - num_parameters(layer.largest, *size)
            if missing <= left:
                ranks[layer.name] = None
                left -= missing
    return ranks
