import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quantization


def test_all_parts_run_at_toy_size_and_none_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    words = ["quantization", "--toy", "--json", str(path), "--work_dir", str(tmp_path / "work"),
             "--repeats", "1"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    quantization.main()
    record: dict[str, Any] = json.loads(path.read_text())
    summary = record["summary"]
    assert set(summary) == {
        "int8_loss_gap_nats", "nf4_loss_gap_nats", "nf4_loss_gap_nats_without_awareness",
        "file_ratio_int8_gpt2_small", "file_ratio_nf4_gpt2_small", "file_ratio_int8_gpt2_xl",
        "file_ratio_nf4_gpt2_xl", "xl_int8_file_gb", "xl_nf4_file_gb",
    }  # fmt: skip
    assert summary["file_ratio_nf4_gpt2_small"] > summary["file_ratio_int8_gpt2_small"] > 2
    assert abs(summary["int8_loss_gap_nats"]) < 0.01
    by_name = {row["contender"]: row for row in record["rows"]}
    assert by_name["nf4-aware, nf4"]["val_tokens"] == by_name["plain, float32"]["val_tokens"]
    markdown = path.with_suffix(".md").read_text()
    assert "| gpt2_xl, nf4 |" in markdown
    assert "| one token, int8 |" in markdown

    def fail(*_: object) -> None:
        raise AssertionError("a part is repeated")

    for name in ("file_rows", "loss_rows", "speed_rows"):
        monkeypatch.setattr(quantization, name, fail)
    quantization.main()
    assert json.loads(path.read_text())["rows"] == record["rows"]
    monkeypatch.setattr(sys, "argv", [*words, "--steps", "9"])
    with pytest.raises(ValueError, match="was made with other settings"):
        quantization.main()
