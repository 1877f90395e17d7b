"""Healing: what it holds, and what it leaves for the rounding after it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fingpt_lightning.compression.healing import heal
from fingpt_lightning.compression.plan import healing_bytes
from fingpt_lightning.data.calibration_text import calibration_sources
from fingpt_lightning.decomposition.options import RECORD
from fingpt_lightning.decomposition.runner import Request, decompose_model
from fingpt_lightning.decomposition.source import open_source
from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.models.quantization.fake_quantization import RoundedWeights
from fingpt_lightning.modules import LowRankPretraining
from fingpt_lightning.profiling.memory import LiveTensorBytes
from tests.compression.test_command import SETTINGS
from tests.evaluation.tiny_language import VOCABULARY, tiny_tokenizer


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, the same decomposed, and a text."""
    folder = tmp_path_factory.mktemp("healing")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    lines = (json.dumps({"text": f"Shares of Foo fell as profit rose {n}"}) for n in range(150))
    (folder / "text.jsonl").write_text("\n".join(lines))
    source = open_source(folder / "model")
    decompose_model(source, Request(compression=1 / 0.7), folder / "small")
    return folder


def _heal(given: Path, folder: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "steps": 2, "batch_size": 4, "block_length": 96, "learning_rate": 0.003,
        "precision": "32-true", "teacher_dtype": "float32", "data_dir": None, "seed": 1,
    }  # fmt: skip
    sources = calibration_sources(given / "text.jsonl")
    model = str(given / "model")
    return heal(folder, given / "small", model, sources, tiny_tokenizer(), **settings | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16-mixed", "teacher_dtype": "bfloat16"},
        {"teacher_weight": 0.0, "quantize": "int8"},
    ],
    ids=["float32", "bfloat16", "without a teacher, rounded"],
)
def test_the_plan_counts_what_healing_holds_and_nothing_stays(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    def copies(*_: Any) -> None:
        raise AssertionError("Lightning's own writer holds a second copy of all tensors")

    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io._atomic_save", copies)
    with LiveTensorBytes() as count:
        _heal(given, tmp_path / "run", **changes)
    assert count.live_bytes < 2**16
    source = open_source(given / "model")
    parameters = json.loads((given / "small" / RECORD).read_text())["parameters"]
    settings = {key: value for key, value in changes.items() if key != "quantize"}
    if "quantize" in changes:
        settings["format"] = changes["quantize"]
    planned = healing_bytes(
        source,
        replace(
            SETTINGS, size=parameters / source.network.num_parameters(), batch_size=4,
            block_length=96, **settings,
        ),
        torch.device("cpu"),
        is_rounded="quantize" in changes,
    )  # fmt: skip
    assert planned == pytest.approx(count.peak_bytes, rel=0.15)


def test_rounded_healing_trains_the_weights_that_an_export_stores(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    real = LowRankPretraining.training_sums

    def watched(self: Any, *rest: Any) -> Any:
        seen.append(self.network.model.layers[0].mlp.up_proj.down.detach().clone())
        assert self.teacher is None
        return real(self, *rest)

    monkeypatch.setattr(LowRankPretraining, "training_sums", watched)
    end = _heal(given, tmp_path / "run", quantize="nf4", teacher_weight=0.0, warmup=0.0)
    healed = load_model(end, tokenizer=given / "small")
    ids = torch.arange(30)[None]
    weights = RoundedWeights(healed.network, "nf4")
    weights.apply()
    with torch.no_grad():
        expected = healed.network(input_ids=ids).logits
    weights.restore()
    export(healed, "nf4", tmp_path / "rounded")
    with torch.no_grad():
        stored = load_model(tmp_path / "rounded").network(input_ids=ids).logits
    torch.testing.assert_close(stored, expected, rtol=1e-5, atol=1e-5)
    # Each block of 64 numbers has at most 16 values in the passes; what is stored has more.
    assert all(len(row.unique()) <= 16 for row in seen[-1].flatten()[:4096].view(-1, 64))
    state = torch.load(end, weights_only=True)["state_dict"]
    kept = state["network.model.layers.0.mlp.up_proj.down"]
    assert any(len(row.unique()) > 16 for row in kept.flatten()[:4096].view(-1, 64))
