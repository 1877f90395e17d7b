import json
import sys
from pathlib import Path

import pytest

from benchmarks import zero_shot
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer, write_rows


def test_each_task_is_answered_by_all_contenders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_network("gpt2").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for task in ("fpb", "piqa", "nwgi"):
        write_rows(tmp_path, task)
    (tmp_path / "fpb" / "train.jsonl").write_text(
        (tmp_path / "fpb" / "validation.jsonl").read_text()
    )
    words = {
        "--model": tmp_path / "model",
        "--data_dir": tmp_path,
        "--tasks": "fpb,piqa,nwgi",
        "--json": tmp_path / "record.json",
    }
    arguments = ["zero_shot", *(str(word) for pair in words.items() for word in pair)]
    monkeypatch.setattr(sys, "argv", arguments)
    zero_shot.main()
    record = json.loads((tmp_path / "record.json").read_text())
    both = ["zero-shot", "zero-shot, calibrated", "majority class"]
    learned = "TF-IDF and logistic regression"
    contenders = [(row["task"], row["contender"]) for row in record["rows"]]
    assert contenders == [
        *(("fpb", own) for own in [*both, learned]),
        ("piqa", "zero-shot"),
        *(("nwgi", own) for own in both),
    ]
    by_name = dict(zip(contenders, record["rows"], strict=True))
    # It knows the rows it was trained on; two of the five are neutral, two negative.
    assert by_name["fpb", learned]["accuracy"] == 1.0
    assert by_name["fpb", "majority class"]["accuracy"] == 0.4
    assert record["summary"][f"mean_accuracy: {learned}"] == 1.0
    assert record["summary"]["mean_accuracy: majority class"] == 0.4
    assert "| piqa: zero-shot |" in (tmp_path / "record.md").read_text()
