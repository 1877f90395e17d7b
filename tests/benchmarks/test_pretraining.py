import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import pretraining, recompute, step_profile
from benchmarks.pretraining import RANKS
from benchmarks.training_step import TOY, Workload
from fingpt_lightning.models import PRESETS

SIZE = ["--batch_size", "2", "--block_length", "16", "--repeats", "2"]

# What a bare machine for benchmarks lacks. Processes in which memory is measured are forks of one
# that has imported torch.
_PROGRAM = """
import multiprocessing, runpy, sys
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["benchmarks.training_step"])
multiprocessing.get_context = lambda method: context
for name in ("wandb", "jsonargparse", "datasets", "bitsandbytes", "torchmetrics"):
    sys.modules[name] = None
sys.argv = ["benchmark", *sys.argv[2:]]
runpy.run_module("benchmarks." + MODULE, run_name="__main__")
"""


def _run(module: str, json_file: Path, *words: str) -> dict[str, dict[str, float]]:
    program = _PROGRAM.replace("MODULE", repr(module))
    command = [sys.executable, "-c", program, "-", *words, *SIZE, "--json", str(json_file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    record: dict[str, dict[str, float]] = json.loads(json_file.read_text())
    return record


@pytest.mark.slow
def test_pretraining_is_compared_without_the_packages_it_does_not_need(tmp_path: Path) -> None:
    json_file = tmp_path / "record.json"
    record = _run("pretraining", json_file, "--preset", "toy", "--no_compile")
    summary = record["summary"]
    assert set(summary) >= {
        "total_compression_ratio", "block_compression_ratio", "tokens_per_s_ratio_fp32",
        "tokens_per_s_ratio_bf16", "state_memory_ratio", "peak_memory_ratio_same_recompute",
        "dense_over_transformers_tokens_per_s_ratio", "flop_bound_ratio",
    }  # fmt: skip
    assert summary["state_memory_ratio"] == pytest.approx(
        1 / summary["total_compression_ratio"], rel=0.01
    )
    assert summary["peak_memory_ratio_low_rank_recompute_to_dense"] < 1
    assert len(record["rows"]) == 2 * 3 + 7
    assert "low_rank, recompute low_rank" in json_file.with_suffix(".md").read_text()


@pytest.mark.slow
def test_recomputing_and_the_profile_are_recorded(tmp_path: Path) -> None:
    recomputed = _run("recompute", tmp_path / "recompute.json", "--presets", "toy")
    assert len(recomputed["rows"]) == 6
    assert recomputed["summary"]["toy_low_rank_memory_ratio"] < 1
    assert (tmp_path / "recompute.svg").exists()
    profiled = _run("step_profile", tmp_path / "profile.json", "--preset", "toy")
    shares = [profiled["summary"][f"low_rank_fp32_{part}_share"] for part in step_profile.PARTS]
    assert sum(shares) == pytest.approx(1, abs=0.01)


def test_every_preset_has_its_ranks() -> None:
    assert set(RANKS) == {*PRESETS, "toy", "toy-llama"}
    for preset in ("gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        ratio = Workload(preset, *RANKS[preset]).budget().total_compression_ratio
        assert ratio == pytest.approx(2.65, abs=0.1), preset


def test_a_contender_has_the_time_of_its_faster_form() -> None:
    seconds = {
        ("fp32", "dense"): [3.0, 2.0, 3.0],
        ("fp32", "dense compiled"): [2.0, 2.5, 2.0],
        ("bf16", "dense"): [1.0, 1.0, 1.0],
    }
    assert pretraining.best(seconds, "fp32", "dense") == [2.0, 2.5, 2.0]


def test_the_ways_of_recomputing_do_the_same_tokens_at_each_size() -> None:
    options = Namespace(batch_size=4, block_length=64, device="cpu", seed=1)
    work = recompute._workload("toy", options)
    assert (work.block_length, work.tokens_per_step) == (TOY.num_positions, 256)
