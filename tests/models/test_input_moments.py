import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fingpt_lightning.models.input_moments import HEAD, input_moments
from fingpt_lightning.models.quantization import is_linear
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
    assert groups[HEAD] == HEAD


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
