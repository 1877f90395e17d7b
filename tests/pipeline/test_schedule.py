import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fingpt_lightning.pipeline import PipelineLayout, Schedule, largest_layout, schedule_named

layouts = st.builds(
    lambda schedule, ranks, rounds: PipelineLayout(
        schedule, ranks, 2 * ranks * rounds, schedule.default_stages_per_rank
    ),
    st.sampled_from(Schedule),
    st.integers(1, 9),
    st.integers(1, 5),
)


@given(layout=layouts)
def test_every_stage_is_on_one_rank_and_neighbours_are_near(layout: PipelineLayout) -> None:
    dealt = [stage for rank in range(layout.num_ranks) for stage in layout.stages_of(rank)]
    assert sorted(dealt) == list(range(layout.num_stages))
    for rank in range(layout.num_ranks):
        assert len(layout.stages_of(rank)) == layout.stages_per_rank
        assert all(layout.rank_of(stage) == rank for stage in layout.stages_of(rank))
    steps = {
        (layout.rank_of(stage + 1) - layout.rank_of(stage)) % layout.num_ranks
        for stage in range(layout.num_stages - 1)
    }
    if not layout.schedule.is_v_shaped:
        assert steps <= {1 % layout.num_ranks}


@given(layout=layouts)
def test_a_longer_batch_wastes_less(layout: PipelineLayout) -> None:
    longer = PipelineLayout(
        layout.schedule, layout.num_ranks, 2 * layout.num_microbatches, layout.stages_per_rank
    )
    assert 0 <= longer.bubble_share <= layout.bubble_share < 1
    if layout.num_ranks == 1:
        assert layout.bubble_share == 0


@given(layout=layouts)
def test_the_passes_in_flight_are_between_one_and_all(layout: PipelineLayout) -> None:
    for rank in range(layout.num_ranks):
        held = layout.passes_in_flight(rank)
        assert 1 <= held <= layout.num_microbatches * layout.stages_per_rank


@pytest.mark.parametrize(
    ("schedule", "stages_per_rank", "bubble"),
    [
        (Schedule.GPIPE, 1, 3 / 11),
        (Schedule.ONE_F_ONE_B, 1, 3 / 11),
        (Schedule.INTERLEAVED_1F1B, 2, 3 / 19),
        (Schedule.INTERLEAVED_ZERO_BUBBLE, 2, 3 / 51),
        (Schedule.ZBV_ZERO_BUBBLE, 2, 3 / 51),
        (Schedule.DUAL_PIPE_V, 2, 3 / 51),
    ],
)
def test_the_bubble_of_four_ranks_and_eight_microbatches(
    schedule: Schedule, stages_per_rank: int, bubble: float
) -> None:
    layout = PipelineLayout(schedule, 4, 8, stages_per_rank)
    assert layout.bubble_share == pytest.approx(bubble)


def test_the_last_rank_of_1f1b_holds_one_pass_and_gpipe_holds_all() -> None:
    frugal = PipelineLayout(Schedule.ONE_F_ONE_B, 4, 8)
    assert [frugal.passes_in_flight(rank) for rank in range(4)] == [4, 3, 2, 1]
    assert PipelineLayout(Schedule.GPIPE, 4, 8).passes_in_flight(3) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((Schedule.ONE_F_ONE_B, 4, 3), "num_microbatches 3 is below the 4 stages .* raise it to 4"),
        ((Schedule.DUAL_PIPE_V, 2, 3, 2), "num_microbatches 3 is below the 4 stages"),
        ((Schedule.GPIPE, 2, 4, 2), "num_virtual_stages 2: GPipe has one stage a rank"),
        ((Schedule.ZBV_ZERO_BUBBLE, 2, 4, 3), "num_virtual_stages 3: ZBVZeroBubble has two"),
        ((Schedule.INTERLEAVED_1F1B, 2, 5, 2), "num_microbatches 5: .* 2 rounds .* take 4"),
        ((Schedule.GPIPE, 0, 4), "num_ranks 0 is below 1"),
    ],
)
def test_what_a_schedule_cannot_run_is_refused(settings: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PipelineLayout(*settings)  # type: ignore[arg-type]


@given(schedule=st.sampled_from(Schedule))
def test_a_schedule_is_found_by_its_name(schedule: Schedule) -> None:
    assert schedule_named(schedule.value.lower()) is schedule


@given(name=st.text(max_size=12))
def test_an_unknown_name_is_refused(name: str) -> None:
    assume(name.lower() not in {schedule.lower() for schedule in Schedule})
    with pytest.raises(ValueError, match="is none of GPipe, 1F1B"):
        schedule_named(name)


def test_the_nearest_name_is_told() -> None:
    with pytest.raises(ValueError, match="did you mean 1F1B"):
        schedule_named("1f1")


@given(
    schedule=st.sampled_from(Schedule), ranks=st.integers(1, 6), batch_size=st.integers(1, 64)
)  # fmt: skip
def test_a_batch_is_cut_into_the_most_parts_that_suit(
    schedule: Schedule, ranks: int, batch_size: int
) -> None:
    stages = schedule.default_stages_per_rank
    suit = []
    for count in range(1, 4 * ranks + 1):
        if batch_size % count == 0:
            try:
                suit.append(PipelineLayout(schedule, ranks, count, stages))
            except ValueError:
                continue
    if suit:
        assert largest_layout(schedule, ranks, stages, batch_size) == suit[-1]
    else:
        with pytest.raises(ValueError, match=f"batch_size {batch_size}, cut into .* auto: num_"):
            largest_layout(schedule, ranks, stages, batch_size)
