import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import finetuning_accuracy
from fingpt_lightning.models.adapting import adapted_layers
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.modules import QuantizedFinetuning
from tests.evaluation.tiny_language import ROWS, tiny_network, tiny_tokenizer, write_rows


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A command line with a tiny model and few rows."""
    tiny_network("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "fpb").mkdir()
    lines = [json.dumps(row) + "\n" for row in ROWS["fpb"]]
    (tmp_path / "fpb" / "train.jsonl").write_text("".join(lines * 4))
    (tmp_path / "fpb" / "validation.jsonl").write_text("".join(lines))
    words = {
        "--model": tmp_path / "model", "--data_dir": tmp_path, "--batch_size": 4, "--rank": 2,
        "--max_length": 300, "--json": tmp_path / "record.json",
    }  # fmt: skip
    return ["accuracy", *(str(word) for pair in words.items() for word in pair)]


def test_runs_are_trained_once_and_their_gain_is_recorded(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments += ["--max_steps", "2", "--adapters", str(tmp_path / "adapters")]
    path = tmp_path / "record.json"
    fpb = replace(finetuning_accuracy.RUNS["fpb"], evaluated=("fpb",))
    monkeypatch.setitem(finetuning_accuracy.RUNS, "fpb", fpb)
    for runs in ("fpb, unquantised", "fpb", "fpb, unquantised,fpb"):
        monkeypatch.setattr(sys, "argv", [*arguments, "--runs", runs])
        finetuning_accuracy.main()
    record = json.loads(path.read_text())
    # In the order of the grid, and neither trained again.
    assert [row["run"] for row in record["rows"]] == ["fpb", "fpb, unquantised"]
    assert [row["steps"] for row in record["rows"]] == [2, 2]
    accuracy, before = record["rows"][0]["accuracy"], record["untrained"]["fpb"]["accuracy"]
    assert record["summary"]["fpb_accuracy"] == accuracy
    assert record["summary"]["financial_gain_points"] == pytest.approx(100 * (accuracy - before))
    # Of a run whose adapter is kept, another task is evaluated without training anew.
    wider = replace(fpb, evaluated=("fpb", "fiqa_sa"))
    monkeypatch.setitem(finetuning_accuracy.RUNS, "fpb", wider)
    write_rows(tmp_path, "fiqa_sa")
    monkeypatch.setattr(finetuning_accuracy, "Trainer", None)
    finetuning_accuracy.main()
    (trained, evaluated) = json.loads(path.read_text())["rows"][:2]
    assert (trained["task"], evaluated["task"]) == ("fpb", "fiqa_sa")
    assert trained["steps"] == evaluated["steps"] == 2
    kept = load_model(tmp_path / "adapters" / "fpb_unquantised")
    assert kept.source.adapter is not None
    assert adapted_layers(kept.network)
    assert "fpb, unquantised -> fpb" in capsys.readouterr().out


def test_a_killed_run_goes_on_and_ends_where_it_would_have(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fpb = replace(finetuning_accuracy.RUNS["fpb"], evaluated=("fpb",))
    monkeypatch.setitem(finetuning_accuracy.RUNS, "fpb", fpb)
    arguments += ["--max_steps", "5", "--checkpoint_interval", "2", "--runs", "fpb"]
    step = QuantizedFinetuning.training_step

    def killed(self: QuantizedFinetuning, *args: Any) -> Any:
        if self.global_step == 3:
            raise RuntimeError("killed")
        return step(self, *args)

    monkeypatch.setattr(sys, "argv", [*arguments, "--adapters", str(tmp_path / "whole")])
    finetuning_accuracy.main()
    (tmp_path / "record.json").unlink()
    monkeypatch.setattr(sys, "argv", [*arguments, "--adapters", str(tmp_path / "halves")])
    with monkeypatch.context() as patch:
        patch.setattr(QuantizedFinetuning, "training_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            finetuning_accuracy.main()
    assert not (tmp_path / "record.json").exists()
    finetuning_accuracy.main()
    (row,) = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert row["steps"] == 5
    whole, halves = (
        load_file(tmp_path / name / "fpb" / "adapter_model.safetensors")
        for name in ("whole", "halves")
    )
    assert all(torch.equal(halves[name], tensor) for name, tensor in whole.items())
    assert [path.name for path in (tmp_path / "halves").iterdir()] == ["fpb"]


def test_an_unknown_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--json", str(tmp_path / "r.json"), "--data_dir", str(tmp_path), "--runs", "fbp"]
    monkeypatch.setattr(sys, "argv", ["accuracy", *arguments])
    with pytest.raises(SystemExit, match="'fbp' is none of fpb; "):
        finetuning_accuracy.main()


def test_a_run_with_a_chat_template_stands_beside_the_plain_one(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny-instruct"
    (tmp_path / "model").rename(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    arguments[arguments.index("--model") + 1] = str(folder)
    runs = "fpb, chat template, seed 2,fpb, seed 2"
    monkeypatch.setattr(sys, "argv", [*arguments, "--runs", runs, "--max_steps", "2"])
    finetuning_accuracy.main()
    record = json.loads((tmp_path / "record.json").read_text())
    plain, chat = record["rows"]
    assert [row["chat_template"] for row in (plain, chat)] == ["none", "auto"]
    assert plain["split_sha256"] == chat["split_sha256"]
    assert plain["val_loss"] != chat["val_loss"]
    assert record["untrained"].keys() == {"fpb", "fpb, chat template"}
    summary = record["summary"]
    assert summary["fpb_accuracy_with_chat_template"] == chat["accuracy"]
    assert summary["fpb_accuracy_without_chat_template"] == plain["accuracy"]
