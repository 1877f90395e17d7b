"""The dtype of the residual stream, to which the decoder blocks add."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fingpt_lightning.models.block_calls import blocks_of

RESIDUAL_DTYPES = ("float32", "bfloat16")


def keep_residual_in(network: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts what every block reads under autocast, so that it adds in this dtype.

    Autocast leaves the residual stream in the dtype of the embedding, float32: each sum, norm and
    kept input of a block then takes twice the memory traffic of the products beside it. Without
    autocast nothing changes.

    Args:
        network: Network whose blocks are called with hidden states first.
        dtype: Dtype of the residual stream.
    """
    _, blocks = blocks_of(network)
    for block in blocks:
        block.register_forward_pre_hook(functools.partial(_cast, dtype=dtype))


def _cast(block: nn.Module, args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    hidden: Tensor = args[0]
    if not torch.is_autocast_enabled(hidden.device.type):
        return args
    return hidden.to(dtype), *args[1:]
