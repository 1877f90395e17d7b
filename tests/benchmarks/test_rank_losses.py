"""A real run loses a rank, as in the record, at toy size."""

import json
from pathlib import Path
from typing import Any

import pytest

# Lightning sets an environment variable when it is imported: not in a test.
from benchmarks.rank_losses import SLACK_S, STRATEGIES, can_cut, cases_of
from tests.support.warm_python import run_warm

TIMEOUT_S = 3
pytestmark = pytest.mark.timeout(600)


def test_every_moment_is_tried_and_every_other_schedule_too() -> None:
    cases = cases_of(("killed", "cut off"), ("1F1B", "GPipe"), (0, 1), ("warm-up", "checkpoint"))
    assert len(cases) == len(set(cases)) == 2 * 2 * 2 + 2 * 2
    assert {case.moment for case in cases if case.schedule == "GPipe"} == {"warm-up", "checkpoint"}


def _lost(path: Path, *words: str) -> dict[str, Any]:
    """The record of losses of rank 1."""
    command = ["-m", "benchmarks.rank_losses", "--timeout_s", str(TIMEOUT_S)]
    done = run_warm([*command, *words, "--ranks", "1", "--json", path], timeout=500)
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(path.read_text())
    return record


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stopped", "cut off"])
def test_all_ranks_end_in_time_and_name_the_lost_one(kind: str, tmp_path: Path) -> None:
    if kind == "cut off" and not can_cut():
        pytest.skip("no link can be cut: `ip netns add` needs root and iproute2")
    path = tmp_path / "losses.json"
    record = _lost(path, "--schedules", "1F1B", "--moments", "mid-step", "--kinds", kind)
    (row,) = record["rows"]
    assert (row["kind"], row["rank"], row["is_named"]) == (kind, 1, True), row
    assert row["statuses"] == ([1, 1] if kind == "cut off" else [1, -9])
    assert TIMEOUT_S - 1 < row["ended_s"] < TIMEOUT_S + SLACK_S
    assert record["summary"]["ended_in_time"] == 1
    assert f"| 1, 1F1B, mid-step | {kind} |" in path.with_suffix(".md").read_text()


@pytest.mark.slow
def test_so_they_do_where_each_rank_has_its_own_data(tmp_path: Path) -> None:
    kinds, moment = ("killed", "stopped"), "mid-step"
    record = _lost(
        tmp_path / "losses.json", "--schedules", *STRATEGIES, "--moments", moment,
        "--kinds", *kinds, "--at_once", "2",
    )  # fmt: skip
    rows = record["rows"]
    found = [(row["schedule"], row["kind"]) for row in rows]
    assert found == [(strategy, kind) for strategy in STRATEGIES for kind in kinds]
    assert all(row["is_named"] for row in rows), rows
    assert all(row["ended_s"] < TIMEOUT_S + SLACK_S for row in rows), rows
    assert [row["ended_s"] > TIMEOUT_S - 1 for row in rows if row["kind"] == "stopped"] == [
        True
    ] * 2
