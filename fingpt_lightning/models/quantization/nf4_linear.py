"""bitsandbytes' NF4 layer, right for rows of any length. Importing this takes a second."""

from typing import Any

import bitsandbytes
import bitsandbytes.functional
import bitsandbytes.nn
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fingpt_lightning.models.quantization.frozen_matrix import in_working_dtype, product
from fingpt_lightning.models.quantization.rounding import NF4_BLOCK, NF4Matrix, nf4_rows, nf4_values

_bnb: Any = bitsandbytes  # annotated in part, and wrongly
_Linear4bit: Any = _bnb.nn.Linear4bit


class NF4Linear(_Linear4bit):  # type: ignore[misc]
    """A ``Linear4bit`` of bitsandbytes that is a `FrozenMatrix` too."""

    @property
    def _matrix(self) -> NF4Matrix:
        return NF4Matrix(self.weight.data, self.weight.quant_state)

    def values(
        self, dtype: torch.dtype, first: int = 0, end: int | None = None
    ) -> Float[Tensor, "O I"]:
        """See `FrozenMatrix`."""
        return nf4_values(self._matrix, dtype, first, end)

    def rows(self, ids: Int[Tensor, "N"], dtype: torch.dtype) -> Float[Tensor, "N I"]:
        """See `FrozenMatrix`."""
        return nf4_rows(self._matrix, ids, dtype)

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        """The product of bitsandbytes where it has one.

        On no device has 0.50.2 a kernel for rows that blocks do not divide: on the CPU it is wrong
        (see `nf4_values`), on CUDA it dequantizes the weight, as we do, and warns of it. In float64
        it refuses on CUDA, and leaves numbers unfilled on the CPU.
        """
        if torch.compiler.is_compiling():
            return self._compiled_product(x)
        if not _has_kernel(x):
            return product(x, self, self.bias)
        made: Tensor = super().forward(x)
        return made

    def _compiled_product(self, x: Tensor) -> Tensor:
        state, bias = self.weight.quant_state, self.bias
        if _has_kernel(x):  # which autocast does not reach
            bias = None if bias is None else bias.to(x.dtype)
        else:
            x, bias = in_working_dtype(x, bias)
        sizes = [*state.shape, state.blocksize]
        nested: list[Tensor | None] = [None, None, None]
        if state.nested:
            nested = [state.offset, state.state2.absmax, state.state2.code]
            sizes.append(state.state2.blocksize)
        codes = self.weight.data
        made: Tensor = _nf4_product(
            x, bias, codes, state.absmax, state.code, *nested, sizes, state.dtype
        )
        return made


def _has_kernel(x: Tensor) -> bool:
    return x.shape[-1] % NF4_BLOCK == 0 and x.dtype != torch.float64


def _state(
    absmax: Tensor,
    code: Tensor,
    offset: Tensor | None,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    sizes: list[int],
    dtype: torch.dtype,
) -> Any:
    """The ``QuantState`` of these parts; ``sizes`` are rows, columns, and numbers of the blocks."""
    num_rows, num_columns, blocksize, *nested_blocksize = sizes
    nested = None
    if nested_blocksize:
        nested = _bnb.functional.QuantState(
            absmax=nested_absmax, code=nested_code, blocksize=nested_blocksize[0],
            dtype=torch.float32,
        )  # fmt: skip
    return _bnb.functional.QuantState(
        absmax=absmax, shape=torch.Size((num_rows, num_columns)), code=code, blocksize=blocksize,
        quant_type="nf4", dtype=dtype, offset=offset, state2=nested,
    )  # fmt: skip


# For compiled code, as the product of int8 codes in frozen_matrix.py.
@torch.library.custom_op("fingpt::nf4_product", mutates_args=())
def _nf4_product(
    x: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    absmax: Tensor,
    code: Tensor,
    offset: Tensor | None,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    sizes: list[int],
    dtype: torch.dtype,
) -> Tensor:
    state = _state(absmax, code, offset, nested_absmax, nested_code, sizes, dtype)
    if _has_kernel(x):
        made: Tensor = _bnb.matmul_4bit(x, codes, bias=bias, quant_state=state)
        return made
    return F.linear(x, nf4_values(NF4Matrix(codes, state), x.dtype), bias)


@torch.library.custom_op("fingpt::nf4_product_backward", mutates_args=())
def _nf4_product_backward(
    grad: Tensor,
    codes: Tensor,
    absmax: Tensor,
    code: Tensor,
    offset: Tensor | None,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    sizes: list[int],
    dtype: torch.dtype,
) -> Tensor:
    state = _state(absmax, code, offset, nested_absmax, nested_code, sizes, dtype)
    if sizes[1] % NF4_BLOCK == 0 and grad.dtype != torch.float64:
        weight: Tensor = _bnb.functional.dequantize_4bit(codes.view(-1, 1), state)
        return grad @ weight.to(grad.dtype)
    return grad @ nf4_values(NF4Matrix(codes, state), grad.dtype)


@_nf4_product.register_fake
def _(x: Tensor, bias: Tensor | None, codes: Tensor, *rest: Any) -> Tensor:
    sizes: list[int] = rest[-2]
    return x.new_empty(*x.shape[:-1], sizes[0])


@_nf4_product_backward.register_fake
def _(grad: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    sizes: list[int] = rest[-2]
    return grad.new_empty(*grad.shape[:-1], sizes[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.sizes, ctx.dtype = inputs[2:]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = _nf4_product_backward(grad, *ctx.saved_tensors, ctx.sizes, ctx.dtype)
    grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
    return grad_x, grad_bias, *[None] * 8


_nf4_product.register_autograd(_backward, setup_context=_setup_context)
