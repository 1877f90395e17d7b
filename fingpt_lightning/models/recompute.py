"""Computing activations again in the backward pass in place of keeping them."""

import functools
from enum import StrEnum
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fingpt_lightning.models.attention import ATTENTION_OPERATOR
from fingpt_lightning.models.families import family_of
from fingpt_lightning.models.offload import offload_block_inputs
from fingpt_lightning.terminal.messages import nearest


class Recompute(StrEnum):
    """What a decoder block computes again in the backward pass."""

    NONE = "none"
    """Nothing: all activations are kept."""
    BLOCK = "block"
    """All: only the block's input is kept. Costs one more forward pass through the blocks.

    Source: https://arxiv.org/abs/1604.06174."""
    LOW_RANK = "low_rank"
    """The widening halves of the low-rank layers, norms and elementwise functions: the block's
    input, the rank-r activation of each layer and attention's result are kept. Costs half the
    products of ``BLOCK`` and no attention.

    Source: CoLA-M, https://arxiv.org/abs/2502.10940, section 4, which computes attention again."""


OFFLOAD = "offload"
"""As ``BLOCK``, with the blocks' inputs kept in the host's memory."""


def recompute_blocks(
    network: PreTrainedModel, recompute: Recompute | str = Recompute.BLOCK
) -> None:
    """Sets what the decoder blocks of a network compute again; gradients stay equal to the bit.

    Args:
        network: A network of transformers; dropout is repeated exactly.
        recompute: ``none``, ``block``, ``low_rank`` or ``offload``. Under ``low_rank`` a block
            without low-rank layers keeps its input and attention's result.

    Raises:
        ValueError: ``recompute`` is another word.
    """
    known = [*Recompute, OFFLOAD]
    if recompute not in known:
        hint = nearest(recompute, known)
        raise ValueError(f"recompute {recompute!r} is none of {', '.join(known)}{hint}")
    if recompute == OFFLOAD:
        offload_block_inputs(network)
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if recompute == Recompute.LOW_RANK:
        policy = functools.partial(_policy, keeps_attention=not _attention_dropout(network))
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    run = functools.partial(checkpoint, **options)
    for block in network.modules():
        if isinstance(block, GradientCheckpointingLayer):
            block.gradient_checkpointing = recompute != Recompute.NONE
            block.__dict__["_gradient_checkpointing_func"] = run


_ATTENTION = {
    ATTENTION_OPERATOR,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def _policy(
    ctx: Any, operator: Any, *args: Any, keeps_attention: bool, **kwargs: Any
) -> CheckpointPolicy:
    if operator in _ATTENTION and keeps_attention:
        return CheckpointPolicy.MUST_SAVE
    # The narrowing half of a low-rank layer has no bias, so it is a plain product; so is the half
    # that widens in a layer without any bias, whose result is not thin.
    if operator is torch.ops.aten.mm.default and args[1].shape[1] < args[1].shape[0]:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _attention_dropout(network: PreTrainedModel) -> float:
    # A kept result is not drawn again: the dropouts after it would see another random stream.
    return float(getattr(network.config, family_of(network).attention_dropout))
