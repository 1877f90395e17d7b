import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fingpt_lightning.low_rank import LowRankLinear, Spectron, low_rank_factors
from fingpt_lightning.low_rank import spectron as implementation
from fingpt_lightning.low_rank.spectron import orthogonalized, spectral_norms
from tests.reference.spectron_step import PairReference, newton_schulz

# Two of one size, one whose factors lie the other way round, one of full rank, one alone.
SIZES = [(11, 13, 5), (11, 13, 5), (13, 11, 5), (7, 11, 7), (13, 7, 3)]


def _network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Sequential(LowRankLinear(*size), nn.LayerNorm(size[1])) for size in SIZES]
    return nn.Sequential(*layers, nn.Embedding(5, 7)).to(dtype)


def _groups(network: nn.Module, **of_pairs: Any) -> list[dict[str, Any]]:
    pairs = low_rank_factors(network)
    taken = {id(p) for p in pairs}
    rest = [p for p in network.parameters() if id(p) not in taken]
    return [
        {"params": rest, "weight_decay": 0.1},
        {"params": pairs, "is_low_rank": True, "lr": 0.05, "weight_decay": 0.3, **of_pairs},
    ]


def _optimizer(network: nn.Module, **of_pairs: Any) -> Spectron:
    return Spectron(_groups(network, **of_pairs), lr=0.01, betas=(0.9, 0.95))


def _set_gradients(network: nn.Module, step: int) -> None:
    stream = torch.Generator().manual_seed(step)
    for p in network.parameters():
        p.grad = torch.randn(p.shape, generator=stream, dtype=torch.float64).to(p)


def test_steps_are_those_of_the_formulas_in_float64() -> None:
    network = _network()
    # Small next to the step's bound, lr / (s + s + 1), is what one iteration may be off.
    optimizer = _optimizer(network, momentum=0.9, expansion=0.5)
    pairs = low_rank_factors(network)
    references = [PairReference(*pair) for pair in zip(pairs[::2], pairs[1::2], strict=True)]
    start = [p.detach().clone() for p in pairs]
    for step in range(4):
        _set_gradients(network, step)
        for reference, pair in zip(
            references, zip(pairs[::2], pairs[1::2], strict=True), strict=True
        ):
            gradients = [p.grad for p in pair if p.grad is not None]
            reference.step(gradients, lr=0.05, momentum=0.9, decay=0.3, more=0.5)
        optimizer.step()
    assert len(references) == len(SIZES)
    for index, p in enumerate(pairs):
        truth = references[index // 2].factors[index % 2]
        moved = (truth - start[index]).norm()
        assert (p - truth).norm() < 0.01 * moved, index


def test_dense_matrices_are_moved_by_the_learning_rate_along_orthogonalised_momentum() -> None:
    matrices = [nn.Parameter(torch.randn(size, dtype=torch.float64)) for size in ((5, 7), (7, 5))]
    optimizer = Spectron([{"params": matrices, "is_dense": True}], lr=0.1)
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


def test_orthogonalising_keeps_singular_vectors_and_evens_values_out() -> None:
    matrices = torch.randn(3, 5, 13, dtype=torch.float64)
    ours = orthogonalized(matrices)
    for one, matrix in zip(ours, matrices, strict=True):
        torch.testing.assert_close(one, newton_schulz(matrix), rtol=0, atol=1e-10)
        values = torch.linalg.svdvals(one)
        assert 0.6 < values.min() <= values.max() < 1.25
    assert orthogonalized(torch.zeros(2, 3)).count_nonzero() == 0


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
    network = _network()
    optimizer = _optimizer(network, lr=0.0)
    _set_gradients(network, 0)
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


def test_everything_else_is_moved_by_torchs_adamw() -> None:
    ours, theirs = _network(), _network()
    optimizer = _optimizer(ours)
    reference = torch.optim.AdamW(_groups(theirs)[:1], lr=0.01, betas=(0.9, 0.95))
    for step in range(3):
        _set_gradients(ours, step)
        _set_gradients(theirs, step)
        optimizer.step()
        reference.step()
    pairs = _groups(ours), _groups(theirs)
    for one, other in zip(*(groups[0]["params"] for groups in pairs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_a_run_that_was_stopped_goes_on_to_the_bit() -> None:
    whole = _network()
    optimizer = _optimizer(whole)
    for step in range(5):
        _set_gradients(whole, step)
        optimizer.step()
        if step == 1:
            stored = io.BytesIO()
            torch.save([whole.state_dict(), optimizer.state_dict()], stored)
    stored.seek(0)
    weights, state = torch.load(stored, weights_only=True)
    resumed = _network()
    resumed.load_state_dict(weights)
    optimizer = _optimizer(resumed, lr=9.0, momentum=0.0)  # replaced by the stored ones
    optimizer.load_state_dict(state)
    for step in range(2, 5):
        _set_gradients(resumed, step)
        optimizer.step()
    for ours, truth in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, truth)


def test_the_product_moves_by_no_more_than_the_learning_rate_in_spectral_norm() -> None:
    for scale in (0.01, 1.0, 30.0):
        network = _network()
        pairs = low_rank_factors(network)
        for p in pairs[::2]:  # one factor large, the other small
            p.data *= scale
        for p in pairs[1::2]:
            p.data /= scale
        optimizer = _optimizer(network, weight_decay=0.0, lr=0.1)
        _set_gradients(network, 0)
        before = [up @ down for down, up in zip(pairs[::2], pairs[1::2], strict=True)]
        optimizer.step()
        after = [up @ down for down, up in zip(pairs[::2], pairs[1::2], strict=True)]
        for old, new in zip(before, after, strict=True):
            assert torch.linalg.matrix_norm(new - old, 2) < 0.1 * 1.2**2


def test_many_factors_are_taken_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[list[Tensor]] = []
    for at_a_time in (2**24, 100):
        monkeypatch.setattr(implementation, "_NUMBERS_AT_A_TIME", at_a_time)
        network = _network()
        optimizer = _optimizer(network)
        _set_gradients(network, 0)
        optimizer.step()
        weights.append(list(network.parameters()))
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_a_pair_without_gradients_stays_and_a_closure_is_called() -> None:
    network = _network()
    optimizer = _optimizer(network)
    _set_gradients(network, 0)
    down, up, *_ = low_rank_factors(network)
    down.grad = None
    before = [p.detach().clone() for p in (down, up)]

    def closure() -> float:
        assert torch.is_grad_enabled()
        return 3.5

    assert optimizer.step(closure) == 3.5
    assert torch.equal(down, before[0])
    assert torch.equal(up, before[1])


def test_bfloat16_products_move_float32_factors_nearly_alike() -> None:
    networks = [_network(torch.float32) for _ in range(2)]
    start = [p.detach().clone() for p in low_rank_factors(networks[0])]
    for network, dtype in zip(networks, (None, torch.bfloat16), strict=True):
        optimizer = Spectron(_groups(network), lr=0.01, product_dtype=dtype)
        _set_gradients(network, 0)
        optimizer.step()
    for one, other, before in zip(*map(low_rank_factors, networks), start, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert (one - other).norm() < 0.05 * (one - before).norm()
        assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda pairs: pairs[:3], "a group of factors has 3 parameters, which is odd"),
        (lambda pairs: pairs[:1] + pairs[2:3], r"parameters 0 and 1 .* \(5, 11\) and \(5, 11\)"),
    ],
)
def test_what_is_no_pair_is_refused(choose: Callable[[Any], Any], message: str) -> None:
    chosen = choose(low_rank_factors(_network()))
    with pytest.raises(ValueError, match=message):
        Spectron([{"params": chosen, "is_low_rank": True}])
