"""The folder of a run: named, claimed, agreed on by all ranks, and found again.

``RUNS_DIR/NAME-DATE-TIME`` holds the config, the metrics, the checkpoints and the logs of one run.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from fingpt_lightning.cli.checkpoint_names import NAMED, checkpoints_named, newest_first
from fingpt_lightning.files import make_owned, new_folder, remove_leftovers
from fingpt_lightning.models.formats.checkpoint import load_contents
from fingpt_lightning.strategies.rendezvous import START_S, meet

RUN_FOLDER_VARIABLE = "FINGPT_RUN_FOLDER"
"""Passes the folder of rank 0 to the processes that Lightning starts for other ranks."""


def claim_run_folder(runs_dir: Path, name: str, on_failure: ExitStack | None) -> str:
    """Makes ``RUNS_DIR/NAME-DATE-TIME``, with a number appended when that name is taken.

    Args:
        runs_dir: Parent of all run folders.
        name: Beginning of the folder's name.
        on_failure: Stack of the removal of what is made, if still empty; None makes no folder
            and only looks for a free name.
    """
    if known := os.environ.get(RUN_FOLDER_VARIABLE):
        return known

    def is_ours(folder: Path) -> bool:
        if on_failure is None:
            return not folder.exists()
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        if not make_owned(folder):
            return False
        for path in reversed(missing):  # the last one registered goes first
            on_failure.callback(_remove_empty, path)
        return True

    return str(new_folder(runs_dir, name, is_ours))


class AgreedFolder:
    """Rank 0's choice of a folder on all ranks that torchrun or SLURM started.

    Their clocks differ, so only rank 0 chooses. The object is to be kept until the process group
    stands: rank 0 serves the store until the group takes over the same address.

    Args:
        choose: Function that claims the folder; called on rank 0 only.
        timeout_s: Seconds by which the ranks may be apart.

    Raises:
        MeetingError: The ranks did not come together.
    """

    def __init__(self, choose: Callable[[], str], timeout_s: float | int = START_S) -> None:
        self._store: Any = None
        # Lightning's order: torchrun may run inside of SLURM.
        kinds = (TorchElasticEnvironment, SLURMEnvironment)
        ranks = next((kind() for kind in kinds if kind.detect()), None)
        if ranks is None or ranks.world_size() == 1:
            self.path = choose()
            return
        self._store = meet(
            ranks.main_address, ranks.main_port, ranks.global_rank(), ranks.world_size(), timeout_s
        )
        if ranks.global_rank() == 0:
            self._store.set(RUN_FOLDER_VARIABLE, choose())
        self.path = str(self._store.get(RUN_FOLDER_VARIABLE).decode())


def find_checkpoint(
    ckpt_path: str, run_name: str, runs_dir: Path, tell: Callable[[str], None] | None = None
) -> Path:
    """The file that ``--ckpt_path`` refers to.

    Where the newest ``last`` cannot be read, as after a crash of the machine, the newest readable
    checkpoint takes its place, whether ``last`` or ``best``.

    Args:
        ckpt_path: Path of a file, or ``last`` or ``best`` for that of the newest run of this name.
        run_name: Beginning of the run folders' names.
        runs_dir: Parent of all run folders.
        tell: Function that takes the line about a checkpoint that was skipped.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: There are such checkpoints, but none can be read.
    """
    found = checkpoints_named(ckpt_path, run_name, runs_dir)
    if ckpt_path not in NAMED:
        return found[0]
    newest, reason = found[0], None
    others = found if ckpt_path == "best" else newest_first(run_name, runs_dir, NAMED)
    for path in [newest, *(path for path in others if path != newest)]:
        try:
            step = read_checkpoint_lazily(path).get("global_step")
        except ValueError as error:
            reason = reason or error
            continue
        if path != newest and tell is not None:
            tell(f"ckpt_path {ckpt_path}: {newest} is damaged; {path} of step {step} is taken")
        return path
    assert reason is not None
    raise reason


def read_checkpoint_lazily(path: Path) -> dict[str, Any]:
    """All of a checkpoint but its weights, which are only read when they are used.

    Raises:
        ValueError: The file is not a checkpoint.
    """
    try:
        checkpoint = load_contents(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"ckpt_path {path} is not a checkpoint that can be read safely") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"ckpt_path {path} is not a checkpoint of a training run")
    return checkpoint


def remove_run_leftovers(checkpoint: Path) -> None:
    """Removes what a killed run was writing: the run that resumes from it has its own folder.

    Args:
        checkpoint: Checkpoint of the run; files that a living run is writing stay.
    """
    for name in ("last.ckpt", "best.ckpt"):
        remove_leftovers(checkpoint.with_name(name))
    remove_leftovers(checkpoint.absolute().parent.parent / "metrics.csv")


def keep_old_metrics(run_folder: Path) -> None:
    """Moves ``metrics.csv`` of an earlier run aside, which CSVLogger would delete."""
    path = run_folder / "metrics.csv"
    if path.exists():
        number = 1 + sum(1 for _ in run_folder.glob("metrics-*.csv"))
        path.rename(run_folder / f"metrics-{number}.csv")


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # not there, or not empty
        folder.rmdir()
