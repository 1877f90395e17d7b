from typing import Any

import pytest
import torch
from torch import nn

from fingpt_lightning.low_rank import Spectron, embedding_factors, low_rank_factors
from fingpt_lightning.low_rank.spectron import spectral_norms
from tests.low_rank.factor_networks import (
    SIZES,
    embedding_network,
    factor_groups_of,
    factor_network,
    set_gradients,
)
from tests.reference.spectron_step import SpectronReference


def _optimizer(network: nn.Module, **of_factors: Any) -> Spectron:
    return Spectron(factor_groups_of(network, **of_factors), lr=0.01, betas=(0.9, 0.95))


@pytest.mark.parametrize("adjust_lr", ["none", "original"])
def test_steps_are_those_of_the_formulas_in_float64(adjust_lr: str) -> None:
    network = factor_network()
    # Small next to the step's bound, lr / (s + s + 1), is what one iteration may be off.
    optimizer = _optimizer(network, momentum=0.9, expansion=0.5, adjust_lr=adjust_lr)
    pairs = low_rank_factors(network)
    references = [SpectronReference(*pair) for pair in zip(pairs[::2], pairs[1::2], strict=True)]
    start = [p.detach().clone() for p in pairs]
    for step in range(4):
        set_gradients(network, step)
        for reference, pair in zip(
            references, zip(pairs[::2], pairs[1::2], strict=True), strict=True
        ):
            gradients = [p.grad for p in pair if p.grad is not None]
            reference.step(
                gradients,
                lr=0.05,
                momentum=0.9,
                decay=0.3,
                more=0.5,
                adjusts=adjust_lr == "original",
            )
        optimizer.step()
    assert len(references) == len(SIZES)
    for index, p in enumerate(pairs):
        truth = references[index // 2].factors[index % 2]
        moved = (truth - start[index]).norm()
        assert (p - truth).norm() < 0.01 * moved, index


def test_warm_power_iteration_follows_the_largest_singular_value() -> None:
    matrices = torch.randn(2, 5, 13, dtype=torch.float64)
    vectors = torch.randn(2, 5, dtype=torch.float64)
    _, vectors = spectral_norms(matrices, vectors, num_iterations=60)
    for _ in range(20):
        matrices += 0.01 * torch.randn_like(matrices)
        norms, vectors = spectral_norms(matrices, vectors)
        truth = torch.linalg.matrix_norm(matrices, 2)
        assert (norms <= truth + 1e-12).all()
        torch.testing.assert_close(norms, truth, rtol=0.01, atol=0)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2, dtype=torch.float64))
    zero = spectral_norms(torch.zeros_like(matrices), vectors)
    assert zero[0].count_nonzero() == 0
    assert torch.equal(zero[1], vectors)


def test_vectors_follow_the_factors_from_step_to_step() -> None:
    network = factor_network()
    optimizer = _optimizer(network, lr=0.0)
    set_gradients(network, 0)
    optimizer.step()
    pairs = low_rank_factors(network)
    for p in pairs:
        p.data = torch.linalg.qr(torch.randn(13, 13, dtype=torch.float64))[0][: len(p), : len(p.T)]
        p.data[0] *= 3
    for _ in range(40):
        optimizer.step()
    for p in pairs:
        wide = p.detach() if p.shape[0] <= p.shape[1] else p.detach().T
        norm = (wide.T @ optimizer.state[p]["left_vector"]).norm()
        assert norm > 0.99 * torch.linalg.matrix_norm(wide, 2)


def test_the_product_moves_by_no_more_than_the_learning_rate_in_spectral_norm() -> None:
    for scale in (0.01, 1.0, 30.0):
        network = factor_network()
        pairs = low_rank_factors(network)
        for p in pairs[::2]:  # one factor large, the other small
            p.data *= scale
        for p in pairs[1::2]:
            p.data /= scale
        optimizer = _optimizer(network, weight_decay=0.0, lr=0.1)
        set_gradients(network, 0)
        before = [up @ down for down, up in zip(pairs[::2], pairs[1::2], strict=True)]
        optimizer.step()
        after = [up @ down for down, up in zip(pairs[::2], pairs[1::2], strict=True)]
        for old, new in zip(before, after, strict=True):
            assert torch.linalg.matrix_norm(new - old, 2) < 0.1 * 1.2**2


def test_factors_of_an_embedding_move_by_the_formulas() -> None:
    network = embedding_network()
    factors = embedding_factors(network)
    group = {"params": factors, "is_low_rank": True, "is_embedding": True, "adjust_lr": "original"}
    optimizer = Spectron([group], lr=0.01, weight_decay=0.3)
    references = [SpectronReference(*x) for x in zip(factors[::2], factors[1::2], strict=True)]
    start = [p.detach().clone() for p in factors]
    for step in range(3):
        set_gradients(network, step)
        for index, reference in enumerate(references):
            gradients = [p.grad for p in factors[2 * index : 2 * index + 2] if p.grad is not None]
            reference.step(gradients, lr=0.01, momentum=0.95, decay=0.3, adjusts=True)
        optimizer.step()
    assert len(factors) == 6
    for index, p in enumerate(factors):
        truth = references[index // 2].factors[index % 2]
        assert (p - truth).norm() < 0.01 * (truth - start[index]).norm(), index
