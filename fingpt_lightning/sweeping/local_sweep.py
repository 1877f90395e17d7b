"""Runs a sweep without a server: Optuna chooses, one process per trial, all in one folder."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import optuna
from optuna.storages import RDBStorage
from optuna.trial import Trial
from optuna.trial import TrialState as StudyState
from rich.console import Console
from typing_extensions import override

from fingpt_lightning.files import (
    InUseError,
    scratch_folder,
    sync_files,
    sync_folder,
    try_lock,
    write_owner,
)
from fingpt_lightning.sweeping.folders import STUDY, SWEEP_FILE, refuse_no_sweep, refuse_used_folder
from fingpt_lightning.sweeping.sweep_file import Sweep, read_sweep
from fingpt_lightning.sweeping.sweep_runner import (
    SweepRunner,
    direction,
    fill_study,
    num_trials,
    pruner_of,
)

_LOCK = "sweep.lock"
_LOCK_PATIENCE_S = 90.0


class LocalSweep(SweepRunner):
    """A sweep in a folder, of which every trial is an offline W&B run in one group.

    All that is known is in the folder at any moment, so that a sweep may be killed and resumed:
    finished trials are never run again, one that was running is.

    Args:
        folder: Folder of the sweep, made by `begin`.

    Attributes:
        sweep: Sweep file.
        study: Optuna's study, in the folder.

    Raises:
        ValueError: The folder holds no sweep.
    """

    def __init__(self, folder: Path) -> None:
        refuse_no_sweep(folder)
        sweep = read_sweep(folder / SWEEP_FILE)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.load_study(
            study_name=None, storage=_storage(folder), pruner=pruner_of(sweep)
        )
        if "count" not in study.user_attrs:
            raise ValueError(f"{folder} is not a sweep: it was stopped before it began")
        super().__init__(folder, sweep, study)

    @classmethod
    def begin(
        cls, sweep: Sweep, folder: Path, count: int | None, project: str | None
    ) -> "LocalSweep":
        """Makes the folder of a sweep.

        Args:
            sweep: Sweep to run.
            folder: New folder.
            count: Number of trials in all; None takes that of the file.
            project: Project of W&B; None leaves it to the trials' config.

        Raises:
            ValueError: The folder is in use, the number of trials is not known, or the file has a
                setting that a local search does not honor.
        """
        sweep.check_local()
        refuse_used_folder(folder)
        count = num_trials(sweep, count)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # In a temporary folder: one with half a study could neither be resumed nor begun anew.
        with scratch_folder(folder) as made:
            shutil.copyfile(sweep.path, made / SWEEP_FILE)
            cls._create(sweep, made, folder.name, count, project)
            sync_files(made)
            made.replace(folder)
        sync_folder(folder.parent)
        return cls(folder)

    @staticmethod
    def _create(sweep: Sweep, made: Path, name: str, count: int, project: str | None) -> None:
        """Writes the study of a sweep into a folder that is renamed later."""
        storage = RDBStorage(_storage(made))
        study = optuna.create_study(storage=storage, study_name=name, direction=direction(sweep))
        fill_study(study, sweep, count, project)
        storage.remove_session()
        storage.engine.dispose()

    @override
    def _held(self, console: Console) -> AbstractContextManager[Sequence[int]]:
        return _locked(self.folder, console)

    @override
    def _next(self, console: Console) -> Trial | None:
        trials = self.study.get_trials(deepcopy=False)
        for frozen in trials:
            if frozen.state == StudyState.RUNNING:
                self._seed(frozen.number)
                return Trial(self.study, frozen._trial_id)
        if self._is_complete(trials):
            return None
        self._seed(sum(frozen.state != StudyState.WAITING for frozen in trials))
        return self.study.ask()


def _storage(folder: Path) -> str:
    return f"sqlite:///{(folder / STUDY).resolve()}"


@contextmanager
def _locked(folder: Path, console: Console) -> Iterator[tuple[int]]:
    """Keeps other processes from running the same sweep.

    Its trial holds the lock too: after a kill it may take some seconds to end.
    """
    file = folder / _LOCK
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        deadline_s = time.monotonic() + _LOCK_PATIENCE_S
        is_told = False
        while try_lock(descriptor) is False:
            if time.monotonic() > deadline_s:
                owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                raise InUseError(f"{folder} is in use by {owner or 'another process'} ({file})")
            if not is_told:
                console.print(f"waiting for the process that runs {folder} to end", markup=False)
                is_told = True
            time.sleep(0.2)
        write_owner(descriptor)
        yield (descriptor,)
    finally:
        os.close(descriptor)
