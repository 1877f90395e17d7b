"""Matrices rounded to int8 by row or to NF4 by block, and the numbers that their codes stand for.

Axes: O rows, I columns, N rows that are asked for.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

NF4_BLOCK = 64
"""Numbers, row after row, that share a scale."""
_INT8_LEVELS = 127


class Int8Matrix(NamedTuple):
    """``codes`` are whole numbers in [-127, 127]; ``scales`` the largest magnitude of each row."""

    codes: Int8[Tensor, "O I"]
    scales: Float[Tensor, "O"]


class NF4Matrix(NamedTuple):
    """Two codes a byte, and the ``QuantState`` of bitsandbytes: scales of blocks, in 8 bits."""

    codes: Tensor
    state: Any


def round_to_int8(weight: Float[Tensor, "O I"]) -> Int8Matrix:
    """Rounds each row to multiples of 1/127 of its largest magnitude."""
    wide = weight.detach().float()
    scales = wide.abs().amax(1)
    steps = scales.clamp_min(torch.finfo(torch.float32).tiny) / _INT8_LEVELS
    return Int8Matrix((wide / steps[:, None]).round_().to(torch.int8), scales)


def int8_values(
    codes: Int8[Tensor, "O I"], scales: Float[Tensor, "O"], dtype: torch.dtype
) -> Float[Tensor, "O I"]:
    """What the codes of `round_to_int8` stand for."""
    return (codes * (scales / _INT8_LEVELS)[:, None]).to(dtype)


def round_to_nf4(weight: Float[Tensor, "O I"]) -> NF4Matrix:
    """Rounds each block to 16 levels, its scale to one of 256.

    Source: https://arxiv.org/abs/2305.14314, section 3.
    """
    from bitsandbytes.functional import quantize_4bit  # takes a second

    codes, state = quantize_4bit(
        weight.detach().float().contiguous(),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        compress_statistics=True,
    )
    return NF4Matrix(codes, state)


def nf4_values(
    matrix: NF4Matrix, dtype: torch.dtype, first: int = 0, end: int | None = None
) -> Float[Tensor, "O I"]:
    """What codes stand for.

    Args:
        matrix: Of blocks of any size.
        dtype: Of the result.
        first: Row to begin with; a block begins with it.
        end: Row after the last; None is all.
    """
    state = matrix.state
    num_rows, num_columns = state.shape
    end = num_rows if end is None else end
    start, stop = first * num_columns, end * num_columns
    blocks = torch.arange(
        start // state.blocksize, -(-stop // state.blocksize), device=state.absmax.device
    )
    # As one row: bitsandbytes 0.50.2 takes wrong scales on the CPU for rows of 224 or 400, whose
    # blocks reach over their ends. And it leaves float64 unfilled there.
    flat: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        matrix.codes.reshape(-1)[start // 2 : -(-stop // 2)].unsqueeze(1),
        _scales(state, blocks),
        state.blocksize,
        "nf4",
        (stop - start,),
        torch.float32 if dtype == torch.float64 else dtype,
    )
    return flat.reshape(end - first, num_columns).to(dtype)


def nf4_rows(matrix: NF4Matrix, ids: Int[Tensor, "N"], dtype: torch.dtype) -> Float[Tensor, "N I"]:
    """What some rows stand for; no other is touched."""
    state = matrix.state
    place_NI = ids[:, None] * state.shape[1] + torch.arange(state.shape[1], device=ids.device)
    byte_NI = matrix.codes.reshape(-1)[place_NI // 2]
    code_NI = torch.where(place_NI % 2 == 0, byte_NI >> 4, byte_NI & 15)
    values: Tensor = state.code[code_NI.int()] * _scales(state, place_NI // state.blocksize)
    return values.to(dtype)


def _scales(state: Any, blocks: Tensor) -> Tensor:
    scales: Tensor = state.absmax[blocks]
    if state.nested:
        wide = state.state2
        scales = wide.code[scales.int()] * wide.absmax[blocks // wide.blocksize] + state.offset
    return scales.float()


def rounded(weight: Float[Tensor, "O I"], method: str) -> Float[Tensor, "O I"]:
    """The matrix that a quantised layer multiplies with in place of ``weight``.

    Args:
        weight: Unquantised.
        method: ``nf4`` or ``int8``.
    """
    if method == "int8":
        return int8_values(*round_to_int8(weight), weight.dtype)
    return nf4_values(round_to_nf4(weight), weight.dtype)
