import itertools
import math
import random
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fingpt_lightning.low_rank.rank import largest_rank, resolve_rank
from fingpt_lightning.low_rank.rank_allocation import (
    Size,
    allocate_ranks,
    energy_rank,
    falling,
    num_parameters,
    ranks_at_ratio,
    ratio_for_parameters,
    total_parameters,
)

_sizes = st.dictionaries(
    st.sampled_from("abcde"), st.tuples(st.integers(2, 12), st.integers(2, 12)), min_size=1
)


@given(size=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_the_largest_rank_is_the_last_that_saves(size: Size) -> None:
    rank, dense = largest_rank(*size), num_parameters(None, *size)
    assert rank == 0 or num_parameters(rank, *size) < dense
    assert num_parameters(rank + 1, *size) >= dense


@given(sizes=_sizes, share=st.floats(0.0, 1.2), multiple=st.sampled_from([1, 1, 2, 3]))
def test_no_ratio_comes_nearer_to_a_number_of_parameters(
    sizes: dict[str, Size], share: float, multiple: int
) -> None:
    lowest = {name: resolve_rank(1, *size, multiple) for name, size in sizes.items()}
    least = total_parameters(sizes, lowest)
    target = max(least, round(share * sum(i * o for i, o in sizes.values())))
    ratio = ratio_for_parameters(sizes, target, multiple)
    gap = abs(total_parameters(sizes, ranks_at_ratio(sizes, ratio, multiple)) - target)
    tried = [(k + d) / m for m in range(2, 13) for k in range(m + 1) for d in (-0.45, 0.45)]
    others = [x for x in tried if 0 < x <= 1]
    assert others
    for other in others:
        ranks = ranks_at_ratio(sizes, other, multiple)
        assert gap <= abs(total_parameters(sizes, ranks) - target), other


def test_fewer_parameters_than_rank_1_are_refused() -> None:
    with pytest.raises(ValueError, match="rank 1 everywhere takes 32, more than 31"):
        ratio_for_parameters({"a": (8, 24)}, 31)
    with pytest.raises(ValueError, match="rank 4 everywhere takes 128, more than 127"):
        ratio_for_parameters({"a": (8, 24)}, 127, multiple=4)


@given(
    energies=st.lists(st.floats(0, 1e6), min_size=1, max_size=20).map(
        lambda x: sorted(x, reverse=True)
    ),
    share=st.floats(0.01, 1.0),
)
def test_the_rank_by_energy_is_the_smallest_that_keeps_it(
    energies: list[float], share: float
) -> None:
    rank, whole = energy_rank(energies, share), math.fsum(energies)
    assert math.fsum(energies[:rank]) >= share * whole * (1 - 1e-9)
    if rank > 1:
        assert math.fsum(energies[: rank - 1]) < share * whole * (1 + 1e-9)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01])
def test_a_share_of_energy_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=rf"energy {share} is outside \(0, 1\]"):
        energy_rank([1.0], share)


@given(
    sizes=_sizes,
    decays=st.lists(st.floats(0.05, 1.0), min_size=5, max_size=5),
    share=st.floats(0.0, 1.1),
    least_share=st.floats(0.0, 1.0),
)
def test_an_allocation_keeps_to_its_budget_and_uses_it(
    sizes: dict[str, Size], decays: list[float], share: float, least_share: float
) -> None:
    energies = {
        name: [decay**k for k in range(min(size))]
        for (name, size), decay in zip(sizes.items(), decays, strict=False)
    }
    least = sum(min(num_parameters(1, *s), num_parameters(None, *s)) for s in sizes.values())
    target = max(least, round(share * sum(i * o for i, o in sizes.values())))
    ranks = allocate_ranks(energies, sizes, target, least_share)
    assert ranks.keys() == sizes.keys()
    for name, rank in ranks.items():
        assert rank is None or 1 <= rank <= largest_rank(*sizes[name])
    spent = total_parameters(sizes, ranks)
    alike = total_parameters(sizes, ranks_at_ratio(sizes, ratio_for_parameters(sizes, target)))
    assert spent <= max(target, alike)
    growing = [
        sum(sizes[n]) for n, r in ranks.items() if r is not None and r < largest_rank(*sizes[n])
    ]
    if growing and spent <= target:
        assert target - spent < min(growing), "another column would have fitted"


def test_columns_go_where_the_spectrum_is_flat() -> None:
    sizes = {"steep": (40, 40), "flat": (40, 40)}
    energies = {"steep": [0.5**k for k in range(40)], "flat": [0.99**k for k in range(40)]}
    ranks = allocate_ranks(energies, sizes, target=80 * 20)
    assert ranks["flat"] is not None
    assert ranks["steep"] is not None
    assert ranks["steep"] < 8 < ranks["flat"]
    assert ranks["steep"] + ranks["flat"] == 20


def test_a_square_layer_becomes_dense_where_its_rest_is_worth_more_than_columns() -> None:
    """The pair of rank 19 takes 1520 of 1600 parameters: the rest is nearly free."""
    sizes = {"square": (40, 40), "wide": (40, 400)}
    energies = {"square": [1.0] * 40, "wide": [0.8**k for k in range(40)]}
    ranks = allocate_ranks(energies, sizes, target=1600 + 440 * 10, least_share=0.1)
    assert ranks == {"square": None, "wide": 10}


def test_the_scale_of_a_layer_changes_nothing() -> None:
    sizes = {"a": (12, 16), "b": (12, 16)}
    energies = {name: [1 / (k + 1) for k in range(12)] for name in sizes}
    energies["b"] = [1e9 * value for value in energies["b"]]
    ranks = allocate_ranks(energies, sizes, target=28 * 7)
    assert sorted(str(rank) for rank in ranks.values()) == ["3", "4"]


def test_no_layer_gets_less_than_its_least_share() -> None:
    sizes = {"steep": (40, 40), "flat": (40, 40)}
    energies = {"steep": [1e-9**k for k in range(40)], "flat": [1.0] * 40}
    found = [allocate_ranks(energies, sizes, 80 * 16, share)["steep"] for share in (0.0, 0.5, 1.0)]
    assert found == [1, 4, 8]
    assert all(a is not None and b is not None and a < b for a, b in itertools.pairwise(found))


def test_a_least_share_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"least_share 1.5 is outside \[0, 1\]"):
        allocate_ranks({"a": [1.0]}, {"a": (2, 2)}, 4, 1.5)


def _kept(
    scores: dict[str, list[float]], ranks: Mapping[str, int | None], sizes: dict[str, Size]
) -> float:
    return math.fsum(sum(scores[name][: ranks[name]]) for name in sizes)


@given(
    sizes=st.dictionaries(
        st.sampled_from("abc"), st.tuples(st.integers(4, 14), st.integers(8, 14)), min_size=2
    ),
    seed=st.integers(0, 2**32),
    price=st.floats(1, 60),
    least_share=st.sampled_from([0.0, 0.5]),
)
def test_by_loss_no_ranks_of_as_many_parameters_keep_more(
    sizes: dict[str, Size], seed: int, price: float, least_share: float
) -> None:
    """Against all ranks there are, with scores in no order, at a budget that a price spends."""
    stream = random.Random(seed)
    scores = {
        name: [1000 * 0.8**place * stream.random() for place in range(min(size))]
        for name, size in sizes.items()
    }
    choices: list[list[int | None]] = [
        [None, *range(1, largest_rank(*size) + 1)] for size in sizes.values()
    ]
    every = [dict(zip(sizes, ranks, strict=True)) for ranks in itertools.product(*choices)]
    best = max(every, key=lambda x: _kept(scores, x, sizes) - price * total_parameters(sizes, x))
    target = total_parameters(sizes, best)
    found = allocate_ranks(scores, sizes, target, least_share, is_loss=True)
    alike = ranks_at_ratio(sizes, ratio_for_parameters(sizes, target))

    def is_allowed(ranks: Mapping[str, int | None]) -> bool:
        if total_parameters(sizes, ranks) > target:
            return False
        for name, rank in ranks.items():
            whole = alike[name]
            even = largest_rank(*sizes[name]) if whole is None else whole
            if rank is not None and rank < math.floor(least_share * even):
                return False
        return True

    if not is_allowed(best):  # the floor forbids it, and what the floor costs is not a price's
        return
    assert is_allowed(found)
    most = max(_kept(scores, ranks, sizes) for ranks in every if is_allowed(ranks))
    assert _kept(scores, found, sizes) == pytest.approx(most)


@given(st.lists(st.floats(0, 1e3), max_size=12))
def test_falling_values_are_the_least_concave_bound(values: list[float]) -> None:
    found = falling(values)
    assert all(a >= b for a, b in itertools.pairwise(found))
    sums, bound = ([0.0, *itertools.accumulate(x)] for x in (values, found))
    assert len(sums) == len(bound)
    for middle, height in enumerate(bound):
        chords = [
            sums[a] + (sums[b] - sums[a]) * (middle - a) / max(1, b - a)
            for a in range(middle + 1)
            for b in range(middle, len(sums))
        ]
        assert height == pytest.approx(max(chords), rel=1e-9, abs=1e-6)


def test_by_loss_the_scale_of_a_layer_counts_down_to_the_floor() -> None:
    sizes = {"light": (40, 40), "heavy": (40, 40)}
    energies = {name: [1 / (k + 1) for k in range(40)] for name in sizes}
    energies["heavy"] = [1e3 * value for value in energies["heavy"]]
    ranks = allocate_ranks(energies, sizes, 80 * 16, 0.5, is_loss=True)
    assert ranks == {"light": 4, "heavy": 12}


def test_columns_behind_a_cheap_one_are_bought_with_it() -> None:
    """Columns are taken in the order of the outputs, which is not that of the loss."""
    sizes = {"late": (40, 40), "even": (40, 40)}
    scores = {"late": [1.0] * 6 + [60.0] * 4 + [0.0] * 30, "even": [10.0] * 12 + [0.0] * 28}
    ranks = allocate_ranks(scores, sizes, 80 * 14, 0.0, is_loss=True)
    assert ranks == {"late": 10, "even": 4}
