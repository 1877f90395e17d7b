"""A rank that is lost is named by all others, which end in time, as it does itself."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from fingpt_lightning.strategies import rank_watch
from fingpt_lightning.strategies.rank_watch import Identity, RankWatch
from tests.strategies import lost_ranks
from tests.strategies.lost_ranks import LOST, TIMEOUT_S
from tests.support.warm_python import ROOT, WarmProcess

NUM_RANKS = 3
ENDED_WITHIN_S = 5
pytestmark = pytest.mark.timeout(300)


def _lose(kind: str, folder: Path) -> tuple[float, list[int | None], list[str]]:
    """Seconds until all ranks had ended, their statuses and what they said."""
    words = ["-m", lost_ranks.__name__, kind, str(folder)]
    ranks = [
        WarmProcess([*words, str(rank), str(NUM_RANKS)], cwd=ROOT) for rank in range(NUM_RANKS)
    ]
    try:
        while not (folder / "ready").exists():
            assert all(rank.poll() is None for rank in ranks), "a rank ended at the start"
            time.sleep(0.01)
        began_s = time.monotonic()
        sign = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}.get(kind)
        if sign is not None:
            ranks[LOST].send_signal(sign)
        for rank in ranks:
            rank.wait(60)
        ended_s = time.monotonic() - began_s
    finally:
        for rank in ranks:
            rank.kill_session()
            rank.wait()
    said = [(folder / f"rank{rank}").read_text().strip() for rank in range(NUM_RANKS)]
    return ended_s, [rank.returncode for rank in ranks], said


@pytest.mark.parametrize(
    ("kind", "status", "reason"),
    [
        ("killed", -signal.SIGKILL, "is lost: its connection closed without a word (killed, or"),
        ("stopped", -signal.SIGKILL, "is lost: no sign of life for 3."),
        ("raises", 3, "failed: the second device is on fire"),
        ("hangs", 1, "no answer for timeout_s 3 while the others waited: "),
    ],
)
def test_a_lost_rank_is_named_and_all_end(
    kind: str, status: int, reason: str, tmp_path: Path
) -> None:
    ended_s, statuses, said = _lose(kind, tmp_path)
    assert ended_s < TIMEOUT_S + ENDED_WITHIN_S
    assert statuses == [1, status, 1], said
    for rank in (0, 2):
        assert f"{LOST} (host {os.uname().nodename}, process " in said[rank]
        assert reason in said[rank]
        assert "in a training step" in said[rank]
    if kind == "hangs":
        assert "tests/" not in said[0]
        for line in said:
            assert "is in a training step, at strategies/lost_ranks.py:" in line
            assert "(hang)" in line


def test_a_rank_with_an_error_of_its_own_is_not_ended_for_that_of_another(tmp_path: Path) -> None:
    _, statuses, said = _lose("all raise", tmp_path)
    assert statuses == [3, 3, 3], said
    assert said == ["", "", ""]


def test_ranks_that_leave_are_not_missed(tmp_path: Path) -> None:
    _, statuses, said = _lose("leaves", tmp_path)
    assert statuses == [0, 0, 0], said
    assert said == ["", "", ""]


def test_who_awaited_a_stopped_rank_ends_it_before_it_may_be_gone_itself() -> None:
    with subprocess.Popen(["sleep", "60"]) as stopped:
        os.kill(stopped.pid, signal.SIGSTOP)
        own = Identity.own(1)
        lost = own._replace(rank=0, process=stopped.pid, birth=rank_watch._birth(stopped.pid))
        watch = object.__new__(RankWatch)  # one whose thread does not come to act
        watch._identity, watch._decided = own, threading.Event()
        for other in (own, lost._replace(birth=lost.birth + 1), lost._replace(machine="other")):
            watch._verdict = rank_watch._Verdict("lost", (other,), is_silent=True)
            watch._decided.set()
            assert watch.explain(RuntimeError()) == "lost; rank 1 awaited it in the run"
            assert stopped.poll() is None
        watch._verdict = rank_watch._Verdict("lost", (own, lost), is_silent=True)
        watch.explain(RuntimeError())
        time.sleep(0.2)
        status = stopped.poll()
        stopped.kill()
    assert status == -signal.SIGKILL
