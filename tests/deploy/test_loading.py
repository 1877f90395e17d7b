"""The way of Python and the way of the command line give one model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.deploy.generate_options import parse_options
from fingpt_lightning.deploy.loading import load_with_adapters
from fingpt_lightning.evaluation.command import run
from fingpt_lightning.evaluation.options import parse_options as parse_evaluation
from fingpt_lightning.models import device
from fingpt_lightning.models.adapting import adapted_layers, without_adapters
from fingpt_lightning.models.loading import LoadedModel, build_model, load_model
from fingpt_lightning.models.sources import resolve_source
from tests.deploy.tiny_clients import save_clients
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer, write_rows
from tests.models.tiny_models import ids


def _base(folder: Path) -> Path:
    tiny_network("llama").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    return folder / "base"


def _client(folder: Path, quantize: str | None) -> Path:
    return save_clients(_base(folder), folder, 1, quantize=quantize)[0]


def _export_with_adapter(folder: Path) -> Path:
    export(load_model(_client(folder, "nf4")), "nf4", folder / "out")
    assert (folder / "out" / "adapter").is_dir()
    return folder / "out"


def _run_folder(folder: Path) -> Path:
    best, last = save_clients(_base(folder), folder, 2, quantize="nf4")
    for client, name in ((best, "adapter_best"), (last, "adapter")):
        shutil.copytree(client, folder / "run" / name)
    return folder / "run"


_MODELS: dict[str, Callable[[Path], Path]] = {
    "plain base": _base,
    "adapter on float base": lambda folder: _client(folder, None),
    "adapter on nf4 base": lambda folder: _client(folder, "nf4"),
    "adapter on int8 base": lambda folder: _client(folder, "int8"),
    "export with adapter beside": _export_with_adapter,
    "run folder": _run_folder,
}


def _logits(network: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = network(input_ids=ids()).logits
    return logits


@pytest.mark.parametrize("kind", _MODELS)
def test_python_and_the_command_line_give_equal_logits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _MODELS[kind](tmp_path)
    loaded = load_model(path)
    expected = _logits(loaded.network)
    assert not loaded.network.training
    assert bool(adapted_layers(loaded.network)) == (kind != "plain base")
    if kind != "plain base":
        with without_adapters(loaded.network):
            assert (_logits(loaded.network) - expected).abs().max() > 0.1
    method = {"adapter on int8 base": ", int8"}.get(kind, ", nf4")
    end = ")" if kind in ("plain base", "adapter on float base") else f"{method})"
    assert loaded.description == f"{path} (llama{end}"
    words = ["--model", str(path), "--device", "cpu", "--dtype", "float32"]
    generating = load_with_adapters(parse_options([*words, "--prompt", "Gold"]))
    assert torch.equal(_logits(generating.network), expected)
    assert generating.loaded.description == loaded.description
    # `fingpt evaluate` asks the same network.
    asked: list[PreTrainedModel] = []

    def noted(name: str, **settings: Any) -> LoadedModel:
        made = load_model(name, **settings)
        asked.append(made.network)
        return made

    monkeypatch.setattr("fingpt_lightning.evaluation.command.load_model", noted)
    write_rows(tmp_path, "fpb")
    rows = ["--tasks", "fpb", "--data_dir", str(tmp_path), "--output", str(tmp_path / "results")]
    run(parse_evaluation([*words, *rows]))
    assert torch.equal(_logits(asked[0]), expected)


def test_a_base_alone_is_had_from_the_source_of_its_adapter(tmp_path: Path) -> None:
    client = _client(tmp_path, None)
    alone = build_model(resolve_source(client).without_adapter())
    assert not adapted_layers(alone.network)
    assert torch.equal(_logits(alone.network), _logits(load_model(tmp_path / "base").network))


def test_a_bank_is_refused_on_a_model_with_an_adapter_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = _client(tmp_path, None)
    monkeypatch.setattr("fingpt_lightning.deploy.loading.build_model", None)
    words = ["--model", str(client), "--prompt", "Gold", "--adapters", f"ann={client}"]
    with pytest.raises(ValueError, match=r"--adapters need a base; .* has an adapter already"):
        load_with_adapters(parse_options(words))


def test_a_cpu_that_is_faster_in_bfloat16_is_used_so_by_all_commands_which_say_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "_LEAST_FEATURES", 1)
    monkeypatch.setattr(device, "_has_bfloat16", lambda: True)
    monkeypatch.setattr(device, "bfloat16_speedup", lambda *sizes: {(24, 39): 1.5}[sizes])
    write_rows(tmp_path, "fpb")
    words = ["--model", str(_client(tmp_path, "int8")), "--device", "cpu"]
    rows = ["--tasks", "fpb", "--data_dir", str(tmp_path), "--output"]
    for more, dtype in ([], "bfloat16"), (["--dtype", "float32"], "float32"):
        ready = load_with_adapters(parse_options([*words, *more, "--prompt", "Gold"]))
        output = tmp_path / dtype
        run(parse_evaluation([*words, *more, *rows, str(output)]))
        is_told = dtype == "bfloat16"
        assert ready.dtype == dtype
        assert ready.network.get_input_embeddings().weight.dtype == getattr(torch, dtype)
        for said in (ready.remark or "", capsys.readouterr().out):
            assert (
                "computed in bfloat16, in which this CPU was measured faster" in said
            ) == is_told
        results = json.loads((output / "results.json").read_text())
        assert results["settings"]["dtype"] == dtype
