import json
from pathlib import Path

import pytest

from benchmarks import bf16_curve
from tests.support.warm_python import run_as_subprocess

CONFIG = Path(__file__).parents[2] / "configs" / "debug_quickstart.yaml"


@pytest.mark.slow
def test_both_precisions_run_at_toy_size_and_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.run", run_as_subprocess)
    path = tmp_path / "record.json"
    words = ["--config", str(CONFIG), "--json", str(path), "--", "--trainer.logger", "false",
             "--data.cache_dir", str(tmp_path / "cache")]  # fmt: skip
    bf16_curve.main(words)
    record = json.loads(path.read_text())
    assert [row["contender"] for row in record["rows"]] == ["float32", "bfloat16"]
    exact, rounded = ([p["loss_nats"] for p in row["train_curve"]] for row in record["rows"])
    assert exact != rounded
    assert set(record["summary"]) == {
        "largest_train_loss_difference_ratio", "largest_val_loss_difference_ratio",
    }  # fmt: skip
    assert max(record["summary"].values()) < 0.02
    kernel = record["machine"]["bfloat16_kernel"]
    assert record["machine"]["amx"] == ("amx" in (kernel or ""))
    assert "Largest difference, training: " in path.with_suffix(".md").read_text()


def test_the_largest_difference_is_that_of_one_step() -> None:
    assert bf16_curve.largest_difference({1: 4.0, 5: 2.0}, {1: 4.2, 5: 2.0}) == 0.05
    with pytest.raises(ValueError, match=r"steps \[1\] and \[2\] differ"):
        bf16_curve.largest_difference({1: 4.0}, {2: 4.0})


def test_a_run_without_validation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss,val/loss\n9,3.5,\n")
    with pytest.raises(ValueError, match="has no val/loss"):
        bf16_curve.read_curves(path)
