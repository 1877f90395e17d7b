import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.evaluation.runner import predict
from fingpt_lightning.low_rank import LowRankEmbedding, LowRankLinear
from fingpt_lightning.models.adapting import linear_names
from fingpt_lightning.models.decoding import decode
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.models.quantization.quantized_embedding import (
    QuantizedEmbedding,
    QuantizedHead,
)
from fingpt_lightning.models.quantization.rounding import rounded
from fingpt_lightning.models.vocabulary_loss import vocabulary_loss
from fingpt_lightning.tasks import find_task
from tests.deploy.tiny_clients import save_low_rank_model
from tests.evaluation.tiny_language import examples_of, tiny_network, tiny_tokenizer

FORMS = ("int8", "nf4")
IDS = torch.tensor([[200, 31, 4, 99, 8]])


@pytest.fixture(params=["low_rank", "gpt2"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "low_rank":
        return save_low_rank_model(tmp_path / "source")
    tiny_network("gpt2").save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def _quantised(source: Path, folder: Path, form: str) -> PreTrainedModel:
    export(load_model(source), form, folder, tolerance=2.0, embeddings="quantized")
    return load_model(folder).network


@torch.no_grad()
def _round_weights(network: PreTrainedModel, form: str) -> PreTrainedModel:
    """The plain network of what a quantised one multiplies with."""
    for module in network.modules():
        match module:
            case LowRankLinear():
                module.down.copy_(rounded(module.down, form))
                module.up.copy_(rounded(module.up, form))
            case LowRankEmbedding():
                module.table.copy_(rounded(module.table, form))
                module.up.copy_(rounded(module.up, form))
            case Conv1D():
                module.weight.copy_(rounded(module.weight.T, form).T)
            case nn.Embedding() if module is network.get_input_embeddings():
                module.weight.copy_(rounded(module.weight, form))
    return network


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_folder_is_the_network_of_its_rounded_matrices(
    source: Path, form: str, tmp_path: Path
) -> None:
    network = _quantised(source, tmp_path / "out", form)
    plain = _round_weights(load_model(source).network, form)
    with torch.no_grad():
        torch.testing.assert_close(network(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
        hidden = network.base_model(IDS).last_hidden_state
        labels = IDS.roll(-1, 1)
        losses = [
            vocabulary_loss(n.get_submodule("lm_head"), hidden, labels).loss_sum
            for n in (network, plain)
        ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-4)
    prompts = [[5, 60, 7], [200, 31, 4, 99, 8]]
    assert decode(network, prompts, 6) == decode(plain, prompts, 6)


@pytest.mark.parametrize("form", FORMS)
def test_tasks_are_answered_as_by_the_network_of_the_rounded_matrices(
    source: Path, form: str, tmp_path: Path
) -> None:
    # What `fingpt evaluate` and `fingpt label` do.
    network = _quantised(source, tmp_path / "out", form)
    plain = _round_weights(load_model(source).network, form)
    task, examples = find_task("fpb"), examples_of(tmp_path, "fpb")
    found, expected = (
        predict(each, tiny_tokenizer(), task, examples, calibrate=True) for each in (network, plain)
    )
    assert [one.choice for one in found] == [one.choice for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.scores == pytest.approx(other.scores, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_large_is_stored_unquantised_nor_twice(
    source: Path, form: str, tmp_path: Path
) -> None:
    network = _quantised(source, tmp_path / "out", form)
    assert isinstance(network.get_input_embeddings(), QuantizedEmbedding)
    assert isinstance(network.lm_head, QuantizedHead)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert not [name for name in stored if name.startswith("lm_head.")]
    plain = {
        name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        for name, tensor in stored.items()
        if tensor.is_floating_point() and tensor.ndim == 2
    }
    assert plain == {"wpe"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["tie_word_embeddings"] is True
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    # A quantised table is no layer that an adapter could be put on.
    assert not [name for name in linear_names(network) if ".wte" in name]


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_folder_is_exported_as_a_dense_one(
    source: Path, form: str, tmp_path: Path
) -> None:
    network = _quantised(source, tmp_path / "out", form)
    made = export(load_model(tmp_path / "out"), "hf", tmp_path / "dense")
    assert all(found.equal_predictions == 1 for found in made.differences)
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(tmp_path / "dense").network(IDS).logits,
            network(IDS).logits,
            rtol=1e-4,
            atol=1e-4,
        )


def test_low_rank_embeddings_are_quantised_unless_said_and_dense_ones_are_kept(
    source: Path, tmp_path: Path
) -> None:
    is_low_rank = "low-rank" in load_model(source).description
    export(load_model(source), "int8", tmp_path / "out")
    again = load_model(tmp_path / "out")
    embedding = again.network.get_input_embeddings()
    assert isinstance(embedding, QuantizedEmbedding) == is_low_rank
    assert again.description.endswith("(low-rank gpt2, int8)" if is_low_rank else "(gpt2, int8)")
    export(load_model(source), "int8", tmp_path / "kept", embeddings="kept")
    embedding = load_model(tmp_path / "kept").network.get_input_embeddings()
    assert not isinstance(embedding, QuantizedEmbedding)


def test_embeddings_have_no_say_in_other_formats(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="embeddings kept has no effect on the format hf"):
        export(load_model(source), "hf", tmp_path / "out", embeddings="kept")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_stays_unquantised_is_stored_in_16_bits(
    source: Path, dtype: str, tmp_path: Path
) -> None:
    made = export(load_model(source), "int8", tmp_path / "out", dtype, tolerance=1.0)
    assert made.differences[0].relative_error < 0.2
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.get_tensor("transformer.wpe.weight").dtype == getattr(torch, dtype)
    network = load_model(tmp_path / "out", dtype=dtype).network
    with torch.no_grad():
        assert network(IDS).logits.dtype == getattr(torch, dtype)


def test_an_embedding_of_other_sizes_than_the_config_is_refused(
    source: Path, tmp_path: Path
) -> None:
    _quantised(source, tmp_path / "out", "int8")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["vocab_size"] = 321
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"transformer\.wte is 320 x 2\d, the config asks for 321"):
        load_model(tmp_path / "out")
