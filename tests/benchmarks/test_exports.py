import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import exports
from fingpt_lightning.low_rank.adapters import AdapterOptions
from fingpt_lightning.models.adapting import adapt, adapted_layers, save_adapter
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer, write_rows


def test_exports_and_mixed_adapters_are_compared_with_their_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    network = tiny_network("llama")
    network.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    adapt(network, AdapterOptions(3), seed=1)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(network).values():
            nn.init.normal_(layer.lora_B, std=0.3)
    save_adapter(network, adapter, str(base))
    write_rows(tmp_path, "fpb")
    write_rows(tmp_path, "fpb", "train")
    path = tmp_path / "record.json"
    words = {
        "--adapter": adapter, "--data_dir": tmp_path, "--num_adapters": 3, "--batch_size": 2,
        "--json": path,
    }  # fmt: skip
    arguments = ["exports", *(str(word) for pair in words.items() for word in pair)]
    forms = ["merged", "int8", "nf4", "nf4_calibrated", "gguf"]
    pytest.importorskip("gguf", reason="gguf is not installed")
    monkeypatch.setattr(sys, "argv", [*arguments, "--forms", *forms])
    exports.main()
    record = json.loads(path.read_text())
    assert [row["contender"] for row in record["rows"]] == ["base and adapter", *forms]
    errors = {row["contender"]: row.get("max_relative_logit_error") for row in record["rows"]}
    assert errors["nf4_calibrated"] < errors["nf4"]
    assert all(row["num_prompts"] == 5 for row in record["rows"])
    assert record["summary"]["share_equal_predictions_merged"] == 1.0
    assert record["summary"]["share_equal_answers_mixed_batches"] == 1.0
    if find_spec("xllamacpp"):
        assert record["summary"]["llama_cpp_share_equal_next_tokens"] == 1.0
        assert record["summary"]["llama_cpp_relative_logit_error"] < 0.01
    adapters = record["adapters"]
    assert adapters["max_logit_difference"] < 1e-4 < adapters["logit_change_by_an_adapter"]
    assert "3 adapters in mixed batches of 2" in path.with_suffix(".md").read_text()
