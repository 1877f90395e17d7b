import json
import sys
from pathlib import Path

import pytest

from fingpt_lightning.benchmarks import finetuning_memory


def test_each_way_is_built_from_one_block_and_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    sizes = ["--batch_size", "4", "--block_length", "64", "--vocab_size", "64", "--rank", "2"]
    monkeypatch.setattr(sys, "argv", ["memory", "--toy", *sizes, "--json", str(path)])
    finetuning_memory.main()
    record = json.loads(path.read_text())
    rows = {row["contender"]: row for row in record["rows"]}
    for row in rows.values():
        one, two = row["total_gb_of_1_and_2_blocks"]
        assert row["total_gb"] == pytest.approx(one + 3 * (two - one))
    total = {name: row["total_gb"] for name, row in rows.items()}
    full, full_again, adapters, adapters_again, nf4, ours = total.values()
    assert full > full_again > ours
    assert adapters > adapters_again > nf4 > ours
    # What a block keeps on the host is its input: 4 x 64 x 64 numbers of 2 bytes.
    of_inputs = [
        rows[way.name]["step_gb"] - rows[finetuning_memory.OURS]["step_gb"]
        for way in finetuning_memory.WAYS[4:5]
    ]
    assert of_inputs[0] * 1e9 == pytest.approx(3 * 4 * 64 * 64 * 2, rel=0.35)
    assert record["summary"]["peak_gb"] == ours
