from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fingpt_lightning.low_rank import LowRankLinear
from tests.support.numerics import assert_no_worse


def test_full_rank_from_a_dense_layer_equals_it_gradients_included() -> None:
    dense = nn.Linear(7, 11, dtype=torch.float64)
    layer = LowRankLinear.from_dense(dense.weight, dense.bias, rank=7)
    x = torch.randn(3, 5, 7, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [dense(inputs[0]), layer(inputs[1])]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-12)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=0, atol=1e-11)
    assert layer.bias is not None
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_as_near_the_truth_as_plain_torch(dtype: torch.dtype) -> None:
    layer = LowRankLinear(33, 21, rank=5).to(dtype)
    x = torch.randn(17, 33, dtype=dtype)
    truth = x.double() @ (layer.up.double() @ layer.down.double()).T
    assert_no_worse(layer(x), plain=(x @ layer.down.T) @ layer.up.T, truth=truth)


def test_a_fused_layer_is_three_layers_with_one_down() -> None:
    fused = LowRankLinear(8, 24, rank=3, bias=False)
    x = torch.randn(2, 8)
    for part, up in zip(fused(x).chunk(3, dim=-1), fused.up.chunk(3), strict=True):
        torch.testing.assert_close(part, F.linear(F.linear(x, fused.down), up))


def test_initial_factors_are_the_truncated_draw() -> None:
    layer = LowRankLinear(40, 60, rank=40, bias=True)
    layer.reset_parameters(0.02, torch.Generator().manual_seed(3))
    drawn = torch.empty(60, 40).normal_(std=0.02, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(layer.up @ layer.down, drawn, rtol=0, atol=1e-6)
    assert layer.bias is not None
    assert layer.bias.count_nonzero() == 0


def test_a_rank_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 9 is outside \[1, 8\]"):
        LowRankLinear(8, 24, rank=9)


@pytest.mark.parametrize(("out_features", "rank"), [(24, 3), (11, 4), (5, 5)])
def test_a_folded_expansion_is_the_same_map(out_features: int, rank: int) -> None:
    layer = LowRankLinear(8, out_features, rank, expansion=0.7).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    z = x @ layer.down.T
    repeats = -(-out_features // rank)
    expanded = torch.stack([z[:, i % rank] for i in range(out_features)], 1)
    truth = z @ layer.up.T + 0.7 / repeats**0.5 * expanded
    unfolded = layer(x)
    torch.testing.assert_close(unfolded, truth, rtol=0, atol=1e-14)
    product = layer.product()
    layer.fold()
    assert layer.expansion == 0
    torch.testing.assert_close(layer(x), unfolded, rtol=0, atol=1e-14)
    torch.testing.assert_close(layer.up @ layer.down, product, rtol=0, atol=1e-14)


def test_an_activation_stands_between_the_factors_and_no_matrix_for_both() -> None:
    layer = LowRankLinear(8, 11, rank=3, activation="silu")
    x = torch.randn(2, 8)
    truth = F.linear(F.silu(F.linear(x, layer.down)), layer.up, layer.bias)
    assert torch.equal(layer(x), truth)
    with pytest.raises(
        ValueError, match="a low-rank layer with silu between its factors is not a linear map"
    ):
        layer.product()


@pytest.mark.parametrize("expansion", [0.0, 0.7])
def test_a_guide_starts_as_the_product_and_takes_its_share_in_training_alone(
    expansion: float,
) -> None:
    layer = LowRankLinear(8, 11, rank=3, expansion=expansion).double()
    assert layer.bias is not None
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    alone = layer(x)
    layer.add_guide()
    assert layer.guide is not None
    assert layer.guide_share is not None
    torch.testing.assert_close(layer.train()(x), alone, rtol=0, atol=1e-14)
    nn.init.normal_(layer.guide)
    for share in (1.0, 0.3):
        layer.guide_share.fill_(share)
        truth = x @ (share * layer.guide + (1 - share) * layer.product()).T + layer.bias
        torch.testing.assert_close(layer.train()(x), truth, rtol=0, atol=1e-14)
        assert torch.equal(layer.eval()(x), alone)
    layer.drop_guide()
    assert layer.state_dict().keys() == {"down", "up", "bias"}
    assert not list(layer.buffers())
    assert torch.equal(layer.train()(x), alone)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "gelu"}, "activation 'gelu' is none of"),
        ({"activation": "silu", "expansion": 0.5}, "expansion 0.5 cannot be folded behind silu"),
    ],
)
def test_what_a_pair_cannot_do_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankLinear(8, 11, rank=3, **settings)
