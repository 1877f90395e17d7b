"""config.json is read by an allow list: what is not computed is refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fingpt_lightning.models.formats.network_config import network_config
from fingpt_lightning.models.loading import load_model
from tests.models.tiny_models import ids, save, tiny_gpt2, tiny_llama

_FILE = Path("somewhere") / "config.json"
_LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 23,
    "max_position_embeddings": 32,
}  # fmt: skip
_GPT2 = {"model_type": "gpt2", "n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 11}

# Source: config.json of openai-community/gpt2, HuggingFaceTB/SmolLM2-135M and a Llama 3.1, sizes
# made small.
_REAL: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2 | {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1, "bos_token_id": 22, "embd_pdrop": 0.1, "eos_token_id": 22,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "n_ctx": 11, "resid_pdrop": 0.1,
        "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 23,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "smollm2": _LLAMA | {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "initializer_range": 0.04,
        "is_llama_config": True, "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
        "transformers_version": "4.40.1",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "llama 3.1": _LLAMA | {
        "architectures": ["LlamaForCausalLM"], "eos_token_id": [1, 2], "head_dim": 16,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16, "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "_name_or_path": "there", "max_length": 20, "temperature": 0.6,
    },
    "linear": _LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}},
}  # fmt: skip


@pytest.mark.parametrize("name", _REAL)
def test_the_configs_of_real_models_are_read(name: str) -> None:
    config = network_config(json.loads(json.dumps(_REAL[name])), _FILE)
    assert config.model_type == _REAL[name]["model_type"]
    # What transformers makes of it is read again, as from an export or a checkpoint.
    assert network_config(config.to_dict(), _FILE).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (_LLAMA, {"sliding_window": 4096}),
        (_LLAMA, {"attention_multiplier": 0.5}),
        (_LLAMA, {"num_local_experts": 8}),
        (_LLAMA, {"rope_interleaved": True}),
        (_LLAMA, {"use_qk_norm": True}),
        (_LLAMA, {"layer_types": ["sliding_attention", "full_attention"]}),
        (_LLAMA, {"is_encoder_decoder": True}),
        (_LLAMA, {"partial_rotary_factor": 0.5}),
        (_LLAMA, {"per_layer_config": {"0": {"head_dim": 4}}}),
        (_LLAMA, {"architectures": ["MistralForCausalLM"]}),
        (_LLAMA, {"architectures": ["LlamaForSequenceClassification"]}),
        (_GPT2, {"architectures": ["GPT2DoubleHeadsModel"]}),
        (_GPT2, {"add_cross_attention": True}),
        (_GPT2, {"rope_theta": 10000.0}),
        (_GPT2, {"multi_query": True}),
    ],
)
def test_a_key_that_asks_for_another_function_is_refused_by_name(
    base: dict[str, Any], change: dict[str, Any]
) -> None:
    ((key, value),) = change.items()
    with pytest.raises(ValueError, match=re.escape(f"{_FILE}: {key} {value!r} is not supported")):
        network_config(base | change, _FILE)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "rope_type 'longrope' is not supported"),
        ({"type": "yarm", "factor": 2.0}, "rope_type 'yarm' is not supported"),
        ({"rope_type": "linear", "factor": 2.0, "mrope_section": [2, 3]}, "mrope_section [2, 3]"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ([2.0], "[2.0] is not an object"),
    ],
)  # fmt: skip
def test_rotary_settings_that_are_not_computed_are_refused_by_name(
    key: str, described: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        network_config(_LLAMA | {key: described}, _FILE)
    assert f"{_FILE}: {key}" in str(raised.value)


def test_code_that_comes_with_a_model_is_named_and_never_run() -> None:
    remote = {"auto_map": {"AutoModelForCausalLM": "modeling.Other"}}
    with pytest.raises(ValueError, match="auto_map names code of its own, which is never run"):
        network_config(_LLAMA | remote, _FILE)


def test_a_value_that_transformers_refuses_says_where_it_stands() -> None:
    for change in ({"rms_norm_eps": "small"}, {"num_attention_heads": 5}):
        with pytest.raises(ValueError, match=f"{_FILE}: the config is wrong .*"):
            network_config(_LLAMA | change, _FILE)


@pytest.mark.parametrize(
    "settings",
    [
        {"return_dict": False, "output_hidden_states": True, "output_attentions": True},
        {"_attn_implementation": "flash_attention_2", "torchscript": True},
        {"sliding_window": None, "use_qk_norm": False, "gradient_checkpointing": True},
    ],
)
def test_what_says_only_how_to_run_changes_nothing(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    for make in (tiny_llama, tiny_gpt2):
        folder = save(make(), tmp_path / make.__name__)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        found = load_model(folder).network(ids())
        assert torch.equal(found.logits, make()(ids()).logits)
        assert found.hidden_states is None


def test_a_quantisation_without_its_method_is_refused(tmp_path: Path) -> None:
    file = save(tiny_llama(), tmp_path) / "config.json"
    quantised = {"quantization_config": {"load_in_4bit": True}}
    file.write_text(json.dumps(json.loads(file.read_text()) | quantised))
    with pytest.raises(ValueError, match=r"weights stored as \{'load_in_4bit': True\} are"):
        load_model(tmp_path)
