import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.numerics import assert_no_worse


def _product(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(11, 13, generator=generator, dtype=torch.float64).to(dtype)
    right = torch.randn(13, 7, generator=generator, dtype=torch.float64).to(dtype)
    return left @ right, left.double() @ right.double()


@given(dtype=st.sampled_from([torch.bfloat16, torch.float32]), seed=st.integers(0, 99))
def test_plain_itself_and_the_rounded_truth_pass(dtype: torch.dtype, seed: int) -> None:
    plain, truth = _product(dtype, seed)
    assert_no_worse(plain, plain, truth)
    assert_no_worse(truth.to(dtype), plain, truth)
    assert_no_worse(truth.to(dtype), truth.to(dtype), truth)


def test_the_last_bit_of_one_element_passes_where_plain_is_exact() -> None:
    plain, _ = _product(torch.float32)
    ours = plain.clone()
    ours[2, 5] = torch.nextafter(ours[2, 5], torch.tensor(torch.inf))
    assert_no_worse(ours, plain, plain.double())


@given(factor=st.floats(1.2, 9.0))
def test_an_error_above_the_slack_fails(factor: float) -> None:
    plain, truth = _product(torch.bfloat16)
    worse = (truth + factor * (plain.double() - truth)).float()
    with pytest.raises(AssertionError, match=r"slack 1\.1"):
        assert_no_worse(worse, plain.float(), truth)
    assert_no_worse(worse, plain.float(), truth, slack=factor * 1.01)


def test_two_swapped_elements_fail() -> None:
    plain, truth = _product(torch.bfloat16)
    swapped = plain.clone()
    swapped[0, :2] = plain[0, :2].flip(0)
    with pytest.raises(AssertionError, match="is above"):
        assert_no_worse(swapped, plain, truth)


def test_a_nan_fails() -> None:
    plain, truth = _product(torch.float32)
    ours = plain.clone()
    ours[3, 3] = torch.nan
    with pytest.raises(AssertionError, match="error nan"):
        assert_no_worse(ours, plain, truth)


def test_another_shape_or_dtype_fails() -> None:
    plain, truth = _product(torch.float32)
    with pytest.raises(AssertionError, match="float64"):
        assert_no_worse(plain.double(), plain, truth)
    with pytest.raises(AssertionError, match="10, 7"):
        assert_no_worse(plain[1:], plain, truth)


def test_a_truth_that_judges_nothing_is_refused() -> None:
    plain, truth = _product(torch.float32)
    with pytest.raises(ValueError, match=r"not torch\.float32"):
        assert_no_worse(plain, plain, plain)
    with pytest.raises(ValueError, match="finite"):
        assert_no_worse(plain, plain, truth * torch.inf)
