"""What the card of an export tells the hub of the model, its base and its evaluations."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from lightning.pytorch import Trainer

import fingpt_lightning
from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.deploy.model_card import Reading, known_of, model_card, read_record
from fingpt_lightning.models.formats.peft_adapter import adapter_digest
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.modules import LowRankPretraining
from tests.deploy.tiny_clients import save_clients
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer
from tests.support.token_data import TokenData

FPB = {"accuracy": 0.75, "main_metric": "accuracy", "kind": "labels", "split": "validation", "n": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense GPT-2 with a card like those of the hub."""
    folder = tmp_path_factory.mktemp("card") / "base"
    tiny_network("gpt2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    card = "---\nlicense: apache-2.0\nbase_model: first/model\n---\n# Base\n"
    (folder / "README.md").write_text(card)
    return folder


def _card(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = ModelCard.load(folder / "README.md").data.to_dict()
    return found


def _results(folder: Path, **head: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({**head, "tasks": {"fpb": FPB}}))
    return folder


def test_the_card_of_an_adapter_names_base_license_and_results(base: Path, tmp_path: Path) -> None:
    (client,) = save_clients(base, tmp_path / "clients", 1)
    revision = load_model(base).revision
    results = _results(tmp_path / "eval", revision=revision, adapter_sha256=adapter_digest(client))
    fingpt_lightning.export(client, "peft", tmp_path / "out", results=results)
    card = _card(tmp_path / "out")
    assert (card["license"], card["base_model"]) == ("apache-2.0", "first/model")
    assert (card["base_model_relation"], card["library_name"]) == ("adapter", "peft")
    assert card["tags"] == ["fingpt-lightning", "lora"]
    (result,) = card["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.75, "name": "accuracy"}]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| fpb | validation | accuracy | 0.750 |" in text
    with pytest.raises(ValueError, match="whose weights are not those of the model"):
        fingpt_lightning.export(base, "hf", tmp_path / "dense", results=results)
    assert not (tmp_path / "dense").exists()


def test_figures_from_before_rounding_are_told_and_not_claimed(base: Path, tmp_path: Path) -> None:
    source = load_model(base)
    results = _results(tmp_path / "eval", revision=source.revision, adapter_sha256=None)
    export(source, "int8", tmp_path / "out", tolerance=2.0, results=[results])
    card = _card(tmp_path / "out")
    assert "model-index" not in card
    assert (card["base_model_relation"], card["tags"][-1]) == ("quantized", "int8")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Evaluation of the source, before this export:" in text


@pytest.mark.parametrize(
    ("kind", "measured", "loaded", "are_equal"),
    [
        ("plain", "none", "auto", True),
        ("plain", "none", "nf4", False),
        ("plain", "nf4", "nf4", True),
        ("adapter trained on nf4", "auto", "nf4", True),
        ("adapter trained on nf4", "none", "auto", False),
        ("adapter trained on nf4", "auto", "none", False),
        ("stored in int8", "none", "auto", True),
        ("stored in int8", "auto", "none", True),
    ],
)
def test_results_hold_for_the_quantization_that_they_were_measured_in(
    kind: str, measured: str, loaded: str, are_equal: bool, base: Path, tmp_path: Path
) -> None:
    model = base
    if kind == "stored in int8":
        model = tmp_path / "model"
        export(load_model(base), "int8", model, tolerance=2.0)
    elif kind != "plain":
        (model,) = save_clients(base, tmp_path / "clients", 1, quantize="nf4")
    source = load_model(model, quantize=loaded)
    adapter = None if source.source.adapter is None else adapter_digest(model)
    head = {"revision": source.revision, "adapter_sha256": adapter}
    results = _results(tmp_path / "eval", **head, settings={"quantize": measured})
    if are_equal:
        assert known_of(source, [results]).tasks == {"fpb": FPB}
    else:
        with pytest.raises(ValueError, match=f"were measured with quantize {measured}"):
            known_of(source, [results])


def test_the_card_of_a_run_has_what_the_run_measured_at_that_step(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    (run / "checkpoints").mkdir(parents=True)
    trainer = Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, limit_val_batches=0, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    module = LowRankPretraining(
        preset="gpt2-nano", num_layers=1, width=12, num_heads=3, num_positions=16, rank=3
    )
    trainer.fit(module, datamodule=TokenData(batch_size=2))
    trainer.save_checkpoint(run / "checkpoints" / "best.ckpt")
    config = {"data": {"init_args": {"train_files": ["hf://me/texts"]}}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    _results(run / "eval" / "2", started_at="2026-01-01")
    export(load_model(run), "low_rank", tmp_path / "out")
    card = _card(tmp_path / "out")
    assert card["datasets"] == ["me/texts"]
    assert card["library_name"] == "fingpt-lightning"
    assert card["tags"] == ["fingpt-lightning", "low-rank"]
    assert card["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.75
    assert not {"license", "base_model"} & card.keys()
    # The run measured it without rounding.
    export(load_model(run, quantize="int8"), "int8", tmp_path / "int8", tolerance=2.0)
    assert "model-index" not in _card(tmp_path / "int8")


def test_the_record_in_a_card_comes_back_whatever_is_in_it(base: Path, tmp_path: Path) -> None:
    source = load_model(base)
    made = export(source, "hf", tmp_path / "out", request="abc")
    assert read_record(tmp_path / "out") == ("abc", made)
    odd = made._replace(calibration="16 tokens of a --> b.txt")
    card = tmp_path / "out" / "README.md"
    card.write_text(model_card(source, odd, "out", Reading(False, False, None), "abc"))
    assert card.read_text().partition("<!--")[2].partition("-->")[0].endswith("} ")
    assert read_record(tmp_path / "out") == ("abc", odd)
    card.write_text(card.read_text().replace('"tolerance"', '"tolerances"'))
    assert read_record(tmp_path / "out") == (None, None)
