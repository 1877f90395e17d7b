"""Every schedule on four gloo processes trains a tied network as one device does."""

from pathlib import Path
from typing import Any

import pytest

from fingpt_lightning.pipeline import Schedule
from fingpt_lightning.strategies import PipelineStrategy
from tests.strategies.test_pipeline import FP32, NUM_STEPS, TIED, assert_same, fit_on_ranks, fit_one
from tests.support.ranks import run_ranks

# Eight ranks' worth of stages for those that have two a rank.
DEEP = TIED | {"num_layers": 8}
# One of each kind: two ranks run all.
IN_FLOAT32 = (Schedule.ONE_F_ONE_B, Schedule.ZBV_ZERO_BUBBLE)
SHARDED_FROM = 16
# One process trains for all of its tests.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("pipeline, four ranks"),
]


def _on_four(process_rank: int, num_ranks: int, name: str) -> dict[str, Any]:
    results = {}
    for kind, schedules, options in (("fp64", Schedule, {}), ("fp32", IN_FLOAT32, FP32)):
        for schedule in schedules:
            case = f"{kind} {schedule.value}"
            results[case] = fit_on_ranks(
                Path(name, case), num_ranks, PipelineStrategy(schedule=schedule), DEEP,
                batch_size=8, **options,
            )  # fmt: skip
    for schedule in Schedule:
        strategy = PipelineStrategy(pipeline_size=2, data_parallel="shard", schedule=schedule)
        results[f"sharded {schedule.value}"] = fit_on_ranks(
            Path(name, f"sharded {schedule.value}"), num_ranks, strategy, DEEP, batch_size=4,
            resume_from=Path(name, "one", f"step={SHARDED_FROM}.ckpt"),
        )  # fmt: skip
    return results


class Runs:
    """What one process and each of four ranks came to."""

    def __init__(self, folder: Path) -> None:
        self.one = fit_one(folder / "one", DEEP, batch_size=8, save_at=SHARDED_FROM)
        self.one_fp32 = fit_one(folder / "one fp32", DEEP, batch_size=8, **FP32)
        self.four = run_ranks(_on_four, 4, str(folder), timeout_s=800)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("schedule", list(Schedule))
def test_weights_and_losses_in_float64_are_those_of_one_device(
    runs: Runs, schedule: Schedule
) -> None:
    assert_same((results[f"fp64 {schedule.value}"] for results in runs.four), runs.one)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_sharded_stages_go_on_where_one_device_stopped(runs: Runs, schedule: Schedule) -> None:
    """Two shards of each of two stages."""
    per_rank = [results[f"sharded {schedule.value}"] for results in runs.four]
    assert_same(iter(per_rank), runs.one)
    assert {len(results["losses"]) for results in per_rank} == {NUM_STEPS - SHARDED_FROM}
    for kind, whole in enumerate(runs.one["held_bytes"]):
        # Either end has the embedding, a V has it once.
        assert whole <= sum(results["held_bytes"][kind] for results in per_rank) < 1.5 * whole


@pytest.mark.parametrize("schedule", IN_FLOAT32)
def test_losses_in_float32_are_those_of_one_device(runs: Runs, schedule: Schedule) -> None:
    assert len(runs.one_fp32["losses"]) == NUM_STEPS
    for results in runs.four:
        losses = results[f"fp32 {schedule.value}"]["losses"]
        assert losses == pytest.approx(runs.one_fp32["losses"], rel=1e-5)
