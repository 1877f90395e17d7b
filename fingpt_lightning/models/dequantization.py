"""Quantized networks whose weights are dequantized once, when they are loaded.

A quantized layer dequantizes its weight at every product. For a batch of hundreds of tokens that
takes a tenth of the product's time, for one new token several times as long. Where memory allows
it, the weights are kept as what their codes stand for: the same products in the same dtype.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from fingpt_lightning.models.device import free_bytes
from fingpt_lightning.models.expansion import dequantize
from fingpt_lightning.models.quantization.frozen_matrix import FrozenMatrix, quantization_of
from fingpt_lightning.units import format_bytes

AUTO, ALWAYS, NEVER = "auto", "always", "never"
CHOICES = (AUTO, ALWAYS, NEVER)
"""What ``dequantize`` may be."""
_SHARE = 0.5
"""Share of free memory that ``auto`` takes: activations and keys and values come on top."""


def dequantize_once(
    network: PreTrainedModel, how: str, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Dequantizes the weights of a network for good where that is requested and they fit.

    Adapters stay what they are, beside the layers.

    Args:
        network: Network with or without adapters, changed in place; nothing is done to one that is
            not quantized.
        how: ``always``; ``never``; or ``auto``, on a CPU where half of the free memory is enough.
            On a GPU ``auto`` keeps the codes: they are what a model may need to fit there.
        dtype: Dtype of the products.
        device: Device of the network.

    Returns:
        A line that says what was done, where ``how`` leaves it open.

    Raises:
        ValueError: ``always``, and the network is not quantized or the memory is too small.
    """
    method = quantization_of(network)
    if how == ALWAYS and method is None:
        raise ValueError("dequantize always has no effect: the network is not quantized")
    if how == NEVER or method is None or (how == AUTO and device.type != "cpu"):
        return None
    needed, free = dequantized_bytes(network, dtype), free_bytes(device)
    name = str(dtype).removeprefix("torch.")
    sizes = f"{format_bytes(needed)} in {name}, of {format_bytes(free)} free on {device}"
    if how == ALWAYS and needed > free:
        raise ValueError(f"dequantize always: the {method} weights take {sizes}")
    if how == AUTO and needed > _SHARE * free:
        return (
            f"the {method} weights are dequantized at every product, as they take {sizes};"
            " --dequantize always takes more than half of it"
        )
    dequantize(network, dtype)
    if how == ALWAYS:
        return None
    return f"the {method} weights are dequantized once: {sizes}; --dequantize never keeps {method}"


def dequantized_bytes(network: nn.Module, dtype: torch.dtype) -> int:
    """The most memory that dequantizing takes beside the quantized network.

    That is what all matrices take in ``dtype``, and one more of them on its way, in float32.
    """
    sizes = [matrix.in_features * matrix.out_features for matrix in _matrices(network)]
    return sum(sizes) * dtype.itemsize + max(sizes, default=0) * torch.float32.itemsize


def _matrices(network: nn.Module) -> Iterator[FrozenMatrix]:
    # A head that is tied has the matrices of the embedding, which are met once.
    return (cast("FrozenMatrix", m) for m in network.modules() if isinstance(m, FrozenMatrix))
