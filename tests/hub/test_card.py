import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from fingpt_lightning.hub.card import (
    Origin,
    evaluation_results,
    metadata_block,
    origin_of,
    read_metadata,
    results_in,
    results_of_step,
    run_folder_of,
)

FPB = {
    "accuracy": 0.87654, "weighted_f1": 0.87, "macro_f1": 0.85, "main_metric": "weighted_f1",
    "kind": "labels", "split": "validation", "n": 358,
}  # fmt: skip


def _write(file: Path, content: str | dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_the_block_is_what_the_client_of_the_hub_reads() -> None:
    block = metadata_block(
        "small",
        Origin("me/base", {"license": "apache-2.0", "language": ["en"]}, ("me/texts",)),
        library="peft",
        tags=["lora"],
        relation="adapter",
        datasets=["me/texts", "takala/financial_phrasebank"],
        results=evaluation_results({"fpb": FPB}),
    )
    data: Any = ModelCard(block + "# small\n").data
    assert (data.license, data.language, data.base_model) == ("apache-2.0", ["en"], "me/base")
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert data.tags == ["fingpt-lightning", "lora"]
    assert data.datasets == ["me/texts", "takala/financial_phrasebank"]
    assert data.to_dict()["base_model_relation"] == "adapter"
    (model,) = data.to_dict()["model-index"]
    (result,) = model["results"]
    assert model["name"] == "small"
    assert result["task"] == {"type": "text-classification", "name": "fpb"}
    assert result["dataset"]["type"] == "takala/financial_phrasebank"
    assert result["dataset"]["name"].startswith("Financial PhraseBank, the sentiment of")
    assert result["dataset"]["split"] == "validation"
    assert result["dataset"]["args"] == {"rows": 358}
    figures = [(one["type"], one["name"], one["value"]) for one in result["metrics"]]
    assert figures == [
        ("f1", "weighted F1", 0.87), ("accuracy", "accuracy", 0.8765), ("f1", "macro F1", 0.85)
    ]  # fmt: skip


def test_what_is_not_known_is_left_out() -> None:
    block = metadata_block("small", Origin(), library="transformers", tags=[], relation="finetune")
    assert yaml.safe_load(block.strip("-\n")) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fingpt-lightning"],
    }


def test_a_task_of_ones_own_has_its_own_name_as_data_set() -> None:
    (result,) = evaluation_results({"ours": {"accuracy": 1, "kind": "labels"}})
    assert (result.dataset_type, result.dataset_name) == ("ours", "ours")


def test_license_and_base_come_down_from_a_card_through_decomposition_and_run(
    tmp_path: Path,
) -> None:
    base = tmp_path / "base"
    _write(base / "README.md", "---\nlicense: mit\nbase_model: me/first\ntags: [x]\n---\n# Base\n")
    _write(tmp_path / "small" / "decomposition.json", {"source": f"{base} (gpt2)"})
    data = {"tasks": ["fpb", "synthetic"], "train_files": ["hf://me/texts/en@v1:train", "a.txt"]}
    run = tmp_path / "runs" / "one"
    config = {"model": {"init_args": {"init_from": str(tmp_path / "small")}}}
    _write(run / "config.yaml", yaml.safe_dump(config | {"data": {"init_args": data}}))
    for place in (run, run / "checkpoints" / "best.ckpt", run / "adapter"):
        _write(place / "x" if place.suffix == "" else place, "")
        assert origin_of(str(place)) == (
            "me/first", {"license": "mit"}, ("takala/financial_phrasebank", "me/texts")
        )  # fmt: skip
        assert run_folder_of(place if place.is_dir() else place.parent) == run


def test_names_of_the_hub_are_bases_and_lost_paths_are_not(tmp_path: Path) -> None:
    snapshot = _write(tmp_path / "README.md", "---\nlicense: llama2\n---\n").parent
    assert origin_of("gpt2", snapshot) == ("gpt2", {"license": "llama2"}, ())
    assert origin_of("nobody/none") == ("nobody/none", {}, ())
    assert origin_of(str(tmp_path / "gone" / "model")) == (None, {}, ())
    assert origin_of("random") == (None, {}, ())


@pytest.mark.parametrize(
    "card", ["# no metadata", "---\nlicense: [\n---\n", "---\n- 1\n---\n", "---\nlicense: \n---"]
)
def test_a_card_without_metadata_says_nothing(card: str, tmp_path: Path) -> None:
    _write(tmp_path / "README.md", card)
    assert not any(read_metadata(tmp_path / "README.md").values())
    assert origin_of(str(tmp_path)) == (None, {}, ())
    assert read_metadata(tmp_path / "none") == {}


def test_a_base_that_is_its_own_source_ends(tmp_path: Path) -> None:
    _write(tmp_path / "decomposition.json", {"source": f"{tmp_path} (gpt2)"})
    assert origin_of(str(tmp_path)) == (None, {}, ())


def _results(folder: Path, revision: str, adapter: str | None, model: str | None = None) -> Any:
    """`results_in` of a model whose adapter was trained on nf4."""
    trained_on = {"auto": "nf4", "none": None}
    return results_in(folder, revision, adapter, model, lambda x: trained_on.get(x, x))


def test_results_are_those_of_the_same_weights(tmp_path: Path) -> None:
    head = {"revision": "a", "adapter_sha256": "b", "model": "m (gpt2)"}
    _write(tmp_path / "results.json", {**head, "tasks": {"fpb": FPB}})
    assert _results(tmp_path, "a", "b", "nf4") == {"fpb": FPB}
    for revision, adapter in (("c", "b"), ("a", None)):
        with pytest.raises(ValueError, match=r"are of m \(gpt2\), whose weights are not those of"):
            _results(tmp_path, revision, adapter)
    with pytest.raises(FileNotFoundError, match=r"results .*none: no results.json in it"):
        _results(tmp_path / "none", "a", "b")
    _write(tmp_path / "results.json", "[]")
    with pytest.raises(ValueError, match="is not the results of an evaluation"):
        _results(tmp_path, "a", "b")


@pytest.mark.parametrize(
    ("setting", "resolved", "measured"),
    [("auto", " (nf4)", "nf4"), ("none", "", None), ("nf4", "", "nf4"), ("int8", "", "int8")],
)
def test_results_are_those_of_the_same_quantization(
    setting: str, resolved: str, measured: str | None, tmp_path: Path
) -> None:
    head = {"revision": "a", "adapter_sha256": None, "settings": {"quantize": setting}}
    _write(tmp_path / "results.json", {**head, "tasks": {"fpb": FPB}})
    assert _results(tmp_path, "a", None, measured) == {"fpb": FPB}
    others = {None, "nf4", "int8"} - {measured}
    assert len(others) == 2
    for other in others:
        with pytest.raises(ValueError, match="were measured") as refused:
            _results(tmp_path, "a", None, other)
        assert str(refused.value) == (
            f"results {tmp_path} were measured with quantize {setting}{resolved}, and the model is"
            f" {other or 'not quantized'}; quantize {setting} exports what was measured"
        )


@pytest.mark.parametrize(
    "config",
    [
        "model: {init_args: [1]}",
        "model: {init_args: {base: 3}}\ndata: {init_args: {tasks: 5}}",
        "data: {init_args: {train_files: 7}}",
        "- a",
    ],
)
def test_a_config_of_another_program_tells_nothing(config: str, tmp_path: Path) -> None:
    _write(tmp_path / "config.yaml", config)
    (tmp_path / "models" / "small").mkdir(parents=True)
    origin = origin_of(str(tmp_path / "models" / "small"))
    assert origin.base_model is None
    assert not origin.datasets


def test_results_of_a_run_are_those_of_the_step(tmp_path: Path) -> None:
    for step in (2, 4):
        found = {"started_at": f"2026-01-0{step}", "tasks": {"fpb": FPB | {"n": step}}}
        _write(tmp_path / "eval" / str(step) / "results.json", found)
    assert results_of_step(tmp_path, 2)["fpb"]["n"] == 2
    assert results_of_step(tmp_path, 3) == {}
    _write(tmp_path / "eval" / "2" / "results.json", "{")
    assert results_of_step(tmp_path, 2) == {}
