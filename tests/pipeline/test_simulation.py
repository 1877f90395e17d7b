import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torchs

from fingpt_lightning.pipeline import PipelineLayout, Schedule, bubble_share
from fingpt_lightning.pipeline.simulation import (
    Planned,
    StageTimes,
    peak_held,
    rank_order,
    simulate,
)
from fingpt_lightning.pipeline.timeline import Work

EQUAL = StageTimes(1.0, 1.0, 1.0)
_WORKS = {"F": Work.FORWARD, "B": Work.BACKWARD, "I": Work.INPUT, "W": Work.WEIGHT}


def _layout(schedule: Schedule, num_ranks: int, num_microbatches: int) -> PipelineLayout:
    return PipelineLayout(schedule, num_ranks, num_microbatches, schedule.default_stages_per_rank)


def _order_of_torch(layout: PipelineLayout, rank: int) -> list[Planned]:
    kind: Any = torchs.get_schedule_class(layout.schedule.value)
    made = object.__new__(kind)
    made.__dict__ |= {
        "pp_group_size": layout.num_ranks, "n_local_stages": layout.stages_per_rank,
        "_n_microbatches": layout.num_microbatches, "num_stages": layout.num_stages,
        "_num_stages": layout.num_stages,
        "microbatches_per_round": layout.num_microbatches
        // max(1, layout.num_microbatches // layout.num_ranks),
    }  # fmt: skip
    if layout.schedule.is_single:
        actions = made._get_pipeline_order()[rank]
    else:
        actions = made._calculate_single_rank_operations(rank)
    flat: list[Any] = []
    for action in actions:
        if action is not None:
            flat += action.sub_actions or [action]
    works = ((action, _WORKS.get(action.computation_type.value)) for action in flat)
    return [Planned(a.stage_index, a.microbatch_index, work) for a, work in works if work]


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_the_orders_are_those_of_torch(schedule: Schedule, num_ranks: int) -> None:
    for rounds in (2, 3, 4):
        layout = _layout(schedule, num_ranks, rounds * num_ranks)
        for rank in range(num_ranks):
            ours, theirs = rank_order(layout, rank), _order_of_torch(layout, rank)
            if schedule is Schedule.ONE_F_ONE_B:
                # What torch 2.13 tells of it counts the last rank's forward passes from 1.
                ours, theirs = ([p._replace(microbatch=0) for p in each] for each in (ours, theirs))
            assert ours == theirs, (layout, rank)


@given(
    schedule=st.sampled_from(Schedule), num_ranks=st.integers(1, 6), rounds=st.integers(2, 5),
    forward_s=st.floats(0.5, 2), weight_s=st.floats(0.5, 2),
)  # fmt: skip
def test_every_pass_runs_once_after_what_it_needs(
    schedule: Schedule, num_ranks: int, rounds: int, forward_s: float, weight_s: float
) -> None:
    layout = _layout(schedule, num_ranks, rounds * num_ranks)
    passes = simulate(layout, [StageTimes(forward_s, 1.0, weight_s)] * layout.num_stages)
    ends = {(p.stage, p.microbatch, p.work): p for p in passes}
    assert len(ends) == len(passes)
    for stage in range(layout.num_stages):
        for mb in range(layout.num_microbatches):
            forward = ends[stage, mb, Work.FORWARD]
            if stage:
                assert forward.start_s >= ends[stage - 1, mb, Work.FORWARD].end_s
            if (stage, mb, Work.BACKWARD) in ends:
                assert ends[stage, mb, Work.BACKWARD].start_s >= forward.end_s
            else:
                inputs = ends[stage, mb, Work.INPUT]
                assert inputs.start_s >= forward.end_s
                assert ends[stage, mb, Work.WEIGHT].start_s >= inputs.end_s
    for rank in range(num_ranks):
        own = sorted((p.start_s, p.end_s) for p in passes if p.rank == rank)
        assert all(b[0] >= a[1] - 1e-9 for a, b in itertools.pairwise(own))


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_equal_stages_idle_as_the_formulas_say(num_ranks: int) -> None:
    for schedule in Schedule:
        layout = _layout(schedule, num_ranks, 4 * num_ranks)
        share = bubble_share(simulate(layout, [EQUAL] * layout.num_stages))
        assert share == pytest.approx(layout.bubble_share), schedule


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_no_rank_holds_more_than_the_layout_says(schedule: Schedule, num_ranks: int) -> None:
    layout = _layout(schedule, num_ranks, 4 * num_ranks)
    held = peak_held(simulate(layout, [EQUAL] * layout.num_stages))
    told = {rank: layout.passes_in_flight(rank) for rank in range(num_ranks)}
    assert all(held[rank] <= told[rank] for rank in held), (held, told)
    assert held[0] == told[0]


def test_sizes_of_stages_count_and_so_do_numbers_of_times() -> None:
    layout = _layout(Schedule.GPIPE, 2, 3)
    passes = simulate(layout, [EQUAL, EQUAL])
    assert peak_held(passes, lambda stage: 10.0 + stage) == {0: 30.0, 1: 33.0}
    with pytest.raises(ValueError, match="1 times for the 2 stages"):
        simulate(layout, [EQUAL])
