"""What all optimizers of factors do: dense matrices by Muon, the rest by AdamW, exact resuming."""

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fingpt_lightning.low_rank import LoRAMuon, Spectron, factor_optimizer, low_rank_factors
from fingpt_lightning.low_rank.factor_optimizer import (
    FactorOptimizer,
    has_exact_grams,
    orthogonalized,
    wide,
)
from tests.low_rank.factor_networks import factor_groups_of, factor_network, set_gradients
from tests.reference.spectron_step import newton_schulz


@pytest.fixture(params=[Spectron, LoRAMuon])
def kind(request: pytest.FixtureRequest) -> type[FactorOptimizer]:
    found: type[FactorOptimizer] = request.param
    return found


def _made(kind: type[FactorOptimizer], network: nn.Module, **of_factors: Any) -> FactorOptimizer:
    return kind(factor_groups_of(network, **of_factors), lr=0.01, betas=(0.9, 0.95))


def test_dense_matrices_are_moved_by_the_learning_rate_along_orthogonalized_momentum(
    kind: type[FactorOptimizer],
) -> None:
    matrices = [nn.Parameter(torch.randn(size, dtype=torch.float64)) for size in ((5, 7), (7, 5))]
    optimizer = kind([{"params": matrices, "is_dense": True}], lr=0.1)
    truths = [p.detach().clone() for p in matrices]
    momenta = [torch.zeros_like(p) for p in matrices]
    for _ in range(3):
        for index, p in enumerate(matrices):
            p.grad = torch.randn_like(p)
            momenta[index] = 0.95 * momenta[index] + p.grad
            truths[index] -= 0.1 * newton_schulz(p.grad + 0.95 * momenta[index])
        optimizer.step()
    for p, truth in zip(matrices, truths, strict=True):
        torch.testing.assert_close(p.detach(), truth, rtol=0, atol=1e-10)


def test_wide_matrices_are_orthogonalized_by_their_grams_as_exactly_as_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for condition in (1, 100, 1e8):
        u, s, vh = torch.linalg.svd(torch.randn(3, 8, 13, dtype=torch.float64), full_matrices=False)
        s = torch.logspace(0, -math.log10(condition), 8, dtype=s.dtype).expand_as(s)
        matrices = (u * s[:, None]) @ vh
        truth = torch.stack([newton_schulz(matrix) for matrix in matrices])
        assert has_exact_grams(matrices.float())
        torch.testing.assert_close(orthogonalized(matrices), truth, rtol=0, atol=1e-10)
        error = (orthogonalized(matrices.float()) - truth).norm() / truth.norm()
        assert error < 1e-3
    assert not has_exact_grams(matrices.bfloat16())
    assert not has_exact_grams(torch.ones(10, 14))
    monkeypatch.setattr(factor_optimizer, "is_exact", lambda _: False)
    assert not has_exact_grams(matrices.float())
    assert has_exact_grams(matrices)
    ours = orthogonalized(matrices.float())  # the long way
    assert (ours - truth).norm() < 1e-4 * truth.norm()


def test_orthogonalizing_keeps_singular_vectors_and_evens_values_out() -> None:
    matrices = torch.randn(3, 5, 13, dtype=torch.float64)
    ours = orthogonalized(matrices)
    for one, matrix in zip(ours, matrices, strict=True):
        torch.testing.assert_close(one, newton_schulz(matrix), rtol=0, atol=1e-10)
        values = torch.linalg.svdvals(one)
        assert 0.6 < values.min() <= values.max() < 1.25
    assert orthogonalized(torch.zeros(2, 3)).count_nonzero() == 0


@pytest.mark.parametrize("by_grams", [True, False])
def test_standing_matrices_and_scales_change_nothing_else(
    by_grams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factor_optimizer, "has_exact_grams", lambda _: by_grams)
    matrices = torch.randn(3, 13, 5, dtype=torch.float64)
    truth = torch.stack([newton_schulz(matrix) for matrix in matrices])
    torch.testing.assert_close(orthogonalized(matrices), truth, rtol=0, atol=1e-10)
    torch.testing.assert_close(orthogonalized(matrices.mT), truth.mT, rtol=0, atol=1e-10)
    scales = torch.tensor([0.5, -3.0, 0.0], dtype=torch.float64)
    scaled = scales[:, None, None] * truth
    torch.testing.assert_close(orthogonalized(matrices, scales), scaled, rtol=0, atol=1e-10)
    ours = orthogonalized(matrices[1], scales[1])
    torch.testing.assert_close(ours, scaled[1], rtol=0, atol=1e-10)


def test_everything_else_is_moved_by_torchs_adamw(kind: type[FactorOptimizer]) -> None:
    ours, theirs = factor_network(), factor_network()
    optimizer = _made(kind, ours)
    reference = torch.optim.AdamW(factor_groups_of(theirs)[:1], lr=0.01, betas=(0.9, 0.95))
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
    pairs = factor_groups_of(ours), factor_groups_of(theirs)
    for one, other in zip(*(groups[0]["params"] for groups in pairs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_a_run_that_was_stopped_goes_on_to_the_bit(kind: type[FactorOptimizer]) -> None:
    whole = factor_network()
    optimizer = _made(kind, whole)
    for step in range(5):
        set_gradients(whole, step)
        optimizer.step()
        if step == 1:
            stored = io.BytesIO()
            torch.save([whole.state_dict(), optimizer.state_dict()], stored)
    stored.seek(0)
    weights, state = torch.load(stored, weights_only=True)
    resumed = factor_network()
    resumed.load_state_dict(weights)
    optimizer = _made(kind, resumed, lr=0.9, momentum=0.0)  # replaced by the stored ones
    optimizer.load_state_dict(state)
    for step in range(2, 5):
        set_gradients(resumed, step)
        optimizer.step()
    for ours, truth in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, truth)


def test_many_factors_are_taken_some_at_a_time(
    kind: type[FactorOptimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[list[Tensor]] = []
    for at_a_time in (2**24, 100):
        monkeypatch.setattr(factor_optimizer, "_NUMBERS_AT_A_TIME", at_a_time)
        network = factor_network()
        optimizer = _made(kind, network)
        set_gradients(network, 0)
        optimizer.step()
        weights.append(list(network.parameters()))
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_a_layer_without_gradients_stays_and_a_closure_is_called(
    kind: type[FactorOptimizer],
) -> None:
    network = factor_network()
    optimizer = _made(kind, network)
    set_gradients(network, 0)
    down, up, *_ = low_rank_factors(network)
    down.grad = None
    before = [p.detach().clone() for p in (down, up)]

    def closure() -> float:
        assert torch.is_grad_enabled()
        return 3.5

    assert optimizer.step(closure) == 3.5
    assert torch.equal(down, before[0])
    assert torch.equal(up, before[1])


def test_bfloat16_products_move_float32_factors_nearly_alike(kind: type[FactorOptimizer]) -> None:
    networks = [factor_network(torch.float32) for _ in range(2)]
    start = [p.detach().clone() for p in low_rank_factors(networks[0])]
    for network, dtype in zip(networks, (None, torch.bfloat16), strict=True):
        optimizer = kind(factor_groups_of(network), lr=0.01, product_dtype=dtype)
        set_gradients(network, 0)
        optimizer.step()
    for one, other, before in zip(*map(low_rank_factors, networks), start, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert (one - other).norm() < 0.05 * (one - before).norm()
        assert torch.equal(one, other) == has_exact_grams(wide(one))


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda pairs: pairs[:3], "a group of factors has 3 parameters, which is odd"),
        (lambda pairs: pairs[:1] + pairs[2:3], r"parameters 0 and 1 .* \(5, 11\) and \(5, 11\)"),
    ],
)
def test_neighbors_that_are_not_factors_of_one_layer_are_refused(
    kind: type[FactorOptimizer], choose: Callable[[Any], Any], message: str
) -> None:
    chosen = choose(low_rank_factors(factor_network()))
    with pytest.raises(ValueError, match=message):
        kind([{"params": chosen, "is_low_rank": True}])


def test_factors_of_layers_are_not_those_of_an_embedding() -> None:
    factors = low_rank_factors(factor_network())
    message = r"are \(5, 11\) and \(13, 5\): not table \(V, R\) and up \(D, R\)"
    with pytest.raises(ValueError, match=message):
        Spectron([{"params": factors, "is_low_rank": True, "is_embedding": True}])
