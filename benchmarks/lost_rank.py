"""A rank that is lost: one host's process, and the callback that stops it at a given moment."""

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fingpt_lightning.cli.main import main as fingpt
from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.strategies import rank_watch

MOMENTS = ("warm-up", "mid-step", "validation", "checkpoint")
MARKER, GO_ON = "at_the_moment", "go_on"
"""Files by which a rank signals that it is at its moment, and learns of the fault."""
POLL_S = 0.01
_CLONE_NEWNET = 0x40000000


class Incident(Callback):
    """Brings the rank that is to be lost to its moment and keeps it there until the fault.

    Args:
        folder: Folder where it leaves its mark.
        rank: Number of the rank that is lost.
        moment: Moment, one of `MOMENTS`.
    """

    def __init__(self, folder: str, rank: int, moment: str) -> None:
        self._folder, self._rank, self._moment = Path(folder), rank, moment
        self._passes = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the forward passes of a layer of this rank."""
        network: Any = pl_module.network
        layer = next(part for part in network.modules() if isinstance(part, LowRankLinear))

        def forward(*_: Any) -> None:
            is_step = trainer.training and not trainer.validating
            self._passes += is_step
            if self._moment == "warm-up" and is_step and self._passes == 1:
                self._happen(trainer)
            if self._moment == "mid-step" and is_step and self._passes == 7:
                self._happen(trainer)
            if self._moment == "validation" and trainer.validating:
                self._happen(trainer)

        layer.register_forward_hook(forward)

    def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        """The state of the module has been gathered by now, that of the optimizer has not."""
        if self._moment == "checkpoint":
            self._happen(trainer)

    def _happen(self, trainer: Trainer) -> None:
        if trainer.global_rank == self._rank and not (self._folder / MARKER).exists():
            (self._folder / MARKER).write_text(str(os.getpid()))
            while not (self._folder / GO_ON).exists():
                time.sleep(POLL_S)


def run_rank(
    own: Path, rank: int, words: list[str], variables: dict[str, str], namespace: str | None
) -> None:
    """Runs one host, with one rank.

    Args:
        own: Folder of the case.
        rank: Number of the rank, and of its host.
        words: Command line of ``fingpt``.
        variables: Variables of the environment.
        namespace: Network namespace to run in.
    """
    os.environ |= variables
    os.chdir(own)
    output = os.open(own / f"rank{rank}", os.O_WRONLY | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(output, stream.fileno())
    if namespace is not None:
        handle = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(handle, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        # A host cannot signal the processes of another.
        whole = rank_watch.Identity.own
        rank_watch.Identity.own = lambda r: whole(r)._replace(machine=namespace)  # type: ignore[assignment, method-assign]
    fingpt(words)
