import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fingpt_lightning.low_rank import RankRule
from fingpt_lightning.models import (
    GPT2Shape,
    Recompute,
    build_network,
    recompute_blocks,
)
from fingpt_lightning.profiling import LiveTensorBytes

SHAPE = GPT2Shape(num_layers=3, width=24, num_heads=3, num_positions=13)
IDS = torch.randint(23, (2, 13), generator=torch.Generator().manual_seed(1))


def _network(rank: int | None, dropout: float = 0.0) -> PreTrainedModel:
    network = build_network(SHAPE, 23, RankRule(rank), dropout=dropout, seed=1)
    network.train()
    return network


def _gradients(network: PreTrainedModel, dtype: torch.dtype | None) -> list[Tensor]:
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        network(IDS, labels=IDS, use_cache=False).loss.backward()
    return [p.grad for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rank", [5, None])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_are_equal_to_the_bit(
    rank: int | None, dropout: float, dtype: torch.dtype | None
) -> None:
    found = []
    for recompute in Recompute:
        network = _network(rank, dropout)
        recompute_blocks(network, recompute)
        found.append(_gradients(network, dtype))
    assert len(found) == 3
    for kept, *recomputed in zip(*found, strict=True):
        assert all(torch.equal(kept, gradient) for gradient in recomputed)


def _kept_bytes(recompute: Recompute, rank: int | None) -> int:
    network = _network(rank)
    recompute_blocks(network, recompute)
    with LiveTensorBytes() as count:
        with torch.autocast("cpu", torch.bfloat16):
            loss = network(IDS, labels=IDS, use_cache=False).loss
        assert loss.requires_grad
        return int(count.live_bytes)


def test_low_rank_keeps_the_input_the_thin_activations_and_attention() -> None:
    none, block, low_rank = (_kept_bytes(recompute, rank=5) for recompute in Recompute)
    assert block < low_rank < none
    assert low_rank - block == SHAPE.num_layers * IDS.numel() * 2 * (4 * 5 + SHAPE.width)


def test_a_block_without_pairs_keeps_attention_alone() -> None:
    _, block, low_rank = (_kept_bytes(recompute, rank=None) for recompute in Recompute)
    assert low_rank - block == SHAPE.num_layers * IDS.numel() * 2 * SHAPE.width


def _blocks(network: PreTrainedModel) -> list[Any]:
    return list(network.get_submodule("transformer.h").children())


def test_none_undoes_the_others() -> None:
    network = _network(5)
    recompute_blocks(network, Recompute.LOW_RANK)
    recompute_blocks(network, Recompute.NONE)
    assert not any(block.gradient_checkpointing for block in _blocks(network))


@pytest.mark.parametrize("word", ["none", "block", "low_rank", "offload"])
def test_the_words_of_yaml_are_taken(word: str) -> None:
    network, plain = _network(5), _network(5)
    recompute_blocks(network, word)
    assert _blocks(network)[0].gradient_checkpointing == (word != "none")
    for ours, truth in zip(_gradients(network, None), _gradients(plain, None), strict=True):
        assert torch.equal(ours, truth)


def test_another_word_is_refused_and_changes_nothing() -> None:
    network = _network(5)
    message = (
        "recompute 'lowrank' is none of none, block, low_rank, offload; did you mean low_rank?"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        recompute_blocks(network, "lowrank")
    assert not any(block.gradient_checkpointing for block in _blocks(network))
