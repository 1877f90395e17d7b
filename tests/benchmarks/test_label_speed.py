import json
import sys
from pathlib import Path

import pytest

from benchmarks import label_speed
from benchmarks.label_speed import CONTENDERS, LOOP, MERGED


def test_all_contenders_run_at_toy_size_and_answer_as_undequantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["label_speed", "--toy", "--json", str(path)])
    label_speed.main()
    record = json.loads(path.read_text())
    names = [(row["what"], row["contender"]) for row in record["rows"]]
    assert names == [
        *(("label", name) for name in [*CONTENDERS, LOOP]),
        *(("generate", name) for name in CONTENDERS),
    ]
    shares = {name: row["share_of_equal_answers"]
              for name, row in zip(names, record["rows"], strict=True)}  # fmt: skip
    assert [share for (_, name), share in shares.items() if "once" in name] == [1.0] * 6
    assert shares["label", LOOP] is not None
    assert shares["label", MERGED] is None
    summary = record["summary"]
    assert summary["share_of_equal_answers"] == 1.0
    assert summary["label_nf4_with_adapter_once_ratio_to_merged"] > 0
    assert summary["generate_nf4_with_adapter_ratio_to_merged"] > 0
    assert 0 < summary["label_share_of_peak"] < 1
    assert f"| label: {MERGED} |" in (tmp_path / "record.md").read_text()
