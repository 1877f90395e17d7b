import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    pipeline,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import fingpt_lightning
from fingpt_lightning.auto_classes import FinGPTConfig, FinGPTForCausalLM
from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.low_rank.adapters import AdapterOptions
from fingpt_lightning.models.adapting import adapt
from fingpt_lightning.models.decoding import decode
from fingpt_lightning.models.formats.hf_folder import write_network, write_quantized
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.own_format import MODEL_TYPE
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer

IDS = torch.tensor([[5, 60, 7, 200, 31]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A low-rank GPT-2 as an export has it, stored in bfloat16."""
    made = tmp_path_factory.mktemp("low_rank")
    write_network(tiny_network("low_rank"), made, torch.bfloat16)
    tiny_tokenizer().save_pretrained(made)
    return made


def _load(folder: Path, **settings: Any) -> PreTrainedModel:
    network = AutoModelForCausalLM.from_pretrained(folder, **settings)
    assert isinstance(network, PreTrainedModel)
    return network


def _logits(network: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = network(input_ids=IDS).logits
    return logits


def test_a_low_rank_folder_is_loaded_and_generates_by_transformers_own_means(folder: Path) -> None:
    network: Any = _load(folder, dtype="float32")
    assert type(network).__name__ == "GPT2LMHeadModel"
    assert sum(isinstance(layer, LowRankLinear) for layer in network.modules()) == 8
    assert torch.equal(_logits(network), _logits(load_model(folder).network))
    whole = network.generate(IDS, max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert whole[0, IDS.shape[1] :].tolist() == decode(network, IDS.tolist(), 9)[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    write = pipeline("text-generation", str(folder), dtype="float32")
    (text,) = write("Shares fell", max_new_tokens=5, do_sample=False)
    ids = tokenizer.encode("Shares fell")
    own = tokenizer.decode(ids + decode(network, [ids], 5)[0])
    assert text["generated_text"] == own


def test_the_config_is_that_of_its_family_around_which_another_type_stands(
    folder: Path, tmp_path: Path
) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, FinGPTConfig)
    assert config.get_text_config().model_type == "gpt2"
    assert (config.get_text_config().n_layer, config.vocab_size) == (2, 320)
    config.save_pretrained(tmp_path)
    stored, again = (
        json.loads((place / "config.json").read_text()) for place in (folder, tmp_path)
    )
    assert stored["model_type"] == again["model_type"] == MODEL_TYPE
    assert stored["text_config"].items() <= again["text_config"].items()
    assert AutoConfig.from_pretrained(tmp_path).is_of_the_same_network(config)
    assert FinGPTConfig().get_text_config().model_type == "gpt2"


def test_without_this_package_the_folder_is_refused_in_place_of_half_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, MODEL_TYPE)
    for auto_class in (AutoModelForCausalLM, AutoConfig):
        with pytest.raises(ValueError, match="model type `fingpt_lightning` but Transformers does"):
            auto_class.from_pretrained(folder)
    for own_class in (GPT2LMHeadModel, LlamaForCausalLM):
        with pytest.raises(Exception, match="in text_config: import fingpt_lightning"):
            own_class.from_pretrained(folder)
    assert "pip install fingpt-lightning" in (folder / "config.json").read_text()
    # Imported after transformers, the package registers the type at once.
    fingpt_lightning._AutoClassesHook.install()
    assert isinstance(AutoConfig.from_pretrained(folder), FinGPTConfig)


def test_the_hook_is_installed_once() -> None:
    fingpt_lightning._AutoClassesHook.install()
    import sys

    hooks = [f for f in sys.meta_path if isinstance(f, fingpt_lightning._AutoClassesHook)]
    assert len(hooks) == 1
    assert hooks[0].find_spec("transformers.models.gpt2.modeling_gpt2") is None


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": torch.float64}, torch.float64),
        ({"torch_dtype": "float16"}, torch.float16),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")
def test_the_dtype_is_the_stored_one_or_the_requested(
    settings: dict[str, Any], dtype: torch.dtype, folder: Path
) -> None:
    network = _load(folder, **settings)
    assert {parameter.dtype for parameter in network.parameters()} == {dtype}


@pytest.mark.parametrize(
    "settings",
    [
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": torch.device("cpu")},
        {"trust_remote_code": False, "use_safetensors": True, "low_cpu_mem_usage": True},
    ],
)
def test_arguments_that_hold_here_anyway_are_taken(settings: dict[str, Any], folder: Path) -> None:
    assert _load(folder, **settings).device.type == "cpu"


def test_the_attention_is_the_requested_one(folder: Path) -> None:
    network = _load(folder, attn_implementation="eager")
    assert network.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"device_map": "balanced"}, TypeError, "device_map 'balanced' is not supported for mod"),
        ({"device_map": {"transformer": 0, "lm_head": 1}}, TypeError, "name one device, such as"),
        ({"max_memory": {0: "1GB"}}, TypeError, "max_memory is not supported for models of type"),
        ({"n_layer": 1}, TypeError, "n_layer is not supported for models of type fingpt_lightning"),
    ],
)
def test_arguments_that_would_not_be_heeded_are_refused(
    settings: dict[str, Any], error: type[Exception], message: str, folder: Path
) -> None:
    with pytest.raises(error, match=message):
        _load(folder, **settings)


def test_a_config_is_that_of_the_folder_and_alone_it_makes_no_network(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert torch.equal(_logits(_load(folder, config=config)), _logits(_load(folder)))
    config.text_config.n_layer = 1
    with pytest.raises(ValueError, match="a config with other values than the folder's"):
        _load(folder, config=config)
    with pytest.raises(ValueError, match="is not made from a config alone"):
        AutoModelForCausalLM.from_config(config)


def test_a_hub_name_is_looked_up_with_the_arguments_for_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def snapshot(name: str, allow_patterns: list[str], **settings: Any) -> str:
        seen[name] = settings
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    network = FinGPTForCausalLM.from_pretrained("owner/name", revision="v1", local_files_only=True)
    assert seen == {"owner/name": {"revision": "v1", "local_files_only": True}}
    assert torch.equal(_logits(network), _logits(_load(folder)))


def _quantized(folder: Path, made: Path, embeddings: bool) -> Path:
    made.mkdir()
    network = load_model(folder).network
    write_quantized(network, made, torch.float32, "int8", embeddings=embeddings)
    return made


@pytest.mark.parametrize("kind", ["plain", "int8", "int8 embedding"])
@pytest.mark.parametrize("load", [_load, lambda folder: load_model(folder).network])
def test_save_pretrained_writes_what_is_read_as_the_same_network(
    kind: str, load: Callable[[Path], PreTrainedModel], folder: Path, tmp_path: Path
) -> None:
    source = folder
    if kind != "plain":
        source = _quantized(folder, tmp_path / "source", "embedding" in kind)
    network = copy.deepcopy(load(source))  # saves itself, not what it was copied from
    with torch.no_grad():
        network.get_parameter("transformer.ln_f.bias").add_(1)
    network.save_pretrained(tmp_path / "no", is_main_process=False)
    assert not (tmp_path / "no").exists()
    network.save_pretrained(tmp_path / "out")
    again = _load(tmp_path / "out")
    assert again.dtype == network.dtype
    assert torch.equal(_logits(again), _logits(network))
    assert not torch.equal(_logits(again), _logits(load(source)))


def test_save_pretrained_refuses_what_it_would_lose(folder: Path, tmp_path: Path) -> None:
    network = _load(folder)
    with pytest.raises(ValueError, match="saved as it is, in a local folder"):
        network.save_pretrained(tmp_path / "out", push_to_hub=True)
    adapt(network, AdapterOptions(2))
    with pytest.raises(ValueError, match="has an adapter: fingpt export writes both"):
        network.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
