"""Second moments of gradients: against one plain backward pass in float64."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from fingpt_lightning.models.adapting import linear_names
from fingpt_lightning.models.input_moments import input_moments
from fingpt_lightning.models.output_gradients import (
    BackwardState,
    GradientMoments,
    drawn_labels,
    gradient_moments,
)
from tests.models.tiny_models import TINY, VOCABULARY, ids, tiny_llama


def _reference(network: PreTrainedModel, tokens: Tensor, seed: int) -> dict[str, Tensor]:
    """The sum over tokens of g g' / n, of the loss of labels that the network draws itself."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            output.retain_grad()
            outputs[name] = output

        return hook

    hooks = [
        network.get_submodule(name).register_forward_hook(keep(name))  # type: ignore[arg-type]
        for name in linear_names(network)
    ]
    logits = network(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
    uniform = torch.rand(
        tokens.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    labels = drawn_labels(logits.detach(), uniform.flatten())
    functional.cross_entropy(logits, labels, reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    found = {}
    for name, output in outputs.items():
        assert output.grad is not None
        rows = output.grad.flatten(0, 1)
        found[name] = sum(
            (torch.outer(row, row) for row in rows), torch.zeros(rows.shape[1], rows.shape[1])
        ) / len(rows)
    return found


def _all(network: PreTrainedModel, tokens: Tensor, seed: int, rows: int = 4) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for moments, _ in gradient_moments(network, tokens, seed, rows):
        found |= moments
    return found


@pytest.mark.parametrize("family", sorted(TINY))
def test_moments_are_those_of_a_plain_backward_pass(family: str) -> None:
    network, tokens = TINY[family]().double(), ids()
    found = _all(network, tokens, seed=5, rows=1 if family == "gpt2" else 4)
    truth = _reference(network, tokens, seed=5)
    assert found.keys() == truth.keys() == set(linear_names(network))
    assert len(found) > 7
    for name, moment in truth.items():
        assert moment.any(), name
        torch.testing.assert_close(
            found[name], moment, rtol=1e-9, atol=1e-12 * float(moment.abs().max())
        )


def test_moments_depend_on_the_seed_and_not_on_the_batches() -> None:
    network, tokens = tiny_llama().double(), ids()
    first, again, other = (
        _all(network, tokens, seed, rows) for seed, rows in ((5, 4), (5, 1), (6, 4))
    )
    name = "model.layers.0.mlp.up_proj"
    torch.testing.assert_close(first, again, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(first[name], other[name], rtol=0.01)


def test_a_pass_that_ended_goes_on_from_its_state() -> None:
    network, tokens = tiny_llama(), ids()
    whole = list(gradient_moments(network, tokens, 5, 1))
    assert [state.block for _, state in whole] == [1, 0]
    first: GradientMoments = next(gradient_moments(network, tokens, 5, 1))
    (second,) = gradient_moments(network, tokens, 5, 1, start=first.state)
    assert second.moments.keys() == whole[1].moments.keys()
    for name, moment in whole[1].moments.items():
        assert torch.equal(second.moments[name], moment)
    assert torch.equal(second.state.gradients, whole[1].state.gradients)
    assert not list(gradient_moments(network, tokens, 5, 1, start=second.state))


def test_labels_are_drawn_by_their_probabilities() -> None:
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3
    number = 20_000
    grid = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    labels = drawn_labels(logits.expand(number, -1), grid)
    shares = labels.bincount(minlength=VOCABULARY) / number
    torch.testing.assert_close(shares, logits.softmax(-1), rtol=0, atol=1.5 / number)
    last = drawn_labels(logits[None], torch.tensor([1 - 2**-53], dtype=torch.float64))
    assert int(last) < VOCABULARY


def test_a_small_change_costs_about_what_is_predicted() -> None:
    """In nats per token, for each layer: the scale on which layers are compared."""
    network = tiny_llama().double()
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(VOCABULARY, (64, 8), generator=generator)
    gradients = _all(network, tokens, seed=3, rows=64)
    moments: dict[str, Tensor] = {}
    groups: dict[str, str] = {}
    for found in input_moments(network, tokens, 64):
        moments |= found.moments
        groups |= found.groups
    with torch.no_grad():
        before = network(input_ids=tokens).logits.log_softmax(-1)
        ratios = []
        for name, gradient in gradients.items():
            changed = copy.deepcopy(network)
            weight = changed.get_submodule(name).get_parameter("weight")
            error = 0.003 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.add_(error)
            after = changed(input_ids=tokens).logits.log_softmax(-1)
            divergence = (before.exp() * (before - after)).sum(-1).mean()
            predicted = (gradient @ error @ moments[groups[name]] @ error.T).trace() / 2
            ratios.append(float(divergence / predicted))
    assert len(ratios) == 14
    assert 0.8 < sum(ratios) / len(ratios) < 1.25, ratios
    assert min(ratios) > 0.4, ratios
    assert max(ratios) < 2.5, ratios


def test_gradients_that_are_not_finite_name_the_block() -> None:
    network, tokens = tiny_llama(), ids()
    start = BackwardState(1, torch.full((2, 7, 64), float("nan")))
    with pytest.raises(FloatingPointError, match=r"model.layers.0: the gradients of the loss"):
        next(gradient_moments(network, tokens, 5, start=start))
