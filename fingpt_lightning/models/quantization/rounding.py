"""Matrices rounded to int8 by row or to NF4 by block, and the numbers that their codes stand for.

Axes: O rows, I columns, N requested rows.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from fingpt_lightning.models.quantization.gptq import round_with_feedback

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


def round_to_int8(
    weight: Float[Tensor, "O I"], moments: Float[Tensor, "I I"] | None = None
) -> Int8Matrix:
    """Rounds each row to multiples of 1/127 of its largest magnitude.

    Args:
        weight: Unquantized weight.
        moments: Moments as in `rounded`.
    """
    wide = weight.detach().float()
    scales = wide.abs().amax(1)
    steps = scales.clamp_min(torch.finfo(torch.float32).tiny) / _INT8_LEVELS
    if moments is not None:

        def nearest(column: Tensor, _: int) -> Tensor:
            return (column / steps).round_().clamp_(-_INT8_LEVELS, _INT8_LEVELS) * steps

        wide = round_with_feedback(wide, moments, nearest)
    return Int8Matrix((wide / steps[:, None]).round_().to(torch.int8), scales)


def int8_values(
    codes: Int8[Tensor, "O I"], scales: Float[Tensor, "O"], dtype: torch.dtype
) -> Float[Tensor, "O I"]:
    """What the codes of `round_to_int8` stand for."""
    return (codes * (scales / _INT8_LEVELS)[:, None]).to(dtype)


def round_to_nf4(
    weight: Float[Tensor, "O I"], moments: Float[Tensor, "I I"] | None = None
) -> NF4Matrix:
    """Rounds each block to 16 levels, its scale to one of 256.

    Args:
        weight: Unquantized weight.
        moments: Moments as in `rounded`.

    Source: https://arxiv.org/abs/2305.14314, section 3.
    """
    from bitsandbytes.functional import quantize_4bit  # takes a second

    wide = weight.detach().float().contiguous()
    codes, state = quantize_4bit(
        wide, blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=True
    )
    if moments is not None:
        codes = _nf4_codes_with_feedback(wide, moments, state)
    return NF4Matrix(codes, state)


def _nf4_codes_with_feedback(weight: Tensor, moments: Tensor, state: Any) -> Tensor:
    levels = state.code.float()
    between = (levels[1:] + levels[:-1]) / 2
    blocks = torch.arange(len(state.absmax), device=weight.device)
    scales = _scales(state, blocks).clamp_min(torch.finfo(torch.float32).tiny)
    scales = scales.repeat_interleave(state.blocksize)[: weight.numel()].view(weight.shape)
    columns = scales.T.contiguous()

    def nearest(column: Tensor, place: int) -> Tensor:
        scale = columns[place]
        level: Tensor = levels[torch.bucketize(column / scale, between)]
        return level * scale

    made = round_with_feedback(weight, moments, nearest)
    places = torch.bucketize(made / scales, between).to(torch.uint8).view(-1)
    if len(places) % 2:
        places = torch.cat([places, places.new_zeros(1)])
    return (places[::2] << 4 | places[1::2]).unsqueeze(1)


def nf4_values(
    matrix: NF4Matrix, dtype: torch.dtype, first: int = 0, end: int | None = None
) -> Float[Tensor, "O I"]:
    """What codes stand for.

    Args:
        matrix: Matrix of blocks of any size.
        dtype: Dtype of the result.
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


def rounded(
    weight: Float[Tensor, "O I"], method: str, moments: Float[Tensor, "I I"] | None = None
) -> Float[Tensor, "O I"]:
    """The matrix that a quantized layer uses in place of ``weight``.

    Args:
        weight: Unquantized weight.
        method: ``nf4`` or ``int8``.
        moments: Moments of the layer's inputs: the outputs are kept, as `round_with_feedback` does
            it, under the same scales. None rounds each number to its nearest.
    """
    if method == "int8":
        return int8_values(*round_to_int8(weight, moments), weight.dtype)
    return nf4_values(round_to_nf4(weight, moments), weight.dtype)
