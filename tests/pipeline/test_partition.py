import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fingpt_lightning.pipeline import (
    Balance,
    Cost,
    NetworkCosts,
    PipelineLayout,
    Schedule,
    Workload,
    given_partition,
    partition,
    to_table,
)
from fingpt_lightning.pipeline.partition import minimax, spans_of

WORK = Workload(tokens_per_microbatch=64)
# GPT-2 small: twelve blocks and a tied head that costs as much as 5.4 of them.
BLOCK = Cost(7_077_888, 14_155_776, 20_000)
SMALL = NetworkCosts(Cost(39_000_000), (BLOCK,) * 12, Cost(38_600_000, 77_200_000, 1536))


def _layout(num_stages: int) -> PipelineLayout:
    return PipelineLayout(Schedule.ONE_F_ONE_B, num_stages, num_stages)


@given(
    costs=st.lists(st.integers(1, 50), min_size=1, max_size=9),
    share=st.floats(0, 1),
    ends=st.tuples(st.integers(0, 60), st.integers(0, 60)),
)
def test_no_other_cut_has_a_smaller_largest_stage(
    costs: list[int], share: float, ends: tuple[int, int]
) -> None:
    num_stages = 1 + round(share * (len(costs) - 1))

    def cost_of(stage: int, first: int, end: int) -> int:
        front = ends[0] if stage == 0 else 0
        back = ends[1] if stage == num_stages - 1 else 0
        return sum(costs[first:end]) + front + back

    def largest(sizes: list[int]) -> int:
        return max(cost_of(s, span.first, span.end) for s, span in enumerate(spans_of(sizes)))

    found = minimax(len(costs), num_stages, cost_of)
    assert len(found) == num_stages
    assert sum(found) == len(costs)
    assert min(found) >= 1
    every_cut = (
        [end - first for first, end in itertools.pairwise([0, *cuts, len(costs)])]
        for cuts in itertools.combinations(range(1, len(costs)), num_stages - 1)
    )
    assert largest(found) == min(map(largest, every_cut))


def test_of_cuts_with_equal_largest_stages_an_even_one_is_taken() -> None:
    def cost_of(stage: int, first: int, end: int) -> int:
        return end - first + (5 if stage == 0 else 0)  # an embedding that costs 5 blocks

    assert minimax(6, 3, cost_of) == [1, 2, 3]


def test_the_head_of_gpt2_small_gets_the_stage_with_fewer_blocks() -> None:
    spans = partition(SMALL, _layout(2), WORK)
    assert [(span.first, span.end) for span in spans] == [(0, 9), (9, 12)]
    assert [(span.is_first, span.is_last) for span in spans] == [(True, False), (False, True)]


def test_equal_memory_is_another_cut_than_equal_time() -> None:
    spans = partition(SMALL, _layout(2), WORK, Balance.MEMORY)
    assert [span.end - span.first for span in spans] == [6, 6]


def test_a_sharded_stage_holds_shares_and_what_a_batch_needs_whole() -> None:
    shares = Workload(64, num_shards=8)
    assert WORK.stage_bytes(BLOCK, 0.0) == 4 * 4 * BLOCK.parameters
    assert shares.stage_bytes(BLOCK, 0.0) == 4 * (2 + 4 / 8) * BLOCK.parameters


def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="13 stages are more than the 12 blocks"):
        partition(SMALL, _layout(13), WORK)


@pytest.mark.parametrize("sizes", [[12], [7, 6], [12, 0], [4, 4, 4]])
def test_a_cut_by_hand_that_does_not_fit_is_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"blocks_per_stage .* 2 numbers .* 12 blocks"):
        given_partition(sizes, _layout(2), 12)


def test_a_cut_by_hand_is_taken_as_it_is() -> None:
    assert [span.end for span in given_partition([5, 7], _layout(2), 12)] == [5, 12]


def test_the_table_has_a_row_a_stage() -> None:
    console = Console(width=120)
    with console.capture() as told:
        console.print(to_table(SMALL, partition(SMALL, _layout(2), WORK), _layout(2), WORK))
    assert "0 to 8" in told.get()
    assert "9 to 11" in told.get()
    assert "bubble by formula 33.3%" in told.get()
