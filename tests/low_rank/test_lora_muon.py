from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fingpt_lightning.low_rank import LoRAMuon, LowRankLinear, embedding_factors, low_rank_factors
from fingpt_lightning.low_rank.linear import folded_up
from tests.low_rank.factor_networks import (
    SIZES,
    embedding_network,
    factor_groups_of,
    factor_network,
    set_gradients,
)
from tests.reference.lora_muon_step import LoRAMuonReference


def _optimizer(network: nn.Module, **of_factors: Any) -> LoRAMuon:
    return LoRAMuon(factor_groups_of(network, **of_factors), lr=0.01, betas=(0.9, 0.95))


@pytest.mark.parametrize("expansion", [0.0, 0.5])
def test_steps_are_those_of_the_formulas_in_float64(expansion: float) -> None:
    network = factor_network()
    optimizer = _optimizer(network, momentum=0.9, expansion=expansion)
    factors = low_rank_factors(network)
    layers = list(zip(factors[::2], factors[1::2], strict=True))
    references = [LoRAMuonReference(*layer) for layer in layers]
    assert len(references) == len(SIZES)
    extra = [folded_up(torch.zeros_like(up), expansion) for _, up in layers]
    start = [p.detach().clone() for p in factors]
    for step in range(4):
        set_gradients(network, step)
        for reference, layer, more in zip(references, layers, extra, strict=True):
            gradients = [p.grad for p in layer if p.grad is not None]
            reference.step(gradients, lr=0.05, momentum=0.9, decay=0.3, expansion=more)
        optimizer.step()
    for index, p in enumerate(factors):
        truth = references[index // 2].factors[index % 2]
        assert (p - start[index]).norm() > 0.01
        torch.testing.assert_close(p.detach(), truth, rtol=0, atol=1e-10)


def test_factors_of_an_embedding_move_by_the_formulas() -> None:
    network = embedding_network()
    factors = embedding_factors(network)
    group = {"params": factors, "is_low_rank": True, "is_embedding": True}
    optimizer = LoRAMuon([group], lr=0.05, weight_decay=0.3)
    pairs = list(zip(factors[::2], factors[1::2], strict=True))
    references = [LoRAMuonReference(up.T, table) for table, up in pairs]
    for step in range(3):
        set_gradients(network, step)
        for reference, (table, up) in zip(references, pairs, strict=True):
            assert table.grad is not None
            assert up.grad is not None
            reference.step([up.grad.T, table.grad], lr=0.05, momentum=0.95, decay=0.3)
        optimizer.step()
    assert len(pairs) == 3
    for reference, (table, up) in zip(references, pairs, strict=True):
        torch.testing.assert_close(up.detach().T, reference.factors[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(table.detach(), reference.factors[1], rtol=0, atol=1e-10)


def _product_after(scale: float, num_steps: int = 3) -> Tensor:
    """The product of a layer trained on a loss of its product alone, factors scaled apart."""
    torch.manual_seed(2)
    layer = LowRankLinear(11, 13, 4, bias=False).double()
    layer.down.data.mul_(scale)
    layer.up.data.div_(scale)
    target = torch.randn(13, 11, dtype=torch.float64)
    optimizer = LoRAMuon(
        [{"params": [layer.down, layer.up], "is_low_rank": True, "weight_decay": 0.5}], lr=0.1
    )
    for _ in range(num_steps):
        optimizer.zero_grad()
        (layer.up @ layer.down - target).square().sum().backward()
        optimizer.step()
    return layer.product()


def test_the_step_of_the_product_does_not_depend_on_the_scales_of_its_factors() -> None:
    truth = _product_after(1.0)
    for scale in (0.01, 7.0, 300.0):
        torch.testing.assert_close(_product_after(scale), truth, rtol=0, atol=1e-9)


def test_the_product_moves_and_decays_by_the_learning_rate_in_spectral_norm() -> None:
    for condition in (1.0, 100.0):
        network = factor_network()
        factors = low_rank_factors(network)
        for p in factors:  # some directions of a factor are all but lost
            u, s, vh = torch.linalg.svd(p.detach(), full_matrices=False)
            spread = torch.logspace(0, -torch.tensor(condition).log10(), len(s)).to(s)
            p.data = u @ torch.diag(spread) @ vh
        layers = list(zip(factors[::2], factors[1::2], strict=True))
        before = [up.detach() @ down.detach() for down, up in layers]
        set_gradients(network, 0)
        _optimizer(network, weight_decay=0.0, lr=1e-4).step()
        for (down, up), old in zip(layers, before, strict=True):
            values = torch.linalg.svdvals(up @ down - old)
            assert values[0] < 1.25e-4
            # As many directions as the factors have move, however little weight is in them.
            assert values.norm() > 0.4e-4 * len(down) ** 0.5
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    before = [up.detach() @ down.detach() for down, up in layers]
    _optimizer(network, weight_decay=0.5, lr=0.1).step()
    for (down, up), old in zip(layers, before, strict=True):
        torch.testing.assert_close(up @ down, 0.95 * old)


def test_factors_that_are_zero_stay_finite_and_a_step_wakes_them() -> None:
    network = factor_network(torch.float32)
    factors = low_rank_factors(network)
    for up in factors[1::2]:
        up.data.zero_()
    optimizer = _optimizer(network)
    for step in range(3):
        set_gradients(network, step)
        for down in factors[::2] if step == 0 else []:
            assert down.grad is not None
            down.grad.zero_()  # that of a product with a factor of zeros
        optimizer.step()
        for down, up in zip(factors[::2], factors[1::2], strict=True):
            norm = torch.linalg.matrix_norm(up @ down, 2)
            assert 0 < norm < (0.05 / 2 * 1.25 if step == 0 else float("inf"))


def test_in_float32_ill_conditioned_factors_move_as_in_float64() -> None:
    products = []
    for dtype in (torch.float64, torch.float32):
        network = factor_network()
        for p in low_rank_factors(network):
            u, s, vh = torch.linalg.svd(p.detach(), full_matrices=False)
            p.data = u @ torch.diag(torch.logspace(0, -4, len(s)).to(s)) @ vh
        network.to(dtype)
        set_gradients(network, 0)
        _optimizer(network, lr=1e-3).step()
        factors = low_rank_factors(network)
        products.append([u @ d for d, u in zip(factors[::2], factors[1::2], strict=True)])
    for truth, ours in zip(*products, strict=True):
        assert (ours.double() - truth).norm() < 0.02 * 1e-3


def test_a_decay_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lr 2.0 times weight_decay 0.5 of a group of factors is"):
        _optimizer(factor_network(), lr=2.0, weight_decay=0.5)
