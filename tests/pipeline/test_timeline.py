from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fingpt_lightning.pipeline import Pass, Work, bubble_share, chrome_trace, draw


def _step(num_ranks: int, num_microbatches: int) -> list[Pass]:
    """GPipe with forward and backward passes of one second each."""
    turn = num_ranks + num_microbatches - 1
    passes = []
    for rank in range(num_ranks):
        for mb in range(num_microbatches):
            forward_s, backward_s = rank + mb, turn + num_ranks - 1 - rank + mb
            for work, start_s in ((Work.FORWARD, forward_s), (Work.BACKWARD, backward_s)):
                passes.append(Pass(rank, rank, mb, work, float(start_s), start_s + 1.0))
    return passes


@given(num_ranks=st.integers(1, 9), num_microbatches=st.integers(1, 20))
def test_the_bubble_of_equal_passes_is_the_formulas(num_ranks: int, num_microbatches: int) -> None:
    share = bubble_share(_step(num_ranks, num_microbatches))
    assert share == pytest.approx((num_ranks - 1) / (num_microbatches + num_ranks - 1))


def test_a_trace_has_a_row_a_rank_in_microseconds() -> None:
    events = chrome_trace(_step(2, 3))["traceEvents"]
    assert len(events) == 12
    assert {event["tid"] for event in events} == {0, 1}
    assert events[0] == {
        "name": "forward 0", "cat": "forward", "ph": "X", "pid": 0, "tid": 0, "ts": 0.0,
        "dur": 1e6, "args": {"stage": 0, "microbatch": 0},
    }  # fmt: skip


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_picture_is_drawn(tmp_path: Path, suffix: str) -> None:
    picture = tmp_path / "below" / f"step.{suffix}"
    draw(_step(2, 3), picture, "two ranks")
    assert picture.stat().st_size > 1000
