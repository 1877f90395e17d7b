"""Ranks for `test_rank_watch`: each is a process of its own that trains nothing."""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fingpt_lightning.strategies.rank_watch import RankWatch

TIMEOUT_S = 3.0
LOST = 1


def run(kind: str, folder: Path, rank: int, world_size: int) -> None:
    """Meets the others, loses rank `LOST` as ``kind`` says, and waits for it as training would.

    Args:
        kind: ``raises``, ``all raise``, ``hangs``, ``leaves``, or what is done to the rank from
            outside.
        folder: Takes ``rankN``, what each says, and ``ready``.
        rank: Number of this process.
        world_size: Number of processes.
    """
    output = os.open(folder / f"rank{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", timedelta(seconds=60), world_size, rank
    )
    group = dist.new_group(list(range(world_size)), timedelta(seconds=TIMEOUT_S))
    watch = RankWatch(
        rank, world_size, "127.0.0.1", dist.distributed_c10d._get_default_store(), TIMEOUT_S
    )
    dist.barrier()
    _call_and_handle_interrupt(watch, kind, folder, rank, group)


def _call_and_handle_interrupt(
    watch: RankWatch, kind: str, folder: Path, rank: int, group: dist.ProcessGroup
) -> None:
    """Named as Lightning's function, in which a run is until its end has been said."""
    try:
        training_step(kind, folder, rank, group)
    except RuntimeError as error:
        if kind == "all raise" or (rank == LOST and kind == "raises"):
            watch.leave(str(error))
            time.sleep(2 * TIMEOUT_S if kind == "all raise" else 0)  # a program that goes on
            sys.exit(3)
        print(watch.explain(error), flush=True)
        time.sleep(60)  # a teardown that hangs
    watch.leave()


def training_step(kind: str, folder: Path, rank: int, group: dist.ProcessGroup) -> None:
    """What is under way when the rank is lost."""
    if kind == "all raise":
        (folder / "ready").touch()
        time.sleep(rank)
        raise RuntimeError("the batch does not fit")
    if rank == LOST:
        (folder / "ready").touch()
        if kind == "raises":
            raise RuntimeError("the second device is on fire")
        if kind in ("hangs", "killed", "stopped"):
            hang()
    if kind != "leaves":
        dist.all_reduce(torch.zeros(1), group=group)


def hang() -> None:
    """Never ends."""
    while True:
        time.sleep(0.01)


if __name__ == "__main__":
    kind, folder, rank, world_size = sys.argv[1:]
    run(kind, Path(folder), int(rank), int(world_size))
