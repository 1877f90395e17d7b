import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import dense_first
from tests.support.fed_text import write_fed_text

SPECTRON = {"optimizer": "spectron", "spectron_dense": True, "embedding_learning_rate": 0.03}
GRID: dict[str, Any] = {
    "model": {
        "preset": "gpt2-nano", "num_layers": 2, "width": 16, "num_heads": 2, "num_positions": 16,
        "learning_rate": 0.008,
    },
    "data": {"vocab_size": 300, "block_length": 16, "batch_size": 2},
    "trainer": {"gradient_clip_val": 1.0, "precision": "32-true"},
    "num_tuning_steps": 2, "num_steps": 4, "seeds": [1],
    "same_size": "dense, same size",
    "variants": [
        {"name": "dense", "model": {"rank": None, **SPECTRON}, "rates": [0.025],
         "tuned": "spectron_learning_rate"},
        {"name": "dense, same size", "model": {"rank": None, "width": 8, **SPECTRON},
         "rates": [0.025], "tuned": "spectron_learning_rate"},
        {"name": "LoRA-Muon", "tuned": "lora_muon_learning_rate", "rates": [0.025], "model": {
            "rank": 4, "embedding_rank": 8, "optimizer": "lora_muon",
            "embedding_optimizer": "mixed", "embedding_learning_rate": 0.03}},
    ],
}  # fmt: skip


def test_dense_layers_become_factors_and_stand_beside_runs_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_fed_text(tmp_path / "data")
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID))
    rates = {variant["name"]: 0.025 for variant in GRID["variants"]}
    (tmp_path / "rates.json").write_text(json.dumps({"rates": rates, "rest_rates": {}}))
    monkeypatch.setattr(dense_first, "GRID", tmp_path / "grid.yaml")
    monkeypatch.setattr(dense_first, "RATES", tmp_path / "rates.json")
    words = [
        "dense_first", "--json", str(tmp_path / "record.json"), "--data_dir",
        str(tmp_path / "data"), "--work_dir", str(tmp_path / "work"), "--shares", "0.5", "--steps",
        "20", "--calibration_tokens", "64",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    dense_first.main()
    dense_first.main()  # all rows are there
    record = json.loads((tmp_path / "record.json").read_text())
    first, cooled, low_rank, narrow = record["rows"]
    assert first["parameters"] == cooled["parameters"] == low_rank["parameters"]
    assert first["dense_loss_nats"] != cooled["dense_loss_nats"]
    assert record["summary"] == {
        f"gap_to_{name}_nats": round(min(first["loss_nats"], cooled["loss_nats"]) - loss, 5)
        for name, loss in (
            ("low_rank_from_the_start", low_rank["loss_nats"]),
            ("same_size_dense", narrow["loss_nats"]),
        )
    }
