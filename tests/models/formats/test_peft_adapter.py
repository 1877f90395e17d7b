"""What PEFT writes is computed as PEFT computes it, or refused by file, key and value."""

import dataclasses
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fingpt_lightning.deploy.adapter_bank import AdapterBank
from fingpt_lightning.low_rank.adapters import AdapterOptions
from fingpt_lightning.models.adapting import adapt, adapted_layers, save_adapter
from fingpt_lightning.models.formats.peft_adapter import read_adapter_config
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.models.sources import resolve_source
from tests.models.tiny_models import ids, save, tiny_gpt2, tiny_llama

peft = pytest.importorskip("peft", reason="peft is not installed")

# peft 0.21 under transformers 5.23; fan_in_fan_out is set right by peft itself.
pytestmark = pytest.mark.filterwarnings("ignore")

_ATTENTION = {"llama": "q_proj", "gpt2": "c_attn"}
_BLOCKS = {"llama": "layers", "gpt2": "h"}
_MAKERS: dict[str, Callable[[], PreTrainedModel]] = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def _logits(network: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = network(input_ids=ids()).logits
    return logits


def _saved(folder: Path, family: str = "llama", **settings: Any) -> Path:
    """The folder that PEFT writes for an adapter that has been trained, beside its base."""
    network = _MAKERS[family]()
    if not (folder / "base").is_dir():
        save(network, folder / "base")
    network.name_or_path = str(folder / "base")
    settings = {"target_modules": "all-linear", "r": 4, "task_type": "CAUSAL_LM"} | settings
    wrapped = peft.get_peft_model(network, peft.LoraConfig(**settings))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    wrapped.save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


def _truth(adapter: Path) -> Tensor:
    """PEFT's own logits, in training mode: its evaluation rounds on some CPUs."""
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base", dtype=torch.float32)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return _logits(peft.PeftModel.from_pretrained(base, str(adapter)).train())


_ACCEPTED: dict[str, Callable[[str], dict[str, Any]]] = {
    "ranks by name": lambda family: {"rank_pattern": {_ATTENTION[family]: 7}},
    "ranks and alphas by pattern": lambda family: {
        # The first that matches counts, and PEFT sorts them when it saves.
        "rank_pattern": {r"^.*\.0\..*": 6, _ATTENTION[family]: 3},
        "alpha_pattern": {rf"^.*\.1\..*{_ATTENTION[family]}": 23, r"mlp\.\w+": 2},
    },
    "ranks in rsLoRA": lambda family: {
        "rank_pattern": {_ATTENTION[family]: 9}, "alpha_pattern": {_ATTENTION[family]: 5},
        "use_rslora": True,
    },
    "ranks in DoRA": lambda family: {"rank_pattern": {_ATTENTION[family]: 2}, "use_dora": True},
    "one block": lambda family: {
        "target_modules": [_ATTENTION[family]], "layers_to_transform": [1],
    },
    "a block by number": lambda family: {
        "target_modules": [_ATTENTION[family]], "layers_to_transform": 0,
        "layers_pattern": [_BLOCKS[family]],
    },
    "excluded layers": lambda family: {"exclude_modules": [_ATTENTION[family]]},
    "excluded pattern": lambda _: {"exclude_modules": r".*\.0\..*"},
    "target pattern": lambda family: {"target_modules": rf".*\.1\..*{_ATTENTION[family]}"},
    "a long target pattern": lambda family: {
        "target_modules": rf"(?:.*?(?:attn|mlp).*?(?:{_ATTENTION[family]}).*?)|(?:x*y*z*)",
    },
    "gaussian": lambda _: {"init_lora_weights": "gaussian"},
    "orthogonal": lambda _: {"init_lora_weights": "orthogonal"},
    "mica": lambda _: {"init_lora_weights": "mica"},
    "eva": lambda _: {"init_lora_weights": "eva"},
    "random": lambda _: {"init_lora_weights": False},
}  # fmt: skip


@pytest.mark.parametrize("family", _MAKERS)
@pytest.mark.parametrize("case", _ACCEPTED)
def test_what_is_accepted_is_computed_as_peft_computes_it(
    case: str, family: str, tmp_path: Path
) -> None:
    adapter = _saved(tmp_path, family, **_ACCEPTED[case](family))
    expected, base = _truth(adapter), _logits(_MAKERS[family]())
    assert (expected - base).abs().max() > 0.01
    found = load_model(adapter)
    torch.testing.assert_close(_logits(found.network), expected, rtol=1e-4, atol=1e-4)
    # In a bank, and written again, it is the same.
    bank = AdapterBank(load_model(tmp_path / "base").network)
    bank.load("client", adapter)
    with bank.rows("client"):
        torch.testing.assert_close(_logits(bank._network), expected, rtol=1e-4, atol=1e-4)
    save_adapter(found.network, tmp_path / "again", str(tmp_path / "base"))
    torch.testing.assert_close(
        _truth(tmp_path / "again"), _logits(found.network), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' is not"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora' is not supported"),
        ({"lora_bias": True}, "lora_bias True is not supported"),
        ({"bias": "lora_only"}, "bias 'lora_only' is not supported"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication [[0, 2], [1, 2]] is not"),
        ({"alora_invocation_tokens": [3, 5]}, "alora_invocation_tokens [3, 5] is not supported"),
        ({"trainable_token_indices": [2]}, "trainable_token_indices [2] is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head'] is not supported"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    adapter = _saved(tmp_path, **settings)
    for load in (load_model, lambda path: AdapterBank(tiny_llama()).load("client", path)):
        with pytest.raises(ValueError, match=re.escape(message)) as raised:
            load(adapter)
        assert "\n" not in str(raised.value)
        assert str(adapter) in str(raised.value)


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
@pytest.mark.parametrize("saves_base_weight", [True, False])
def test_an_adapted_head_or_embedding_is_refused_by_name(
    name: str, saves_base_weight: bool, tmp_path: Path
) -> None:
    adapter = _saved(tmp_path, target_modules=["q_proj", name.rpartition(".")[2]])
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    if not saves_base_weight:
        save_file({key: t for key, t in weights.items() if "base_layer" not in key}, file)
    kind = "head" if name == "lm_head" else "embedding"
    with pytest.raises(ValueError, match=f"the {kind} {name} is adapted, which is not supported"):
        load_model(adapter)
    message = f"{name}.base_layer.weight whole, as where an embedding or head is adapted"
    with pytest.raises(ValueError, match=message if saves_base_weight else f"{kind} {name} is ad"):
        AdapterBank(tiny_llama()).load("client", adapter)


def test_a_resized_vocabulary_is_refused_by_name(tmp_path: Path) -> None:
    adapter = _saved(tmp_path)
    weights = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.weight"
    save_file(weights | {name: torch.zeros(24, 64)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"holds model.embed_tokens.weight whole, as where"):
        load_model(adapter)


def _changed(adapter: Path, **changes: Any) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return adapter


def test_every_key_that_peft_writes_is_known_and_switched_off(tmp_path: Path) -> None:
    adapter = _saved(tmp_path)
    written = json.loads((adapter / "adapter_config.json").read_text())
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} - {"runtime_config"} <= (
        written.keys()
    )
    expected = _logits(load_model(adapter).network)
    # Values at which a key means nothing, whoever wrote it.
    neutral = {"use_later": False, "some_pattern": {}, "list_of_later": [], "name_of_later": ""}
    changed = load_model(_changed(adapter, **neutral, peft_version="9.9.9", auto_mapping={"a": 1}))
    assert torch.equal(_logits(changed.network), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"use_later": True}, {"later_scale": 2.0}, {"later": "yes"}, {"use_bdlora": {"a": 1}},
        {"use_qalora": True}, {"arrow_config": {"top_k": 2}}, {"kasa_config": {"a": 1}},
        {"velora_config": {"a": 1}}, {"monteclora_config": {"a": 1}}, {"target_parameters": ["a"]},
        {"megatron_config": {"a": 1}}, {"ensure_weight_tying": True},
        {"init_lora_weights": "corda"}, {"init_lora_weights": "loftq"},
        {"init_lora_weights": "lora_ga"}, {"init_lora_weights": "later"}, {"bias": "all"},
        {"r": "4"}, {"r": 4.5}, {"lora_alpha": "16"}, {"lora_dropout": [0]}, {"use_dora": "yes"},
        {"rank_pattern": [1]}, {"layers_to_transform": ["1"]}, {"layers_to_transform": True},
        {"target_modules": 3}, {"exclude_modules": [3]}, {"revision": 3},
    ],
)  # fmt: skip
def test_a_key_away_from_its_neutral_value_is_refused_by_name(
    change: dict[str, Any], tmp_path: Path
) -> None:
    adapter = _changed(_saved(tmp_path), **change)
    ((key, value),) = change.items()
    message = f"{adapter / 'adapter_config.json'}: {key} {value!r} is not supported"
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve_source(adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, "adapter_config.json: rank 0 is below 1"),
        ({"r": 5}, "the adapter of model.layers.0.mlp.down_proj is of rank 4, by adapter_config"),
        ({"rank_pattern": {"q_proj": 5}}, "q_proj is of rank 4, by adapter_config.json of rank 5"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern 'q_proj': 0 is not > 0"),
        ({"alpha_pattern": {"q_proj": "2"}}, "alpha_pattern 'q_proj': '2' is not > 0"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern: '(' is not a pattern"),
        ({"exclude_modules": "*"}, "exclude_modules: '*' is not a pattern"),
        ({"target_modules": ["k_proj"]}, "adapts model.layers.0.mlp.down_proj, which adapter_conf"),
        ({"exclude_modules": ["q_proj"]}, "self_attn.q_proj, which adapter_config.json leaves out"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, "which adapter_config.json l"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not LORA"),
    ],
)
def test_weights_that_contradict_their_config_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    adapter = _changed(_saved(tmp_path), **change)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_model(adapter)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "layers_pattern"])
@pytest.mark.parametrize("pattern", ["(a+)+$", "([a-z._]*)*x", ".*.*.*.*.*x", "a" * 501])
def test_a_pattern_that_could_run_for_long_is_refused(
    key: str, pattern: str, tmp_path: Path
) -> None:
    value = [pattern] if key == "layers_pattern" else {pattern: 2}
    adapter = _changed(_saved(tmp_path), **{key: value})
    started = time.perf_counter()
    with pytest.raises(ValueError, match=f"{key}: the pattern .* could take too long"):
        load_model(adapter)
    assert time.perf_counter() - started < 5


def test_a_target_pattern_that_could_run_for_long_is_not_tried(tmp_path: Path) -> None:
    adapter = _saved(tmp_path)
    expected = _logits(load_model(adapter).network)
    found = load_model(_changed(adapter, target_modules="([a-z._0-9]+)+!"))
    assert torch.equal(_logits(found.network), expected)


def test_the_advice_on_a_pickled_adapter_works_as_it_is_printed(tmp_path: Path) -> None:
    adapter = _saved(tmp_path)
    expected = _logits(load_model(adapter).network)
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    with pytest.raises(ValueError, match=r"adapter_model.bin is pickled") as raised:
        load_model(adapter)
    call = re.search(r"trust it, (.*) of peft makes safetensors of it", str(raised.value))
    assert call is not None
    names = {"BASE": str(tmp_path / "base"), "ADAPTER": str(adapter)}
    names["NEW_FOLDER"] = str(tmp_path / "new")
    modules = {"PeftModel": peft.PeftModel, "AutoModelForCausalLM": AutoModelForCausalLM}
    eval(call[1], names | modules)
    shutil.rmtree(adapter)
    torch.testing.assert_close(_logits(load_model(tmp_path / "new").network), expected)


def test_adapters_of_several_ranks_are_saved_with_the_most_usual_as_r(tmp_path: Path) -> None:
    network = tiny_llama()
    options = {
        f"model.layers.{block}.self_attn.{name}_proj": AdapterOptions(rank, alpha)
        for block in (0, 1)
        for name, rank, alpha in (("q", 2, 6.0), ("k", 3, 6.0), ("v", 2, 8.0), ("o", 2, 6.0))
    }
    adapt(network, options, list(options), seed=1)
    save_adapter(network, tmp_path / "adapter", "base")
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"]) == (2, 6.0)
    assert described["rank_pattern"] == dict.fromkeys([n for n in options if ".k_" in n], 3)
    assert described["alpha_pattern"] == dict.fromkeys([n for n in options if ".v_" in n], 8.0)
    config = read_adapter_config(tmp_path / "adapter")
    assert {name: config.options_of(name) for name in options} == options
    assert {n: layer.options for n, layer in adapted_layers(network).items()} == options
