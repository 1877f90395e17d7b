import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from fingpt_lightning.models.quantization.layers import quantized_matrix
from fingpt_lightning.models.quantization.nf4_linear import NF4Linear
from fingpt_lightning.models.quantization.rounding import (
    NF4_BLOCK,
    nf4_rows,
    nf4_values,
    round_to_int8,
    round_to_nf4,
    rounded,
)
from tests.reference.rounding import nearest_int8, nearest_nf4

SHAPES = [(7, 22), (5, 11), (30, 96), (65, 224), (9, 400), (13, 64), (70, 16)]
"""Rows whose blocks end with them, and those whose blocks do not."""


def _weight(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@example(rows=59, columns=66, seed=47)
@given(rows=st.integers(1, 70), columns=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_int8_is_the_nearest_of_254_steps_of_each_row(rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[seed % rows] = 0
    made = rounded(weight, "int8")
    step = weight.double().abs().amax(1, keepdim=True) / 127
    # Halfway between two steps, to rounding in float32, either is the nearest.
    is_tie = ((weight / step).frac().abs() - 0.5).abs() < 1e-4
    expected = torch.where(is_tie, made.double(), nearest_int8(weight))
    torch.testing.assert_close(made.double(), expected, rtol=1e-6, atol=1e-7)
    assert ((made - weight.double()).abs() <= 0.5001 * step).all()
    # What was rounded once is not changed by rounding again.
    torch.testing.assert_close(rounded(made, "int8"), made, rtol=1e-6, atol=1e-7)
    assert round_to_int8(weight).codes.abs().amax() <= 127


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_the_nearest_of_16_levels_of_each_block(shape: tuple[int, int]) -> None:
    weight = _weight(shape)
    scales = nf4_values(round_to_nf4(weight), torch.float32).double()
    expected = nearest_nf4(weight, NF4_BLOCK)
    # The scales of blocks are rounded too, by one step in about a hundred.
    assert (scales - expected).norm() < 0.02 * expected.norm()
    assert (rounded(weight, "nf4") - weight).norm() < 0.105 * weight.norm()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_some_rows_of_nf4_are_those_of_the_whole(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    matrix = round_to_nf4(_weight(shape))
    whole = nf4_values(matrix, dtype)
    ids = torch.tensor([shape[0] - 1, 0, 3, 3])
    torch.testing.assert_close(nf4_rows(matrix, ids, dtype), whole[ids], rtol=0, atol=0)
    if shape[0] > 64:
        assert torch.equal(nf4_values(matrix, dtype, 64), whole[64:])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_a_quantised_layer_multiplies_with_the_rounded_matrix_and_passes_gradients(
    shape: tuple[int, int], method: str
) -> None:
    weight = _weight(shape)
    layer = quantized_matrix(weight, method, torch.device("cpu"))
    plain = nn.Linear(shape[1], shape[0], bias=False)
    plain.weight.data = rounded(weight, method)
    x = torch.randn(3, 2, shape[1])
    results = []
    for made in (layer, plain):
        leaf = x.clone().requires_grad_()
        out = made(leaf)
        out.square().sum().backward()
        results.append((out.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), results[1][0], rtol=1e-5, atol=1e-5)
        wide = quantized_matrix(weight.double(), method, torch.device("cpu"))
        expected = x.double() @ plain.weight.double().T
        torch.testing.assert_close(wide(x.double()), expected, rtol=1e-6, atol=1e-6)


def test_bitsandbytes_still_needs_the_help() -> None:
    # When this fails, NF4Linear need no longer dequantise on its own.
    weight = _weight((65, 224))
    layer = quantized_matrix(weight, "nf4", torch.device("cpu")).eval()
    assert isinstance(layer, NF4Linear)
    x = torch.randn(3, 224)
    with torch.no_grad():
        theirs = super(NF4Linear, layer).forward(x)
    expected = x @ weight.T
    assert (theirs - expected).norm() > 0.15 * expected.norm()
    assert (layer(x) - expected).norm() < 0.12 * expected.norm()
