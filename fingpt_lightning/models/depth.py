"""Blocks of a network dropped: those without which it predicts a text best.

Axes: N rows, T tokens, V vocabulary.
"""

from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from fingpt_lightning.models.block_calls import (
    BlockBatch,
    block_outputs,
    blocks_of,
    first_batch,
    next_batches,
)


def blocks_to_drop(
    network: PreTrainedModel,
    ids: Int[Tensor, "N T"],
    number: int,
    batch_rows: int = 2,
    show: Callable[[int], None] = lambda _: None,
) -> list[int]:
    """The blocks whose absence costs least on a text, chosen one after the other.

    Each round tries the network without each of the blocks that are left, and drops the one
    without which the mean loss per token is least. Blocks before the tried one are not run again.

    Args:
        network: Whole network in evaluation mode.
        ids: Tokens in rows of equal length.
        number: Number of blocks to drop.
        batch_rows: Number of rows that go through a block at a time.
        show: Function that receives the number of blocks tried.

    Returns:
        Indices in rising order.

    Raises:
        ValueError: No block would be left.
        FloatingPointError: The loss is not finite, whichever block is dropped.

    Memory: the hidden states of all rows once for each block.

    Cost: for L blocks, ``number`` times L / 2 forward passes and L heads.

    Source: https://arxiv.org/abs/2402.09025 (SLEB).
    """
    _, blocks = blocks_of(network)
    check_number(number, len(blocks))
    rows = ids.split(batch_rows)
    dropped: list[int] = []
    num_tried = 0
    for _ in range(number):
        kept = [index for index in range(len(blocks)) if index not in dropped]
        reached = [first_batch(network, part) for part in rows]
        losses: dict[int, float] = {}
        for place, index in enumerate(kept):
            last = reached
            for later in kept[place + 1 :]:
                last = next_batches(block_outputs(blocks[later], later, last), last)
            losses[index] = _mean_loss(network, rows, last)
            reached = next_batches(block_outputs(blocks[index], index, reached), reached)
            num_tried += 1
            show(num_tried)
        finite = {index: loss for index, loss in losses.items() if loss < float("inf")}
        if not finite:
            raise FloatingPointError("the loss on the calibration text is not finite")
        dropped.append(min(finite, key=lambda index: finite[index]))
    return sorted(dropped)


def num_trials(num_blocks: int, number: int) -> int:
    """Number of networks that `blocks_to_drop` tries.

    >>> num_trials(30, 3)
    87
    """
    return sum(num_blocks - dropped for dropped in range(number))


def check_number(number: int, num_blocks: int) -> None:
    """Checks the number of blocks to drop.

    Raises:
        ValueError: No block would be left, or the number is negative.
    """
    if not 0 <= number < num_blocks:
        raise ValueError(
            f"drop_blocks {number} of {num_blocks} blocks is outside [0, {num_blocks - 1}]"
        )


def drop_blocks(network: PreTrainedModel, dropped: Collection[int]) -> None:
    """Removes blocks from a network and its config, and numbers the others anew.

    Args:
        network: Network to change.
        dropped: Indices of the blocks to remove.
    """
    name, blocks = blocks_of(network)
    check_number(len(set(dropped)), len(blocks))
    kept = [index for index in range(len(blocks)) if index not in dropped]
    network.set_submodule(name, nn.ModuleList(blocks[index] for index in kept))
    for place, index in enumerate(kept):
        for module in blocks[index].modules():
            # Attention writes its keys and values under this number.
            if isinstance(getattr(module, "layer_idx", None), int):
                setattr(module, "layer_idx", place)  # noqa: B010
    config = network.config
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        config.layer_types = [kinds[index] for index in kept]
    config.num_hidden_layers = len(kept)


@torch.no_grad()
def _mean_loss(
    network: PreTrainedModel, rows: tuple[Tensor, ...], reached: list[BlockBatch]
) -> float:
    total, number = 0.0, 0
    for ids, batch in zip(rows, reached, strict=True):
        logits = _logits(network, ids, batch.hidden)[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].flatten()
        total += float(functional.cross_entropy(logits.float(), targets, reduction="sum"))
        number += targets.numel()
    return total / number


def _logits(
    network: PreTrainedModel, ids: Int[Tensor, "N T"], hidden: Tensor
) -> Float[Tensor, "N T V"]:
    """What comes after the blocks, by the network itself: norm, head, caps and scales."""
    _, blocks = blocks_of(network)

    def put_out(_: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(delattr, block, "forward")
            block.forward = put_out
        logits: Tensor = network(input_ids=ids, use_cache=False).logits
    return logits
