import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fingpt_lightning.low_rank import factorize


@given(rows=st.integers(1, 13), columns=st.integers(1, 13), seed=st.integers(0, 9))
def test_full_rank_gives_the_weight_back(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    factors = factorize(weight, min(rows, columns))
    torch.testing.assert_close(factors.up @ factors.down, weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(11, 7), (7, 11)])
def test_truncation_is_as_near_as_the_singular_value_decomposition(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, dtype=torch.float64)
    for rank in range(1, 8):
        factors = factorize(weight, rank)
        left_out = torch.linalg.svdvals(weight)[rank:]
        distance = torch.linalg.matrix_norm(weight - factors.up @ factors.down)
        torch.testing.assert_close(distance, left_out.norm(), rtol=1e-9, atol=1e-11)


def test_factors_share_the_singular_values_evenly() -> None:
    factors = factorize(torch.randn(9, 5, dtype=torch.float64), 3)
    gram_up, gram_down = factors.up.T @ factors.up, factors.down @ factors.down.T
    torch.testing.assert_close(gram_up, gram_down, rtol=1e-9, atol=1e-9)


def test_a_weight_of_lower_rank_leaves_finite_factors() -> None:
    weight = torch.zeros(5, 4)
    weight[0, 0] = 3.0
    factors = factorize(weight, 4)
    assert factors.up.isfinite().all()
    torch.testing.assert_close(factors.up @ factors.down, weight)


@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} is outside \[1, 4\]"):
        factorize(torch.zeros(5, 4), rank)
