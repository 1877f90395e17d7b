"""Frozen linear layers in NF4 or int8, by bitsandbytes."""

import logging
from collections import OrderedDict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.models.quantization.frozen_matrix import Int8Linear
from fingpt_lightning.models.quantization.rounding import round_to_int8, round_to_nf4

QUANTIZATIONS = ("nf4", "int8")
BYTES_PER_NUMBER = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""Parts of a quantized matrix: codes, the scales of NF4's blocks, and the scales of those."""


def is_linear(layer: nn.Module) -> bool:
    """Whether `quantized_layer` takes it: a linear layer, dense or low-rank."""
    return isinstance(layer, nn.Linear | Conv1D | LowRankLinear)


def is_quantized_low_rank(layer: nn.Module) -> bool:
    """Whether it is what `quantized_layer` makes of a low-rank layer: its factors in a row."""
    if not isinstance(layer, nn.Sequential):
        return False
    return [name for name, _ in layer.named_children()] == ["down", "up"]


def quantized_layer(
    layer: nn.Module,
    quantize: str,
    device: torch.device,
    moments: Float[Tensor, "I I"] | None = None,
) -> Any:
    """The layer of the same map with its weight frozen in 4 or 8 bits, its bias as it was.

    A low-rank layer becomes two quantized layers, ``down`` and ``up``. Weights alone are rounded:
    the int8 layer of bitsandbytes rounds its input too, which costs answers and makes them depend
    on the batch.

    Args:
        layer: Layer whose dtype becomes that of the products.
        quantize: ``nf4`` (blocks of 64, their scales quantized again) or ``int8`` (by row).
        device: Device of the quantized layer.
        moments: Moments of its inputs, as in `rounding.rounded`.

    Raises:
        TypeError: It is not a linear layer.
        ValueError: It is a low-rank layer with an activation between its factors.

    Source: https://arxiv.org/abs/2305.14314, section 3; https://arxiv.org/abs/2208.07339.
    """
    match layer:
        case LowRankLinear():
            if layer.activation != "none":
                raise ValueError(
                    f"a low-rank layer with {layer.activation} between its factors cannot be"
                    " quantized: the two quantized layers would follow each other without it"
                )
            down = _quantized(layer.down, None, quantize, device, moments)
            if moments is not None:  # of what the quantized first factor gives to the second
                factor = down.values(moments.dtype)
                moments = factor @ moments @ factor.T
            up = _quantized(layer.up, layer.bias, quantize, device, moments)
            return nn.Sequential(OrderedDict(down=down, up=up))
        case Conv1D():
            return _quantized(layer.weight.T, layer.bias, quantize, device, moments)
        case nn.Linear():
            return _quantized(layer.weight, layer.bias, quantize, device, moments)
    raise TypeError(f"{type(layer).__name__} is not a linear layer")


def quantized_matrix(weight: Tensor, quantize: str, device: torch.device) -> nn.Module:
    """A `FrozenMatrix`, as a layer without bias.

    Args:
        weight: Weight on any device.
        quantize: ``nf4`` or ``int8``.
        device: Device of the layer.
    """
    made: nn.Module = _quantized(weight, None, quantize, device)
    return made


@torch.no_grad()
def _quantized(
    weight: Tensor,
    bias: Tensor | None,
    quantize: str,
    device: torch.device,
    moments: Tensor | None = None,
) -> Any:
    out_features, in_features = weight.shape
    layer = bare_layer(in_features, out_features, bias is not None, quantize, weight.dtype)
    if quantize == "int8":
        codes, scales = round_to_int8(weight.to(device), moments)
        layer.fill(codes.contiguous(), scales)  # as they are read, so that products are equal
    else:
        import bitsandbytes

        codes, state = round_to_nf4(weight.to(device), moments)
        bnb: Any = bitsandbytes.nn  # annotated in part, and wrongly
        state.dtype = weight.dtype
        layer.weight = bnb.Params4bit(
            codes, quant_state=state, quant_type="nf4", bnb_quantized=True, module=layer
        )
        layer.quant_state = state
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(device))
    return layer


def bare_layer(
    in_features: int, out_features: int, has_bias: bool, quantize: str, dtype: torch.dtype
) -> Any:
    """A layer that waits for its quantized weight.

    Args:
        in_features: Input features of the map.
        out_features: Output features of the map.
        has_bias: Whether it waits for a bias too.
        quantize: ``nf4`` or ``int8``.
        dtype: Dtype of the products.
    """
    if quantize == "int8":
        return Int8Linear(in_features, out_features, has_bias)
    for module in ("autograd._functions", "backends.cpu.ops"):
        # It reports its casts at each product, and advises a package that fetches native code.
        logging.getLogger(f"bitsandbytes.{module}").setLevel(logging.ERROR)
    from fingpt_lightning.models.quantization.nf4_linear import NF4Linear  # takes a second

    with torch.device("meta"):
        layer = NF4Linear(in_features, out_features, has_bias, dtype)
    # bitsandbytes 0.50 packs the weight at the first evaluation on a CPU with AVX-512, and a
    # training step after that gets wrong gradients without an error.
    layer.support_avx512bf16_for_cpu = False
    return layer
