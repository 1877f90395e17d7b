import argparse
import json
import sys
from pathlib import Path

import pytest

from benchmarks import finetuning_memory


def test_a_whole_network_holds_what_two_blocks_and_three_foretell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    words = ["memory", "--toy", "--batch_size", "4", "--block_length", "64", "--vocab_size", "64"]
    monkeypatch.setattr(sys, "argv", [*words, "--rank", "2", "--json", str(path)])
    finetuning_memory.main()
    record = json.loads(path.read_text())
    options = argparse.Namespace(rank=2, batch_size=4, block_length=64, vocab_size=64)
    for way, row in zip(finetuning_memory.WAYS, record["rows"], strict=True):
        assert row["contender"] == way.name
        whole = finetuning_memory.measure(way, finetuning_memory._TOY, 4, options)
        assert row["total_gb"] * 1e9 == pytest.approx(sum(whole.values()), rel=0.001)
    full, full_again, adapters, adapters_again, nf4, ours = (
        row["total_gb"] for row in record["rows"]
    )
    assert full > full_again > ours
    assert adapters > adapters_again > nf4 > ours
    assert record["summary"]["peak_gb"] == ours
