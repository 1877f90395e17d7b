import json
import sys
from pathlib import Path

import pytest

from benchmarks import serving
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer, write_rows


def test_a_toy_record_has_the_same_answers_from_all_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_network("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_rows(tmp_path, "fpb")
    monkeypatch.setattr(sys, "argv", [
        "serving", "--json", str(tmp_path / "record.json"), "--model", str(tmp_path / "model"),
        "--data_dir", str(tmp_path), "--num_requests", "40", "--num_clients", "8",
        "--num_single", "8", "--max_tokens", "4", "--num_adapters", "2", "--rank", "2",
    ])  # fmt: skip
    serving.main()
    record = json.loads((tmp_path / "record.json").read_text())
    summary = record["summary"]
    assert summary["same_as_generate"] == summary["same_as_one_at_a_time"] == 1
    assert summary["num_errors"] == summary["overloaded_lost"] == 0
    assert summary["has_ended_with_status_0"]
    assert record["ended_amid_requests"]["lost"] == 0
    assert record["ended_amid_requests"]["exit_status"] == 0
    assert "| all clients | 40 |" in (tmp_path / "record.md").read_text()
