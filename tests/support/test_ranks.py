import os
import signal
import time

import pytest
import torch
import torch.distributed
from torch import Tensor

from tests.support.ranks import run_ranks
from tests.support.warm_python import running


def _sum_of_ranks(process_rank: int, world_size: int, scale: float) -> dict[str, Tensor | int]:
    total = torch.tensor([scale * process_rank], dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return {"total": total, "world_size": world_size, "num_threads": torch.get_num_threads()}


def _raise_on_rank_1(process_rank: int, world_size: int) -> None:
    if process_rank == 1:
        raise LookupError("no batch left")
    torch.distributed.barrier()


def _die_on_rank_0(process_rank: int, world_size: int) -> None:
    if process_rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def _hang_on_rank_1(process_rank: int, world_size: int) -> None:
    if process_rank == 1:
        time.sleep(600)


def test_every_rank_returns_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    results = run_ranks(_sum_of_ranks, 2, 7.0)
    assert len(results) == 2
    for result in results:
        torch.testing.assert_close(result["total"], torch.tensor([7.0], dtype=torch.float64))
        assert result["world_size"] == 2
        assert result["num_threads"] == 1


def test_a_raising_rank_ends_all_and_its_traceback_is_shown() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 .*_raise_on_rank_1.*no batch left"):
        run_ranks(_raise_on_rank_1, 2)
    assert not running()


def test_a_killed_rank_is_named() -> None:
    with pytest.raises(AssertionError, match=r"rank 0 ended with exit code -9"):
        run_ranks(_die_on_rank_0, 2)


def test_a_hang_is_cut_and_located() -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)rank 1 was still .* 8 s:.*_hang_on_rank_1"):
        run_ranks(_hang_on_rank_1, 2, timeout_s=8)
    assert time.monotonic() - began < 20
    assert not running()
