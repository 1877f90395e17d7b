import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.low_rank.adapters import AdapterOptions
from fingpt_lightning.models.adapting import (
    adapt,
    adapted_layers,
    adapter_state,
    dense_weight,
    linear_names,
    load_adapter,
    merge_adapters,
    save_adapter,
    without_adapters,
)
from fingpt_lightning.models.loading import load_model
from tests.models.tiny_models import ids, save, tiny_gpt2, tiny_llama

BUILDERS = {"gpt2": tiny_gpt2, "llama": tiny_llama}
KINDS = {
    "lora": AdapterOptions(3, 5.0),
    "rslora": AdapterOptions(4, rslora=True),
    "dora": AdapterOptions(3, dora=True),
}


def _trained(network: PreTrainedModel, options: AdapterOptions, **settings: Any) -> PreTrainedModel:
    adapt(network, options, seed=1, **settings)
    with torch.no_grad():
        for layer in adapted_layers(network).values():
            nn.init.normal_(layer.lora_B, std=0.1)
            if layer.lora_magnitude_vector is not None:
                layer.lora_magnitude_vector.mul_(1.1)
    return network


def _logits(network: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = network(ids()).logits
    return logits


# peft 0.21 under transformers 5.23.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", BUILDERS)
def test_peft_computes_the_same_with_our_folder_and_we_with_peft_s(
    family: str, kind: str, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    ours = _trained(BUILDERS[family](), KINDS[kind])
    save_adapter(ours, tmp_path / "ours", "base")
    theirs = peft.PeftModel.from_pretrained(BUILDERS[family](), tmp_path / "ours").eval()
    assert (_logits(ours) - _logits(BUILDERS[family]())).abs().max() > 0.1
    torch.testing.assert_close(_logits(theirs), _logits(ours), rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    config = tmp_path / "theirs" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "b"}))
    again = BUILDERS[family]()
    names = load_adapter(tmp_path / "theirs", again)
    assert names == linear_names(BUILDERS[family]())
    torch.testing.assert_close(_logits(again), _logits(ours), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", BUILDERS)
def test_merging_equals_the_adapter(family: str, kind: str) -> None:
    network = _trained(BUILDERS[family]().double(), KINDS[kind])
    before = _logits(network)
    merge_adapters(network)
    assert not adapted_layers(network)
    assert {name for name, _ in network.named_parameters()} == {
        name for name, _ in BUILDERS[family]().named_parameters()
    }
    torch.testing.assert_close(_logits(network), before, rtol=1e-10, atol=1e-10)


def test_switched_off_adapters_leave_the_base() -> None:
    network = _trained(tiny_llama(), AdapterOptions(3))
    with without_adapters(network):
        assert torch.equal(_logits(network), _logits(tiny_llama()))
    assert not torch.allclose(_logits(network), _logits(tiny_llama()))


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_keeps_its_weights_and_merges(
    quantize: str, kind: str, tmp_path: Path
) -> None:
    folder = save(tiny_llama(), tmp_path / "base")
    network = load_model(folder, quantize=quantize).network
    frozen = {name: p.clone() for name, p in network.named_parameters()}
    _trained(network, KINDS[kind])
    network.train()
    network(ids()).logits.square().mean().backward()
    network.eval()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        if "lora_" not in name:
            assert torch.equal(parameter, frozen[name.replace(".base_layer", "")]), name
    before = _logits(network)
    save_adapter(network, tmp_path / "adapter", str(folder))
    merge_adapters(network)
    assert (_logits(network) - before).norm() < 1e-4 * before.norm()
    # Loading on another base than that of the training is said, and nothing else changes.
    again = load_model(tmp_path / "adapter", quantize=quantize)
    assert again.description.endswith(f", {quantize})")
    plain = load_model(tmp_path / "adapter", quantize="none")
    assert plain.description.endswith(f"adapter was trained on {quantize})")
    torch.testing.assert_close(_logits(load_model(tmp_path / "adapter").network), before)


def test_pairs_of_low_rank_networks_are_adapted_quantised_or_not(tmp_path: Path) -> None:
    network = tiny_llama()
    pair = LowRankLinear.from_dense(network.model.layers[0].mlp.up_proj.weight, None, 5)
    network.model.layers[0].mlp.up_proj = pair
    whole = _trained(network, AdapterOptions(2))
    assert "model.layers.0.mlp.up_proj" in adapted_layers(whole)
    torch.testing.assert_close(dense_weight(pair), pair.up @ pair.down)
    state = {n.replace(".base_layer", ""): t for n, t in whole.state_dict().items()}
    plain = {name: t for name, t in state.items() if "lora_" not in name}
    whole.save_pretrained(tmp_path, state_dict=plain)
    quantised = load_model(tmp_path, quantize="nf4").network
    assert linear_names(quantised) == linear_names(whole)
    adapt(quantised, AdapterOptions(2))
    assert adapter_state(quantised).keys() == adapter_state(whole).keys()
    assert _logits(quantised).shape == _logits(whole).shape


def test_target_modules_choose_layers_by_the_end_of_their_names() -> None:
    network = tiny_llama()
    names = adapt(network, AdapterOptions(2), ["q_proj", "layers.1.mlp.up_proj"])
    assert names == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert sum(p.requires_grad for p in network.parameters()) == 2 * len(names)
    assert "lm_head" not in linear_names(tiny_llama())


def test_target_modules_without_a_match_name_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'query' matches no .* q_proj, k_proj, v_proj, o_proj"):
        adapt(tiny_llama(), AdapterOptions(2), ["q_proj", "query"])


def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_adapter(_trained(tiny_llama(), AdapterOptions(3)), tmp_path, "base")
    with pytest.raises(ValueError, match="no layer model"):
        load_adapter(tmp_path, tiny_gpt2())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"bias": "all"}))
    with pytest.raises(ValueError, match="bias 'all' is not supported"):
        load_adapter(tmp_path, tiny_llama())
    with pytest.raises(ValueError, match="already"):
        adapt(_trained(tiny_llama(), AdapterOptions(3)), AdapterOptions(3))
