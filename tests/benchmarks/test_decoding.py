import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import decoding
from fingpt_lightning.models.shapes import GPT2Shape


def test_all_contenders_run_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    monkeypatch.setattr(
        sys, "argv", ["decoding", "--toy", "--with_transformers", "--json", str(path)]
    )
    decoding.main()
    record: dict[str, Any] = json.loads(path.read_text())
    assert len(record["rows"]) == 2 * (5 + 5 + 2)
    assert set(record["summary"]) == {
        "cache_speedup_ratio_bf16_batch1", "cache_speedup_ratio_bf16_batch8",
        "cache_speedup_ratio_fp32_batch1", "cache_speedup_ratio_fp32_batch8",
        "low_rank_speedup_ratio", "low_rank_speedup_ratio_bf16",
        "low_rank_speedup_ratio_fp32", "low_rank_speedup_ratio_int8",
    }  # fmt: skip
    # Keys and values of 2 layers, 64 features of 4 bytes.
    fp32 = [row for row in record["rows"] if row["dtype"] == "fp32"]
    assert {row["cache_bytes_per_token"] for row in fp32} == {None, 2 * 2 * 64 * 4}
    assert "| bf16, batch 8: low rank |" in path.with_suffix(".md").read_text()


def test_the_summary_takes_the_better_of_bf16_and_int8() -> None:
    rows = [
        {"contender": name, "dtype": dtype, "batch_size": 1, "speedup_ratio_to_dense": ratio}
        for name, dtype, ratio in (
            (decoding.NO_CACHE, "bf16", 0.25), (decoding.LOW_RANK, "bf16", 1.2),
            (decoding.LOW_RANK, "int8", 1.7), (decoding.LOW_RANK, "fp32", 2.0),
        )
    ]  # fmt: skip
    found = decoding.summary(rows)
    assert found["cache_speedup_ratio_bf16_batch1"] == 4
    assert found["low_rank_speedup_ratio"] == 1.7
    assert found["low_rank_speedup_ratio_fp32"] == 2.0


def test_a_measured_step_counts_for_its_stride(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = GPT2Shape(num_layers=1, width=16, num_heads=2, num_positions=64)
    sizes = decoding.Sizes(shape, 50, 4, 8, prompt_tokens=3, new_tokens=7, stride=3)
    network = decoding.networks("fp32", sizes)[decoding.DENSE]
    lengths: list[int] = []
    network.base_model.register_forward_pre_hook(
        lambda _, __, named: lengths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    seconds = decoding.seconds_without_cache(network, torch.ones(2, 3, dtype=torch.long), sizes)
    assert lengths == [3 + 1, 6 + 1, 9]
    assert seconds == 3 + 3 + 1
