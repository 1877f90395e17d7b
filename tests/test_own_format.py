import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fingpt_lightning.models.formats.hf_folder import write_network
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.own_format import MODEL_TYPE, unwrapped, wrapped
from tests.evaluation.tiny_language import tiny_network
from tests.models.tiny_models import tiny_gpt2


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_only_what_transformers_does_not_read_is_of_our_type(tmp_path: Path) -> None:
    for name, network in {"dense": tiny_gpt2(), "low_rank": tiny_network("low_rank")}.items():
        (tmp_path / name).mkdir()
        write_network(network, tmp_path / name, torch.float32)
    assert _config(tmp_path / "dense")["model_type"] == "gpt2"
    assert _config(tmp_path / "low_rank")["model_type"] == MODEL_TYPE


def test_a_folder_that_was_written_under_its_familys_type_is_still_read(tmp_path: Path) -> None:
    network = tiny_network("low_rank")
    write_network(network, tmp_path, torch.float32)
    file = tmp_path / "config.json"
    before = unwrapped(_config(tmp_path), file)
    assert before["model_type"] == "gpt2"
    file.write_text(json.dumps(before))
    loaded, ids = load_model(tmp_path), torch.tensor([[3, 1, 4]])
    assert loaded.description.endswith("(low-rank gpt2)")
    with torch.no_grad():
        assert torch.equal(loaded.network(ids).logits, network(ids).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": None}, "text_config None is not an object"),
        ({"architectures": ["GPT2LMHeadModel"]}, "FinGPTForCausalLM is$"),
        ({"num_experts": 4}, "num_experts 4 is not supported"),
        ({"auto_map": {"AutoModel": "model.py"}}, "auto_map .* is not supported"),
        ({"base_model_type": "gpt3"}, "'gpt3' is not supported; .*; did you mean gpt2"),
        ({"base_model_type": MODEL_TYPE}, "architecture 'fingpt_lightning' is not supported"),
        ({"base_model_type": None}, "architecture None is not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_is_not_as_it_is_written_is_refused_by_key_and_file(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_network(tiny_network("low_rank"), tmp_path, torch.float32)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(_config(tmp_path) | change))
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        load_model(tmp_path)


def test_a_key_that_is_off_and_the_entries_of_all_configs_are_taken() -> None:
    described = {"model_type": "gpt2", "n_layer": 2, "dtype": "float32"}
    found = wrapped(described) | {"transformers_version": "5.17.0", "use_experts": False}
    assert unwrapped(found, Path("config.json")) == described
