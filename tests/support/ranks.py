"""Runs a function on several processes that communicate over gloo, for distributed tests."""

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed

_STACK_GRACE_S = 0.5


def run_ranks(
    body: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0
) -> list[Any]:
    """Calls ``body(process_rank, world_size, *args)`` on every rank and returns their results.

    Each rank is a fresh process with one thread; all meet before and after ``body``. A spawn costs
    seconds (the import of torch): put many cases in one body.

    Args:
        body: Module-level function. Its result is made of tensors, numbers, strings, lists and
            dicts.
        world_size: Number of processes.
        args: Arguments of ``body``.
        timeout_s: Seconds for everything, the start of the processes included.

    Raises:
        AssertionError: A rank raised or died, or ``timeout_s`` passed. The message holds the
            traceback of each failed rank, or where each rank hung. No process is left.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, str(process_rank)) for process_rank in range(world_size)]
        rendezvous = Path(name, "rendezvous").as_uri()
        ranks = []
        try:
            for folder in folders:
                folder.mkdir()
                rank = context.Process(
                    target=_run_rank,
                    args=(folder, world_size, rendezvous, timeout_s, body, args),
                    daemon=True,
                )
                rank.start()
                ranks.append(rank)
            _wait_for_all(ranks, folders, timeout_s)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        return [torch.load(folder / "result.pt", weights_only=True) for folder in folders]


def _wait_for_all(ranks: list[SpawnProcess], folders: list[Path], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while running := [rank for rank in ranks if rank.exitcode is None]:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise AssertionError(_hang_message(ranks, folders, timeout_s))
        wait([rank.sentinel for rank in running], remaining_s)
        if any(rank.exitcode for rank in ranks):
            raise AssertionError(_failure_message(ranks, folders))


def _failure_message(ranks: list[SpawnProcess], folders: list[Path]) -> str:
    return "\n".join(
        f"rank {folder.name} ended with exit code {rank.exitcode}:\n{_text(folder / 'traceback')}"
        for rank, folder in zip(ranks, folders, strict=True)
        if rank.exitcode
    )


def _hang_message(ranks: list[SpawnProcess], folders: list[Path], timeout_s: float) -> str:
    hanging = [
        (rank, folder) for rank, folder in zip(ranks, folders, strict=True) if rank.exitcode is None
    ]
    for rank, folder in hanging:
        if (folder / "stack").exists() and rank.pid is not None:
            os.kill(rank.pid, signal.SIGUSR1)
    time.sleep(_STACK_GRACE_S)
    return "\n".join(
        f"rank {folder.name} was still running after {timeout_s:g} s:\n{_text(folder / 'stack')}"
        for _, folder in hanging
    )


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else "(it left no trace)"


def _run_rank(
    folder: Path,
    world_size: int,
    rendezvous: str,
    timeout_s: float,
    body: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    process_rank = int(folder.name)
    torch.set_num_threads(1)
    with (folder / "stack").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
        try:
            torch.distributed.init_process_group(
                "gloo",
                init_method=rendezvous,
                rank=process_rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout_s),
            )
            torch.distributed.barrier()
            result = body(process_rank, world_size, *args)
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
                torch.distributed.destroy_process_group()
            torch.save(result, folder / "result.pt")
        except Exception as error:
            (folder / "traceback").write_text(traceback.format_exc())
            raise SystemExit(1) from error
        finally:
            faulthandler.unregister(signal.SIGUSR1)
