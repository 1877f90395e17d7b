"""Blocks of a network called one by one, with what each is called with in the network.

Axes: N rows, T tokens.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from fingpt_lightning.models.families import family_of

BlockCall: TypeAlias = tuple[Tensor, tuple[Any, ...], dict[str, Any]]
"""Hidden states, and what else a block is called with."""


class BlockBatch(NamedTuple):
    """Rows on their way through the blocks.

    Args:
        hidden: What the next block reads.
        beside: What else each block is called with: masks and rotations may differ by its kind.
    """

    hidden: Tensor
    beside: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]

    def call(self, index: int) -> BlockCall:
        """The call of a block."""
        return self.hidden, *self.beside[index]


def blocks_of(network: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of a network's decoder blocks."""
    name = family_of(network).blocks
    blocks = network.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    return name, blocks


@torch.no_grad()
def first_batch(network: PreTrainedModel, ids: Int[Tensor, "N T"]) -> BlockBatch:
    """What the first block reads, and what each block is called with beside it."""
    _, blocks = blocks_of(network)
    calls: list[BlockCall] = []

    def pass_on(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((hidden, args, kwargs))
        return hidden

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(delattr, block, "forward")
            block.forward = pass_on
        network.base_model(input_ids=ids, use_cache=False)
    return BlockBatch(calls[0][0], [(args, kwargs) for _, args, kwargs in calls])


@torch.no_grad()
def block_outputs(block: nn.Module, index: int, batches: Sequence[BlockBatch]) -> list[Tensor]:
    """What a block puts out for each batch.

    Args:
        block: Block to call.
        index: Its index in the network that the batches are of.
        batches: Batches that reach it.
    """
    calls = (batch.call(index) for batch in batches)
    outputs = (block(hidden, *args, **kwargs) for hidden, args, kwargs in calls)
    return [out[0] if isinstance(out, tuple) else out for out in outputs]


def next_batches(outputs: Sequence[Tensor], batches: Sequence[BlockBatch]) -> list[BlockBatch]:
    """Batches on their way to the next block, with what this one put out."""
    return [BlockBatch(hidden, b.beside) for hidden, b in zip(outputs, batches, strict=True)]
