"""A block's factors are trained, rounded as they are stored, and kept where they are better."""

import math

import pytest
import torch
from torch import Tensor, nn

from fingpt_lightning.decomposition import refinement
from fingpt_lightning.decomposition.refinement import refine_block
from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.low_rank.factorize import Factors
from fingpt_lightning.models.block_calls import BlockCall

_WIDTH, _RANK = 16, 4


def _work(num_batches: int = 3) -> tuple[nn.Module, list[BlockCall], list[Tensor]]:
    """A block of one low-rank layer, calls of it, and outputs of the dense layer it stands for."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_WIDTH, _WIDTH, generator=generator) / _WIDTH**0.5
    u, s, v = torch.linalg.svd(weight)
    root = s[:_RANK].sqrt()
    factors = Factors(u[:, :_RANK] * root, (v[:_RANK].T * root).T)
    block = nn.Sequential(LowRankLinear.from_factors(factors, None))
    inputs = [torch.randn(2, 8, _WIDTH, generator=generator) for _ in range(num_batches)]
    # Inputs of unequal size: truncating the weight alone is not the best.
    inputs = [x * torch.linspace(0.1, 3, _WIDTH) for x in inputs]
    calls: list[BlockCall] = [(x, (), {}) for x in inputs]
    return block, calls, [x @ weight.T for x in inputs]


def _relative_error(block: nn.Module, calls: list[BlockCall], targets: list[Tensor]) -> float:
    with torch.no_grad():
        errors = [
            (block(call[0]) - target).square().sum(-1) / target.square().sum(-1)
            for call, target in zip(calls, targets, strict=True)
        ]
    return math.sqrt(torch.cat(errors).double().mean().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_that_of_the_stored_factors(dtype: torch.dtype) -> None:
    block, calls, targets = _work()
    before, after = refine_block(block, calls, targets, 40, seed=0, dtype=dtype)
    assert after < before
    for factor in block.parameters():
        torch.testing.assert_close(factor, factor.to(dtype).to(torch.float32), rtol=0, atol=0)
    assert after == pytest.approx(_relative_error(block, calls, targets), rel=1e-6)


def test_steps_that_make_it_worse_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    block, calls, targets = _work()
    monkeypatch.setattr(refinement, "LEARNING_RATE", 50.0)
    start = [factor.bfloat16().float() for factor in block.parameters()]
    before, after = refine_block(block, calls, targets, 5, seed=0, dtype=torch.bfloat16)
    assert before == after == pytest.approx(_relative_error(block, calls, targets), rel=1e-6)
    for factor, old in zip(block.parameters(), start, strict=True):
        torch.testing.assert_close(factor.detach(), old, rtol=0, atol=0)


def test_a_block_that_is_not_finite_is_named_before_a_step() -> None:
    block, calls, targets = _work()
    with torch.no_grad():
        next(block.parameters()).fill_(math.inf)
    with pytest.raises(FloatingPointError, match="not finite on the calibration text"):
        refine_block(block, calls, targets, 5, seed=0)
