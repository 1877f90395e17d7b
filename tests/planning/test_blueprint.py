import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule
from transformers import LlamaConfig

from fingpt_lightning.models.block_calls import blocks_of
from fingpt_lightning.modules import LowRankPretraining, QuantizedFinetuning
from fingpt_lightning.planning.blueprint import base_config, blueprint


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-2-13b-chat-hf", 13_015_864_320),
    ],
)
def test_llama_2_has_its_published_number_of_parameters(name: str, parameters: int) -> None:
    made = blueprint(QuantizedFinetuning(base=name, rank=8), 32000, 512, "32-true")
    assert made.parameters - made.trained == parameters
    assert made.dense_parameters is None
    # 4 bits a number of the blocks, 16 of the embedding and the head.
    assert 0.5 * parameters < made.weights < 0.62 * parameters


def test_the_shapes_of_llama_2_70b_share_keys_and_values() -> None:
    config = base_config("meta-llama/Llama-2-70b-hf", None, 32000)
    assert (config.num_hidden_layers, config.num_key_value_heads) == (80, 8)


def test_a_base_of_unknown_shapes_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model\.base some/model is not a folder with config\.json"
    ):
        base_config("some/model", None, 32000)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"model\.base .*: architecture 'bert' is not supported"):
        base_config(str(tmp_path), None, 32000)


def test_the_base_of_an_adapter_is_planned_as_itself(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=24, num_attention_heads=3)
    config.save_pretrained(tmp_path / "base")
    (tmp_path / "client").mkdir()
    described = {"peft_type": "LORA", "base_model_name_or_path": "../base"}
    (tmp_path / "client" / "adapter_config.json").write_text(json.dumps(described))
    found = base_config(str(tmp_path / "client"), None, 32000)
    assert (found.model_type, found.hidden_size) == ("llama", 24)


def test_low_rank_pretraining_knows_its_dense_baseline() -> None:
    module = LowRankPretraining(preset="gpt2-nano", rank=16, embedding_rank=16)
    made = blueprint(module, 512, 128, "bf16-mixed")
    assert made.trained == made.parameters
    assert made.weights == 4 * made.parameters
    assert made.dense_parameters is not None
    assert made.dense_parameters > 3 * made.parameters
    assert made.dense_parameters == module.budget(128).dense_total_parameters
    assert made.same_size is not None
    assert made.same_size == module.budget(128).same_size


def test_a_residual_stream_in_16_bits_is_planned_as_it_runs() -> None:
    module = LowRankPretraining(
        preset="gpt2-nano", rank=16, residual_dtype="bfloat16", recompute="block"
    )
    network = blueprint(module, 512, 128, "bf16-mixed").network
    assert all(block._forward_pre_hooks for block in blocks_of(network)[1])


def test_the_guides_of_a_run_take_memory_and_count_as_no_parameters() -> None:
    settings: dict[str, Any] = {"preset": "gpt2-nano", "rank": 16, "embedding_rank": 16}
    plain = blueprint(LowRankPretraining(**settings), 512, 128, "32-true")
    guided = blueprint(LowRankPretraining(**settings, self_guided=0.5), 512, 128, "32-true")
    assert (guided.parameters, guided.trained) == (plain.parameters, plain.trained)
    assert guided.dense_parameters == plain.dense_parameters
    width, num_layers = 256, 4
    dense = num_layers * 12 * width**2
    shares = num_layers * 4
    assert guided.weights - plain.weights == 4 * (dense + shares)
    in_training = sum(count for count, _ in guided.trained_parameters)
    assert in_training - sum(count for count, _ in plain.trained_parameters) == dense


def test_sequences_beyond_the_positions_are_refused() -> None:
    module = LowRankPretraining(preset="gpt2-nano", num_positions=64)
    with pytest.raises(ValueError, match=r"data\.block_length 128 is longer than the 64"):
        blueprint(module, 512, 128, "32-true")
    tuned = QuantizedFinetuning(base="meta-llama/Llama-2-7b-hf")
    with pytest.raises(ValueError, match=r"data\.max_length 5000 is longer than the 4096"):
        blueprint(tuned, 32000, 5000, "32-true")


def test_another_module_is_named() -> None:
    with pytest.raises(TypeError, match="LightningModule cannot be planned"):
        blueprint(LightningModule(), 512, 128, "32-true")
