"""Quantized layers that multiply with what their codes stand for, by rows or as a whole.

Axes: I in_features, O out_features, N requested rows.
"""

from collections.abc import Iterator
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int8
from torch import Tensor, nn

from fingpt_lightning.models.quantization.rounding import int8_values

CHUNK_BYTES = {"cpu": 2**20, "cuda": 2**28}
"""Bytes of dequantized rows held at a time, as many as a core's share of cache holds."""


@runtime_checkable
class FrozenMatrix(Protocol):
    """A quantized matrix of O rows and I columns, which is never held dequantized for long."""

    in_features: int
    out_features: int

    def values(
        self, dtype: torch.dtype, first: int = 0, end: int | None = None
    ) -> Float[Tensor, "O I"]:
        """Its rows from ``first``, a multiple of 64, to before ``end``; None is the last."""

    def rows(self, ids: Int[Tensor, "N"], dtype: torch.dtype) -> Float[Tensor, "N I"]:
        """Some of its rows."""


def quantization_of(network: nn.Module) -> str | None:
    """The method by which a network's matrices are quantized; None where none is."""
    found = next((m for m in network.modules() if isinstance(m, FrozenMatrix)), None)
    if found is None:
        return None
    return "int8" if isinstance(found, Int8Linear) else "nf4"


def row_chunks(
    matrix: FrozenMatrix, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Pairs of a first row and the dequantized rows from there on, few at a time."""
    num_rows = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (
        matrix.in_features * dtype.itemsize
    )
    num_rows = max(64, num_rows // 64 * 64)  # so that each chunk begins with a block
    for first in range(0, matrix.out_features, num_rows):
        end = min(matrix.out_features, first + num_rows)
        yield first, matrix.values(dtype, first, end)


class _Product(torch.autograd.Function):
    """x W' + b without keeping W: it is dequantized again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: FrozenMatrix) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.values(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x = grad @ ctx.layer.values(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None


def product(x: Float[Tensor, "*batch I"], layer: FrozenMatrix, bias: Tensor | None) -> Tensor:
    """The map x W' + b in the dtype of autocast or of ``x``; gradients flow to x and b."""
    made = _Product.apply(*in_working_dtype(x, bias), layer)  # type: ignore[no-untyped-call]
    return cast("Tensor", made)


def in_working_dtype(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both in the dtype of autocast or of ``x``."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return x.to(dtype), None if bias is None else bias.to(dtype)


# For compiled code. A compiler that sees the dequantized weight keeps it for the backward pass,
# where it is needed again: all layers' weights would then lie dequantized in memory.
@torch.library.custom_op("fingpt::int8_product", mutates_args=())
def _int8_product(x: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor) -> Tensor:
    return F.linear(x, int8_values(codes, scales, x.dtype), bias)


@torch.library.custom_op("fingpt::int8_product_backward", mutates_args=())
def _int8_product_backward(grad: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return grad @ int8_values(codes, scales, grad.dtype)


@_int8_product.register_fake
def _(x: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(codes))


@_int8_product_backward.register_fake
def _(grad: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], codes.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = _int8_product_backward(grad, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
    grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
    return grad_x, grad_bias, None, None


_int8_product.register_autograd(_backward, setup_context=_setup_context)


class Int8Linear(nn.Linear):
    """x W' + b with W in int8 and one scale per row; x stays as it is.

    bitsandbytes' layer of the same files rounds x to int8 as well.

    Args:
        in_features: I.
        out_features: O.
        bias: Whether the layer has a bias b.
    """

    SCB: Tensor
    """The largest magnitude of each row, under bitsandbytes' name."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias, device="meta")
        codes = torch.empty(out_features, in_features, dtype=torch.int8, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("SCB", torch.empty(out_features, device="meta"))

    def fill(self, codes: Int8[Tensor, "O I"], scales: Float[Tensor, "O"]) -> None:
        """Takes what `round_to_int8` made."""
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.SCB = scales

    def values(
        self, dtype: torch.dtype, first: int = 0, end: int | None = None
    ) -> Float[Tensor, "O I"]:
        """See `FrozenMatrix`."""
        return int8_values(self.weight[first:end], self.SCB[first:end], dtype)

    def rows(self, ids: Int[Tensor, "N"], dtype: torch.dtype) -> Float[Tensor, "N I"]:
        """See `FrozenMatrix`."""
        return int8_values(self.weight[ids], self.SCB[ids], dtype)

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        """Cost: that of the dense layer, and W dequantized once."""
        if torch.compiler.is_compiling():
            made = _int8_product(*in_working_dtype(x, self.bias), self.weight, self.SCB)
            return cast("Tensor", made)
        return product(x, self, self.bias)
