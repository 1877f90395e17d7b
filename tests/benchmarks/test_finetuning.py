import json
from pathlib import Path

import pytest

from benchmarks import finetuning


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_both_contenders_take_the_same_steps(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    path = tmp_path / "record.json"
    finetuning.main(
        ["--json", str(path), "--toy", "--batch_size", "3", "--repeats", "2", "--rank", "2"]
    )
    record = json.loads(path.read_text())
    summary = record["summary"]
    assert summary["max_relative_loss_difference"] < 1e-5
    assert summary["max_relative_loss_difference_bf16"] < 0.02
    assert 0 < summary["step_memory_ratio"] < 1
    assert summary["examples_per_s_ratio_fp32"] > 0
    assert len(record["rows"]) == 4
    assert "ours, bf16" in path.with_suffix(".md").read_text()
