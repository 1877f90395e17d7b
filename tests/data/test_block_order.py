from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fingpt_lightning.data.block_order import (
    BlockOrder,
    ShuffledOrder,
    WeightedOrder,
    WeightedPart,
    interleaved,
    whole_shares,
)

_SHARES = st.lists(st.integers(1, 40), min_size=1, max_size=7)


def _mixture(sizes: Sequence[int], weights: Sequence[float]) -> WeightedOrder:
    return WeightedOrder(
        [
            WeightedPart(f"part {index}", size, float(weight))
            for index, (size, weight) in enumerate(zip(sizes, weights, strict=True))
        ]
    )


# Sizes and tenths of weights.
_PARTS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=5)


@given(shares=_SHARES, num_slots=st.integers(1, 300))
@example(shares=[1, 1, 1, 1, 1, 1, 40], num_slots=300)
@example(shares=[40, 1, 1, 1, 1, 1, 1], num_slots=300)
def test_every_prefix_has_the_shares_to_less_than_one(shares: list[int], num_slots: int) -> None:
    slots = interleaved(shares, num_slots)
    assert len(slots) == num_slots
    draws = np.arange(1, num_slots + 1)
    for part, share in enumerate(shares):
        counts = np.cumsum(slots == part)
        assert (np.abs(counts * sum(shares) - share * draws) < sum(shares)).all()


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([0.7, 0.2, 0.1], [7, 2, 1]),
        ([3.0, 1.0], [3, 1]),
        ([0.5], [1]),
        ([2e-05, 1.0], [1, 50_000]),
        ([30.0, 12.5], [12, 5]),
    ],
)
def test_weights_count_as_they_are_written(weights: list[float], shares: list[int]) -> None:
    assert whole_shares(weights) == shares


@given(parts=_PARTS, seed=st.integers(0, 3), epoch=st.integers(0, 4))
def test_the_largest_corpus_is_read_once_an_epoch_and_the_shares_hold(
    parts: list[tuple[int, int]], seed: int, epoch: int
) -> None:
    mixture = _mixture([size for size, _ in parts], [tenths / 10 for _, tenths in parts])
    order = mixture.epoch(seed, epoch)
    assert len(order) == len(mixture)
    bounds = np.cumsum([0, *(part.num_blocks for part in mixture.parts)])
    drawn = np.searchsorted(bounds, order.numpy(), side="right") - 1
    counts = Counter(order.tolist())
    times = [
        part.num_blocks / share for part, share in zip(mixture.parts, mixture.shares, strict=True)
    ]
    largest = times.index(max(times))
    assert {counts[index] for index in range(*bounds[largest : largest + 2].tolist())} == {1}
    for part, share in enumerate(mixture.shares):
        of_part = np.cumsum(drawn == part)
        expected = share / sum(mixture.shares) * np.arange(1, len(order) + 1)
        assert (np.abs(of_part - expected) < 1 + 1e-9).all()


@given(parts=_PARTS, num_epochs=st.integers(1, 4))
def test_small_corpora_are_read_in_whole_passes_that_go_on_over_epochs(
    parts: list[tuple[int, int]], num_epochs: int
) -> None:
    mixture = _mixture([size for size, _ in parts], [tenths / 10 for _, tenths in parts])
    drawn = [index for epoch in range(num_epochs) for index in mixture.epoch(5, epoch).tolist()]
    first = 0
    for part in mixture.parts:
        own = [index - first for index in drawn if first <= index < first + part.num_blocks]
        for start in range(0, len(own), part.num_blocks):
            one_pass = own[start : start + part.num_blocks]
            assert len(set(one_pass)) == len(one_pass)
        first += part.num_blocks


def test_passes_epochs_seeds_and_parts_have_orders_of_their_own() -> None:
    mixture = _mixture([30, 30, 15], [1, 1, 1])
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        order = mixture.epoch(seed, epoch)
        for first in (0, 30):
            orders.append(tuple((order[(order >= first) & (order < first + 30)] - first).tolist()))
        small = order[order >= 60].tolist()
        orders += [tuple(small[:15]), tuple(small[15:])]
    assert len(set(orders)) == len(orders) == 12


def test_one_corpus_alone_is_each_block_once() -> None:
    assert len(_mixture([7], [0.3])) == 7
    assert sorted(_mixture([7], [0.3]).epoch(1, 2).tolist()) == list(range(7))
    assert sorted(ShuffledOrder(7).epoch(1, 2).tolist()) == list(range(7))


def test_an_epoch_without_end_is_refused() -> None:
    message = (
        "mixture part 'part 1': to read its 5 blocks once by weight 1e-09 takes an epoch of "
        "5000000005 blocks, more than 1073741824"
    )
    with pytest.raises(ValueError, match=message):
        _mixture([10, 5], [1, 1e-9])


def test_a_checkpoint_tells_other_weights_sizes_and_names_apart() -> None:
    orders: list[BlockOrder] = [
        _mixture([20, 20], [2, 1]),
        _mixture([20, 20], [1, 2]),
        _mixture([20, 19], [2, 1]),
        WeightedOrder([WeightedPart("a", 20, 2.0), WeightedPart("b", 20, 1.0)]),
        ShuffledOrder(20),
    ]
    told = [tuple(order.identity().items()) for order in orders]
    assert len(set(told)) == len(told)
    assert orders[0].identity() == {
        "num_blocks": 60,
        "mixture": "2/3 from 20 of part 0, 1/3 from 20 of part 1",
    }
