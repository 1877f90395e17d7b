import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fingpt_lightning.low_rank.adapters import AdaptedLinear, AdapterOptions, SharedDown


def _layer(
    options: AdapterOptions, bias: bool = True, dtype: torch.dtype = torch.float64
) -> AdaptedLinear:
    base = nn.Linear(7, 11, bias, dtype=dtype)
    layer = AdaptedLinear(base, 7, 11, options, torch.promote_types(dtype, torch.float32))
    nn.init.normal_(layer.lora_B)
    if options.dora:
        layer.start_dora(base.weight)
        assert layer.lora_magnitude_vector is not None
        nn.init.normal_(layer.lora_magnitude_vector)
    return layer


def _truth(layer: AdaptedLinear, x: Tensor) -> Tensor:
    """The papers' formulas, with the whole matrix in memory."""
    assert isinstance(layer.base_layer, nn.Linear)
    matrix = layer.base_layer.weight + layer.options.scale * layer.lora_B @ layer.lora_A
    if layer.lora_magnitude_vector is not None:
        lengths = matrix.detach().square().sum(1).sqrt()
        matrix = matrix * (layer.lora_magnitude_vector / lengths)[:, None]
    y = x @ matrix.T
    return y if layer.base_layer.bias is None else y + layer.base_layer.bias


@given(
    rank=st.integers(1, 13), dora=st.booleans(), bias=st.booleans(), rslora=st.booleans(),
    alpha=st.none() | st.floats(0.1, 50),
)  # fmt: skip
def test_an_adapted_layer_is_its_formula_with_its_gradients(
    rank: int, dora: bool, bias: bool, rslora: bool, alpha: float | None
) -> None:
    layer = _layer(AdapterOptions(rank, alpha, 0.0, rslora, dora), bias)
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    assert len(trained) == (4 if dora else 3)
    direction = torch.randn(2, 5, 11, dtype=torch.float64)
    ours, truth = layer(x), _truth(layer, x)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)
    ours_grads = torch.autograd.grad((ours * direction).sum(), trained)
    true_grads = torch.autograd.grad((truth * direction).sum(), trained)
    for ours_grad, true_grad in zip(ours_grads, true_grads, strict=True):
        torch.testing.assert_close(ours_grad, true_grad, rtol=1e-9, atol=1e-9)
    assert isinstance(layer.base_layer, nn.Linear)
    merged = layer.merged_weight(layer.base_layer.weight)
    bias_term = 0 if layer.bias is None else layer.bias
    torch.testing.assert_close(x @ merged.T + bias_term, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_changes_nothing_and_can_be_switched_off(dora: bool) -> None:
    base = nn.Linear(7, 11)
    layer = AdaptedLinear(base, 7, 11, AdapterOptions(3, dora=dora))
    if dora:
        layer.start_dora(base.weight)
    x = torch.randn(5, 7)
    torch.testing.assert_close(layer(x), base(x), rtol=1e-6, atol=1e-6)
    nn.init.normal_(layer.lora_B)
    assert not torch.allclose(layer(x), base(x))
    layer.enabled = False
    assert torch.equal(layer(x), base(x))


def test_layers_that_read_the_same_input_share_one_product() -> None:
    layers = [_layer(AdapterOptions(rank)) for rank in (2, 3, 5)]
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    apart = [layer(x) for layer in layers]
    grads = torch.autograd.grad(sum(y.square().sum() for y in apart), [x, layers[1].lora_A])
    shared = SharedDown(layers)
    calls = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: calls.append(len(shared._parts)))
    together = [layer(x) for layer in layers]
    assert calls == [2, 1, 0]
    for ours, truth in zip(together, apart, strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)
    total = torch.stack([y.square().sum() for y in together]).sum()
    for ours, truth in zip(torch.autograd.grad(total, [x, layers[1].lora_A]), grads, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def _three_that_share() -> list[AdaptedLinear]:
    layers = [_layer(AdapterOptions(2, dropout=0.5)).eval() for _ in range(3)]
    SharedDown(layers)
    return layers


def test_a_shared_product_is_made_anew_when_input_weights_or_mode_have_changed() -> None:
    x = torch.randn(4, 7, dtype=torch.float64)
    first, second, _ = _three_that_share()
    with torch.no_grad():
        first(x)
    second(x).sum().backward()
    assert second.lora_A.grad is not None, "the product made without gradients was taken"

    first, second, third = _three_that_share()
    first.train()(x)
    torch.testing.assert_close(second(x), _truth(second, x))
    torch.testing.assert_close(third(x), _truth(third, x))

    first, second, third = _three_that_share()
    with torch.no_grad():
        first(x)
        for changed in (second, third):
            changed.lora_A.add_(1)
            changed.lora_B.add_(1)
            torch.testing.assert_close(changed(x), _truth(changed, x))

    first, second, third = _three_that_share()
    first(x)
    another = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(second(another), _truth(second, another))

    first, second, third = _three_that_share()
    first(x)
    x += 1
    torch.testing.assert_close(second(x), _truth(second, x))
    torch.testing.assert_close(third(x * 2), _truth(third, x * 2))
    with torch.inference_mode():
        torch.testing.assert_close(first(x * 2), _truth(first, x * 2))
    first(x)
    copied = copy.deepcopy(first)
    torch.testing.assert_close(copied(x), first(x))


def test_dropout_is_shared_by_the_layers_and_off_in_evaluation() -> None:
    first, second = layers = [_layer(AdapterOptions(2, dropout=0.5)) for _ in range(2)]
    with torch.no_grad():
        for part in ("lora_A", "lora_B"):
            getattr(second, part).copy_(getattr(first, part))
    second.base_layer = first.base_layer
    SharedDown(layers)
    x = torch.randn(4, 7, dtype=torch.float64)
    assert torch.equal(first.train()(x), second.train()(x))
    assert not torch.equal(first(x), first(x))
    torch.testing.assert_close(first.eval()(x), _truth(first, x))


def test_bfloat16_products_with_float32_weights_are_as_good_as_plain_torch() -> None:
    layer = _layer(AdapterOptions(3), dtype=torch.bfloat16)
    assert layer.lora_A.dtype == torch.float32
    x = torch.randn(50, 7, dtype=torch.bfloat16)
    ours = layer(x)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(
        ours.double(), _truth(copy.deepcopy(layer).double(), x.double()), rtol=0.03, atol=0.2
    )


@pytest.mark.parametrize(
    ("settings", "value"),
    [({"rank": 0}, "rank 0"), ({"alpha": 0.0}, "alpha 0.0"), ({"dropout": 1.0}, "dropout 1.0")],
)
def test_a_value_outside_its_range_is_named(settings: dict[str, float], value: str) -> None:
    with pytest.raises(ValueError, match=value):
        AdapterOptions(**settings)  # type: ignore[arg-type]
