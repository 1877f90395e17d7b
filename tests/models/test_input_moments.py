import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fingpt_lightning.models.families import GPT2
from fingpt_lightning.models.input_moments import input_moments, shifted_moments
from fingpt_lightning.models.quantization.layers import is_linear
from tests.models.tiny_models import ids, tiny_gpt2, tiny_llama


def _seen_inputs(network: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """What each linear layer reads in one plain forward pass."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].flatten(0, 1).double()

        return hook

    for name, module in network.named_modules():
        if is_linear(module):
            module.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        network(input_ids=tokens)
    return seen


@pytest.mark.parametrize("made", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("batch_rows", [1, 4])
def test_moments_are_those_of_a_plain_forward_pass(made: object, batch_rows: int) -> None:
    assert callable(made)
    network, tokens = made().double(), ids()
    groups: dict[str, str] = {}
    moments: dict[str, Tensor] = {}
    for found in input_moments(network, tokens, batch_rows):
        groups |= found.groups
        moments |= found.moments
    seen = _seen_inputs(network, tokens)
    assert groups.keys() == seen.keys()
    for name, x in seen.items():
        torch.testing.assert_close(moments[groups[name]], x.T @ x / len(x), rtol=1e-9, atol=1e-9)
    assert groups[GPT2.head] == GPT2.head


def test_layers_that_read_the_same_share_their_moments() -> None:
    groups: dict[str, str] = {}
    names: list[str] = []
    for found in input_moments(tiny_llama(), ids()):
        groups |= found.groups
        names += found.moments
    block = "model.layers.1."
    attention = {groups[f"{block}self_attn.{kind}_proj"] for kind in "qkv"}
    mlp = {groups[f"{block}mlp.{kind}_proj"] for kind in ("gate", "up")}
    assert attention == {f"{block}self_attn.q_proj"}
    assert mlp == {f"{block}mlp.gate_proj"}
    assert len(names) == len(set(names)) == 2 * 4 + 1


def _scale(layer: nn.Module) -> None:
    layer.get_parameter("weight").data.mul_(0.9)


@pytest.mark.parametrize("made", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("batch_rows", [1, 4])
def test_shifted_moments_are_those_of_the_network_and_of_one_that_is_changed(
    made: object, batch_rows: int
) -> None:
    assert callable(made)
    network, tokens = made().double(), ids()
    changed = copy.deepcopy(network)
    for name, module in changed.named_modules():
        if is_linear(module) and name != GPT2.head:
            _scale(module)
    found = {}
    for reached in shifted_moments(network, tokens, lambda _: True, batch_rows):
        for name, place in reached.layers.items():
            found[name] = reached.moments
            _scale(reached.block.get_submodule(place))
    before, now = _seen_inputs(network, tokens), _seen_inputs(changed, tokens)
    assert found.keys() == before.keys() - {GPT2.head}
    for name, moments in found.items():
        assert moments is not None
        x, y = before[name], now[name]
        for ours, truth in zip(moments, (x.T @ x, x.T @ y, y.T @ y), strict=True):
            torch.testing.assert_close(ours, truth / len(x), rtol=1e-9, atol=1e-9)


def test_shifted_moments_are_gathered_where_they_are_wanted() -> None:
    wanted = "model.layers.1.mlp.down_proj"
    for reached in shifted_moments(tiny_llama(), ids(), lambda names: wanted in names):
        assert (reached.moments is not None) == (wanted in reached.layers)
