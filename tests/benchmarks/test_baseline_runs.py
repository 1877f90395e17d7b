import json
import sys
from pathlib import Path

import pytest

from benchmarks import baseline_runs
from tests.support.warm_python import run_as_subprocess

CONFIG = Path(__file__).parents[2] / "configs" / "debug_pretrain_gpt2_small.yaml"


@pytest.mark.slow
def test_the_twins_run_at_toy_size_and_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    words = ["baseline_runs", "--config", str(CONFIG), "--json", str(path), "--runs_dir",
             str(tmp_path / "runs"), "--", "--trainer.logger", "false",
             "--data.cache_dir", str(tmp_path / "cache")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr("subprocess.run", run_as_subprocess)
    baseline_runs.main()
    record = json.loads(path.read_text())
    rows = {row["contender"]: row for row in record["rows"]}
    assert list(rows) == ["dense", "low_rank", "low_rank_adamw"]
    dense, low_rank, adamw = rows.values()
    tokens = [[p["tokens"] for p in row["val_curve"]] for row in rows.values()]
    assert tokens[0] == tokens[1] == tokens[2]
    assert low_rank["spectron_learning_rate"] == 0.07
    assert dense["spectron_learning_rate"] is adamw["spectron_learning_rate"] is None
    assert record["summary"]["total_compression_ratio"] > 2
    assert set(record["summary"]) == {
        "total_compression_ratio", "block_compression_ratio", "tokens_per_s_ratio",
        "peak_rss_ratio", "loss_gap_nats_equal_tokens", "loss_gap_nats_equal_time",
        "adamw_loss_gap_nats_equal_tokens", "adamw_loss_gap_nats_equal_time",
    }  # fmt: skip
    assert path.with_suffix(".svg").read_text().startswith("<?xml")
    assert "| dense |" in path.with_suffix(".md").read_text()


def _run(times_s: list[float], losses: list[float], step_time_s: float) -> dict[str, object]:
    curve = [
        {"tokens": 10.0 * i, "time_s": t, "loss_nats": loss}
        for i, (t, loss) in enumerate(zip(times_s, losses, strict=True))
    ]
    return {
        "val_curve": curve,
        "parameters": 100 / step_time_s,
        "block_parameters": 50,
        "peak_rss_mib": 8.0,
        "step_time_s": {"median": step_time_s},
    }


def test_gaps_compare_at_equal_tokens_and_at_equal_time() -> None:
    dense = _run([0.0, 10.0, 20.0], [9.0, 5.0, 4.0], step_time_s=2.0)
    low_rank = _run([0.0, 5.0, 15.0], [9.0, 6.0, 4.2], step_time_s=1.0)
    adamw = _run([0.0, 5.0, 15.0], [9.0, 7.0, 6.2], step_time_s=1.0)
    found = baseline_runs.summary(dense, low_rank, adamw)
    assert found["loss_gap_nats_equal_tokens"] == pytest.approx(0.2)
    assert found["loss_gap_nats_equal_time"] == pytest.approx(4.2 - 4.5)
    assert found["adamw_loss_gap_nats_equal_tokens"] == pytest.approx(2.2)
    assert found["adamw_loss_gap_nats_equal_time"] == pytest.approx(6.2 - 4.5)
    assert found["tokens_per_s_ratio"] == 2
