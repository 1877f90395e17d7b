import pickle
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import ConcatDataset

from fingpt_lightning.data.batch import IGNORED_LABEL, TokenBatch
from fingpt_lightning.data.block_order import WeightedOrder, WeightedPart
from fingpt_lightning.data.blocks import (
    EMPTY_BLOCK,
    BlockSampler,
    ResumableDataLoader,
    TokenBlocks,
)

EOS = 0


def _blocks(num_tokens: int, block_length: int) -> TokenBlocks:
    """Tokens 1, 2, 3, ...: each tells where it stood."""
    return TokenBlocks(np.arange(1, num_tokens + 1, dtype=np.uint16), block_length, EOS)


def _sampler(num_blocks: int, batch_size: int, **settings: Any) -> BlockSampler:
    return BlockSampler(_blocks(num_blocks + 1, 1), batch_size, **settings)


def _loader(
    num_blocks: int,
    batch_size: int,
    num_replicas: int = 1,
    rank: int = 0,
    num_workers: int = 0,
    seed: int = 5,
) -> ResumableDataLoader:
    blocks = _blocks(num_blocks + 1, 1)
    sampler = BlockSampler(
        blocks, batch_size, training=True, seed=seed, num_replicas=num_replicas, rank=rank
    )
    return ResumableDataLoader(
        blocks, batch_size, sampler=sampler, drop_last=True, num_workers=num_workers
    )


def _epochs(loader: ResumableDataLoader, *epochs: int) -> list[list[int]]:
    batches = []
    for epoch in epochs:
        loader.block_sampler.set_epoch(epoch)
        batches += [batch["input_ids"].flatten().tolist() for batch in loader]
    return batches


@given(num_tokens=st.integers(2, 120), block_length=st.integers(1, 40))
def test_each_token_but_the_first_is_a_label_once(num_tokens: int, block_length: int) -> None:
    blocks = _blocks(num_tokens, block_length)
    labels = torch.cat([blocks[index]["labels"] for index in range(len(blocks))])
    assert labels[labels != IGNORED_LABEL].tolist() == list(range(2, num_tokens + 1))


@given(num_tokens=st.integers(2, 120), block_length=st.integers(1, 40))
def test_a_label_is_the_token_after_its_input(num_tokens: int, block_length: int) -> None:
    blocks = _blocks(num_tokens, block_length)
    for index in range(len(blocks)):
        block = blocks[index]
        inputs, labels = block["input_ids"], block["labels"]
        assert inputs.shape == labels.shape == (block_length,)
        assert inputs.dtype == labels.dtype == torch.int64
        is_real = labels != IGNORED_LABEL
        assert (inputs + 1)[is_real].equal(labels[is_real])
        assert (inputs[~is_real] == EOS).all()
        assert is_real[0]


def test_the_empty_block_has_no_labels() -> None:
    block = _blocks(10, 4)[EMPTY_BLOCK]
    assert block["input_ids"].tolist() == [EOS] * 4
    assert block["labels"].tolist() == [IGNORED_LABEL] * 4


@pytest.mark.parametrize("index", [-2, 3])
def test_a_block_outside_the_tokens_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match=rf"block {index} is outside \[0, 3\)"):
        _blocks(10, 3)[index]


@pytest.mark.parametrize(
    ("num_tokens", "block_length", "message"),
    [(1, 4, "1 tokens hold nothing to predict; 2"), (9, 0, "block_length 0 is below 1")],
)
def test_blocks_without_labels_are_refused(
    num_tokens: int, block_length: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _blocks(num_tokens, block_length)


def test_a_pickled_memory_map_is_opened_again_not_copied(tmp_path: Path) -> None:
    np.arange(50_000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    blocks = TokenBlocks(np.memmap(tmp_path / "tokens.bin", np.uint16, mode="r"), 7, EOS)
    pickled = pickle.dumps(blocks)
    assert len(pickled) < 1000
    copy = pickle.loads(pickled)
    assert copy[11]["labels"].equal(blocks[11]["labels"])
    assert len(copy) == len(blocks)


@given(
    num_blocks=st.integers(0, 60),
    batch_size=st.integers(1, 5),
    num_replicas=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_ranks_see_together_what_one_rank_with_larger_batches_sees(
    num_blocks: int, batch_size: int, num_replicas: int, epoch: int
) -> None:
    num_blocks = max(num_blocks, 1)
    one = _sampler(num_blocks, batch_size * num_replicas, training=True)
    one.set_epoch(epoch)
    ranks = []
    for rank in range(num_replicas):
        sampler = _sampler(
            num_blocks, batch_size, training=True, num_replicas=num_replicas, rank=rank
        )
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(sampler) == len(ranks[-1])
    order = list(one)
    for first in range(0, len(order), batch_size * num_replicas):
        part = slice(first // num_replicas, first // num_replicas + batch_size)
        together = sorted(index for rank in ranks for index in rank[part])
        assert together == sorted(order[first : first + batch_size * num_replicas])
    assert len(order) == num_blocks - num_blocks % (batch_size * num_replicas)
    assert len(set(order)) == len(order)


@given(num_blocks=st.integers(1, 40), batch_size=st.integers(1, 5), num_replicas=st.integers(1, 4))
def test_evaluation_reads_each_block_once_and_ranks_are_equally_long(
    num_blocks: int, batch_size: int, num_replicas: int
) -> None:
    ranks = []
    for rank in range(num_replicas):
        sampler = _sampler(
            num_blocks, batch_size, training=False, num_replicas=num_replicas, rank=rank
        )
        ranks.append(list(sampler))
        assert len(sampler) == len(ranks[-1]) == len(ranks[0])
    counts = Counter(index for rank in ranks for index in rank)
    num_empty = counts.pop(EMPTY_BLOCK, 0)
    assert counts == Counter(range(num_blocks))
    assert num_empty < num_replicas


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [2, 23, 24, 25])
def test_evaluation_counts_each_label_once(num_tokens: int, num_replicas: int) -> None:
    blocks = _blocks(num_tokens, block_length=4)
    labels: list[int] = []
    for rank in range(num_replicas):
        sampler = BlockSampler(blocks, 2, training=False, num_replicas=num_replicas, rank=rank)
        for batch in torch.utils.data.DataLoader(blocks, 2, sampler=sampler):
            labels += batch["labels"][batch["labels"] != IGNORED_LABEL].tolist()
    assert sorted(labels) == list(range(2, num_tokens + 1))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = []
    for seed in (0, 1, 2):
        for epoch in (0, 1, 2):
            sampler = _sampler(30, 1, training=True, seed=seed)
            sampler.set_epoch(epoch)
            orders.append(tuple(sampler))
            assert tuple(sampler) == orders[-1]
    assert len(set(orders)) == 9
    assert tuple(range(30)) not in orders


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"batch_size": 0}, "batch_size 0 is below 1"), ({"rank": 2}, "Invalid rank 2")],
)
def test_a_sampler_outside_its_range_is_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _sampler(4, **({"batch_size": 1, "training": True, "num_replicas": 2} | settings))


@given(
    num_blocks=st.integers(4, 40),
    batch_size=st.integers(1, 4),
    stop=st.integers(0, 40),
    epoch=st.integers(0, 2),
)
@example(num_blocks=8, batch_size=2, stop=0, epoch=1)
@example(num_blocks=8, batch_size=2, stop=4, epoch=1)
def test_a_restored_loader_goes_on_as_if_never_stopped(
    num_blocks: int, batch_size: int, stop: int, epoch: int
) -> None:
    whole = _loader(num_blocks, batch_size)
    uninterrupted = _epochs(whole, epoch, epoch + 1, epoch + 2)
    first = _loader(num_blocks, batch_size)
    first.block_sampler.set_epoch(epoch)
    stop = min(stop, len(first))
    seen = [batch["input_ids"].flatten().tolist() for batch in islice(first, stop)]
    state = first.state_dict()

    second = _loader(num_blocks, batch_size)
    second.load_state_dict(state)
    assert len(second) == len(whole)
    is_full = stop == len(first)
    assert second.block_sampler.epoch == epoch + is_full
    if not is_full:
        assert second.state_dict() == state
    while len(seen) < len(uninterrupted):
        seen += [batch["input_ids"].flatten().tolist() for batch in second]
        second.block_sampler.set_epoch(second.block_sampler.epoch + 1)
    assert seen == uninterrupted


@pytest.mark.parametrize("num_workers", [0, 2])
def test_reading_ahead_does_not_count(num_workers: int) -> None:
    uninterrupted = _epochs(_loader(23, 2), 1, 2)
    first = _loader(23, 2, num_workers=num_workers)
    first.block_sampler.set_epoch(1)
    batches = iter(first)
    seen = [next(batches)["input_ids"].flatten().tolist() for _ in range(4)]
    state = first.state_dict()
    del batches
    assert state == {"epoch": 1, "num_samples": 8, "seed": 5, "num_blocks": 23}
    second = _loader(23, 2, num_workers=num_workers)
    second.load_state_dict(state)
    assert seen + _epochs(second, 1, 2) == uninterrupted


@given(
    num_samples=st.integers(0, 6).map(lambda batches: 6 * batches),
    batch_size=st.integers(1, 4),
    num_replicas=st.integers(1, 3),
)
def test_another_world_or_batch_size_goes_on_at_the_same_sample(
    num_samples: int, batch_size: int, num_replicas: int
) -> None:
    # What is left must fill a batch: else the position is the beginning of the next epoch.
    assume(num_samples + batch_size * num_replicas <= 47)
    order = _epochs(_loader(47, 1), 3)
    state = {"epoch": 3, "num_samples": num_samples, "seed": 5, "num_blocks": 47}
    ranks = []
    for rank in range(num_replicas):
        loader = _loader(47, batch_size, num_replicas, rank)
        loader.load_state_dict(state)
        ranks.append([batch["input_ids"].flatten().tolist() for batch in loader])
    size = batch_size * num_replicas
    rest = [sample for [sample] in order[num_samples:]]
    expected = [sorted(rest[i : i + size]) for i in range(0, len(rest) - size + 1, size)]
    together = [sorted(chain.from_iterable(parts)) for parts in zip(*ranks, strict=True)]
    assert together == expected


def test_a_position_in_another_epoch_than_the_sampler_is_dropped() -> None:
    """As after ``limit_train_batches``, when Lightning ends the epoch before the loader does."""
    loader = _loader(12, 2)
    loader.load_state_dict({"epoch": 0, "num_samples": 4, "seed": 5, "num_blocks": 12})
    assert _epochs(loader, 1) == _epochs(_loader(12, 2), 1)


def test_a_restored_position_counts_for_one_iteration() -> None:
    loader = _loader(12, 2)
    loader.load_state_dict({"epoch": 1, "num_samples": 4, "seed": 5, "num_blocks": 12})
    whole = _epochs(_loader(12, 2), 1)
    assert _epochs(loader, 1) == whole[2:]
    assert _epochs(loader, 1) == whole


def test_an_iterator_that_is_never_started_changes_nothing() -> None:
    loader = _loader(12, 2)
    loader.load_state_dict({"epoch": 2, "num_samples": 4, "seed": 5, "num_blocks": 12})
    state = loader.state_dict()
    iter(loader)
    assert loader.state_dict() == state
    assert len(_epochs(loader, 2)) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "num_blocks",
            "stopped in data with num_blocks 99, but here num_blocks is 12: resume with",
        ),
        ("seed", "stopped in data with seed 99, but here seed is 5: resume with"),
    ],
)
def test_a_position_in_other_data_is_refused(name: str, message: str) -> None:
    loader = _loader(12, 2)
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict(loader.state_dict() | {name: 99})


def _mixed_loader(
    batch_size: int,
    num_replicas: int = 1,
    rank: int = 0,
    weights: tuple[float, float] = (3.0, 1.0),
) -> ResumableDataLoader:
    parts = [_blocks(31, 1), _blocks(8, 1)]
    order = WeightedOrder(
        [
            WeightedPart(name, len(part), weight)
            for name, part, weight in zip("ab", parts, weights, strict=True)
        ]
    )
    blocks: ConcatDataset[dict[str, Tensor]] = ConcatDataset(parts)
    sampler = BlockSampler(
        blocks, batch_size, training=True, seed=5, order=order, num_replicas=num_replicas, rank=rank
    )
    return ResumableDataLoader(blocks, batch_size, sampler=sampler, drop_last=True)


@given(
    num_samples=st.integers(0, 4).map(lambda batches: 6 * batches),
    batch_size=st.integers(1, 4),
    num_replicas=st.integers(1, 3),
    epoch=st.integers(0, 2),
)
def test_a_mixture_goes_on_with_another_world_at_the_same_sample(
    num_samples: int, batch_size: int, num_replicas: int, epoch: int
) -> None:
    one = _mixed_loader(1)
    rest = [sample for [sample] in _epochs(one, epoch)][num_samples:]
    state = one.state_dict() | {"epoch": epoch, "num_samples": num_samples}
    ranks = []
    for rank in range(num_replicas):
        loader = _mixed_loader(batch_size, num_replicas, rank)
        loader.load_state_dict(state)
        ranks.append([batch["input_ids"].flatten().tolist() for batch in loader])
    size = batch_size * num_replicas
    expected = [sorted(rest[i : i + size]) for i in range(0, len(rest) - size + 1, size)]
    together = [sorted(chain.from_iterable(parts)) for parts in zip(*ranks, strict=True)]
    assert together == expected
    assert len(rest) + num_samples == 39


def test_a_position_in_another_mixture_is_refused() -> None:
    state = _mixed_loader(2).state_dict()
    with pytest.raises(
        ValueError, match="with mixture 3/4 from 30 of a, 1/4 from 7 of b, but here"
    ):
        _mixed_loader(2, weights=(3.0, 2.0)).load_state_dict(state | {"num_blocks": 50})
    with pytest.raises(ValueError, match="but here mixture is None"):
        _loader(40, 2).load_state_dict(state)
    with pytest.raises(ValueError, match="stopped in data with mixture None, but here"):
        _mixed_loader(2).load_state_dict(_loader(40, 2).state_dict())


def test_batches_are_token_batches() -> None:
    batch: dict[str, Tensor] = next(iter(_loader(12, 3)))
    assert set(batch) == TokenBatch.__required_keys__
    assert {(tensor.shape, tensor.dtype) for tensor in batch.values()} == {((3, 1), torch.int64)}
