import json
from pathlib import Path

import pytest

from fingpt_lightning.pipeline import Schedule
from tests.support.warm_python import run_warm

TOY = [
    "--num_layers", "4", "--width", "64", "--vocab_size", "97", "--embedding_rank", "16",
    "--block_length", "8", "--batch_size", "4", "--microbatches", "2", "4",
    "--schedules", "1F1B", "ZBVZeroBubble", "--recompute", "none", "--repeats", "2",
]  # fmt: skip


@pytest.mark.slow
def test_a_pipeline_is_compared_with_one_process_and_the_machines_ceiling(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.json"
    done = run_warm(["-m", "benchmarks.pipeline", *TOY, "--json", path], timeout=250)
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    summary = record["summary"]
    assert set(summary) >= {
        "machine_ceiling_ratio", "tokens_per_s_ratio_to_one_process", "pipeline_efficiency",
        "tokens_per_s_ratio_to_plain_model_parallel", "bubble_share_measured",
        "bubble_share_formula", "memory_per_rank_ratio", "max_relative_loss_difference",
        "pipeline_efficiency_1f1b_4", "pipeline_efficiency_zbvzerobubble_2",
    }  # fmt: skip
    assert summary["max_relative_loss_difference"] < 1e-5
    assert summary["bubble_share_formula"] == pytest.approx(1 / 3, rel=1e-3)
    assert 0 < summary["memory_per_rank_ratio"] < 1
    assert [row["contender"] for row in record["rows"]] == [
        "one process", "two independent processes", "plain model parallel", "1F1B 2", "1F1B 4",
        "ZBVZeroBubble 2", "ZBVZeroBubble 4",
    ]  # fmt: skip
    assert "| 1F1B 4 |" in path.with_suffix(".md").read_text()
    assert len(list(tmp_path.glob("pipeline_*.svg"))) == 4


def test_the_simulation_names_every_schedule_and_draws_it(tmp_path: Path) -> None:
    path = tmp_path / "simulated.json"
    toy = [
        "--width", "64", "--vocab_size", "97", "--embedding_rank", "16", "--block_length", "8",
        "--num_blocks", "16", "--ranks", "2", "4", "--repeats", "2", "--json", str(path),
    ]  # fmt: skip
    done = run_warm(["-m", "benchmarks.pipeline_simulation", *toy], timeout=250)
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    assert record["measured"]["block_activations_mib"] > 0
    assert len(record["rows"]) == 2 * 2 * len(Schedule)
    for row in record["rows"]:
        assert 0 < row["bubble_share_simulated"] < 0.7
        assert row["held_mib_of_fullest_rank"] >= row["held_mib_of_emptiest_rank"]
    held = {row["schedule"]: row["held_mib_of_fullest_rank"] for row in record["rows"][-6:]}
    assert held["GPipe"] == pytest.approx(4 * held["1F1B"], rel=0.5)
    assert record["summary"]["step_time_ratio_to_1f1b_1f1b"] == 1
    assert "| ZBVZeroBubble | 4 | 16 |" in path.with_suffix(".md").read_text()
    assert len(list(tmp_path.glob("simulated_*.svg"))) == len(Schedule)
