"""Runs a function on several processes that communicate over gloo, for distributed tests."""

import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed

from tests.support.warm_python import ROOT, WarmProcess, wait_for_any

_STACK_GRACE_S = 0.5
_END_GRACE_S = 1.0
_PROGRAM = f"import sys; from {__name__} import run_rank; run_rank(sys.argv[1])"


def run_ranks(
    body: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0
) -> list[Any]:
    """Calls ``body(process_rank, world_size, *args)`` on every rank and returns their results.

    Each rank is a process of its own with one thread; all meet before and after ``body``.

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
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, str(process_rank)) for process_rank in range(world_size)]
        rendezvous = Path(name, "rendezvous").as_uri()
        call = pickle.dumps((world_size, rendezvous, timeout_s, body, args))
        # So that ``body`` is found by its name.
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        ranks: list[WarmProcess] = []
        try:
            for folder in folders:
                folder.mkdir()
                (folder / "call").write_bytes(call)
                ranks.append(WarmProcess(["-c", _PROGRAM, folder], env=env))
            _wait_for_all(ranks, folders, timeout_s)
        finally:
            for rank in ranks:
                rank.kill_session()
                rank.wait()
        return [torch.load(folder / "result.pt", weights_only=True) for folder in folders]


def _wait_for_all(ranks: list[WarmProcess], folders: list[Path], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while running := [rank for rank in ranks if rank.poll() is None]:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise AssertionError(_hang_message(ranks, folders, timeout_s))
        wait_for_any(running, remaining_s)
        if any(rank.poll() for rank in ranks):
            _let_end(ranks)
            raise AssertionError(_failure_message(ranks, folders))


def _let_end(ranks: list[WarmProcess]) -> None:
    """Gives the others a moment: who lost a peer may be seen to end before the peer itself."""
    deadline = time.monotonic() + _END_GRACE_S
    while running := [rank for rank in ranks if rank.poll() is None]:
        if (remaining_s := deadline - time.monotonic()) <= 0:
            return
        wait_for_any(running, remaining_s)


def _failure_message(ranks: list[WarmProcess], folders: list[Path]) -> str:
    return "\n".join(
        f"rank {folder.name} ended with exit code {rank.returncode}:\n{_text(folder / 'traceback')}"
        for rank, folder in zip(ranks, folders, strict=True)
        if rank.poll()
    )


def _hang_message(ranks: list[WarmProcess], folders: list[Path], timeout_s: float) -> str:
    hanging = [
        (rank, folder) for rank, folder in zip(ranks, folders, strict=True) if rank.poll() is None
    ]
    for rank, folder in hanging:
        if (folder / "stack").exists():
            rank.send_signal(signal.SIGUSR1)
    time.sleep(_STACK_GRACE_S)
    return "\n".join(
        f"rank {folder.name} was still running after {timeout_s:g} s:\n{_text(folder / 'stack')}"
        for _, folder in hanging
    )


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else "(it left no trace)"


def run_rank(name: str) -> NoReturn:
    """What the process of a rank does.

    Args:
        name: Folder of the rank, which holds the call and takes its result.
    """
    folder = Path(name)
    process_rank = int(folder.name)
    torch.set_num_threads(1)
    with (folder / "stack").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
        try:
            call = (folder / "call").read_bytes()
            world_size, rendezvous, timeout_s, body, args = pickle.loads(call)
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
            status = 0
        except Exception:
            (folder / "traceback").write_text(traceback.format_exc())
            status = 1
        finally:
            faulthandler.unregister(signal.SIGUSR1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # other ranks may wait for what an orderly end would wait for
