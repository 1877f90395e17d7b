"""Runs a sweep without a server: Optuna chooses, one process per trial, all in one folder."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import Trial
from optuna.trial import TrialState as StudyState
from rich.console import Console

from fingpt_lightning.files import (
    InUseError,
    named_when_full,
    remove_leftovers,
    scratch_folder,
    sync_files,
    sync_folder,
    try_lock,
    write_json,
    write_owner,
)
from fingpt_lightning.sweeping.records import best_number, write_best_config, write_record
from fingpt_lightning.sweeping.space import Point, short_names, shown
from fingpt_lightning.sweeping.sweep_file import Sweep, read_sweep
from fingpt_lightning.sweeping.trial_process import (
    ARGUMENTS_FILE,
    Outcome,
    TrialState,
    metric_history,
    run_trial,
    trial_command,
)
from fingpt_lightning.units import format_duration

STUDY = "study.sqlite"
SWEEP_FILE = "sweep.yaml"
_LOCK = "sweep.lock"
_LOCK_PATIENCE_S = 90.0
_STUDY_STATES = {
    TrialState.FINISHED: StudyState.COMPLETE,
    TrialState.FAILED: StudyState.FAIL,
    TrialState.PRUNED: StudyState.PRUNED,
}


class LocalSweep:
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
        if not ((folder / STUDY).is_file() and (folder / SWEEP_FILE).is_file()):
            raise ValueError(f"{folder} is no sweep: it has no {STUDY} and {SWEEP_FILE}")
        self.folder = folder
        self.sweep = read_sweep(folder / SWEEP_FILE)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.load_study(
            study_name=None, storage=_storage(folder), pruner=_pruner(self.sweep)
        )
        attributes = self.study.user_attrs
        if "count" not in attributes:
            raise ValueError(f"{folder} is no sweep: it was stopped before it began")
        self.count: int = attributes["count"]
        self.name: str = attributes["name"]
        self.project: str | None = attributes["project"]

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
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"output {folder} is not empty; --resume goes on with a sweep")
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
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction="maximize" if sweep.is_maximized else "minimize",
        )
        study.set_user_attr("name", sweep.name)
        study.set_user_attr("sweep_file", str(sweep.path))
        study.set_user_attr("project", project)
        study.set_user_attr("started_at", datetime.now(UTC).isoformat(timespec="seconds"))
        if sweep.method == "grid":
            # In the order of the file: Optuna's own sampler of grids shuffles them.
            for point in sweep.grid():
                study.enqueue_trial(_stored(sweep, point))
        study.set_user_attr("count", count)
        storage.remove_session()
        storage.engine.dispose()

    def extend(self, count: int) -> None:
        """Sets the total number of trials."""
        self.count = num_trials(self.sweep, count)
        self.study.set_user_attr("count", self.count)

    def run(self, console: Console, extra: Sequence[str] = ()) -> int | None:
        """Runs the trials that are left, and the one that was running when the sweep was stopped.

        Args:
            console: Console that prints a line for each trial.
            extra: Options of every trial, after the sweep's command.

        Returns:
            Best trial; None where none has finished.

        Raises:
            InUseError: Another process runs this sweep.
            NoSpaceError: The disk is full.
            KeyboardInterrupt: It was interrupted; `LocalSweep` of the folder resumes it.
        """
        with named_when_full(self.folder), _locked(self.folder, console) as lock:
            remove_leftovers(self.folder)
            write_record(self.folder, self.sweep, self.study)
            while (trial := self._next()) is not None:
                point = self._point(trial)
                self._run_trial(trial, point, console, [*extra], lock)
            best = best_number(self.study)
            if self.has_reached_target():
                line = f"{self.sweep.metric} has reached {self.sweep.compared_by.target:g}"
                console.print(f"{line}: no further trial", markup=False, highlight=False)
            if best is not None:
                write_best_config(self.folder, best)
        return best

    def has_reached_target(self) -> bool:
        """Whether a trial has finished with a value at the metric's target or beyond it."""
        trials = self.study.get_trials(deepcopy=False, states=(StudyState.COMPLETE,))
        is_reached = self.sweep.compared_by.is_reached
        return any(trial.value is not None and is_reached(trial.value) for trial in trials)

    def trial_folder(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.folder / "trials" / f"{number:03d}"

    def _next(self) -> Trial | None:
        trials = self.study.get_trials(deepcopy=False)
        for frozen in trials:
            if frozen.state == StudyState.RUNNING:
                return Trial(self.study, frozen._trial_id)
        started = [frozen for frozen in trials if frozen.state != StudyState.WAITING]
        if len(started) >= self.count or self.has_reached_target():
            return None
        # A sampler of its own for each trial: a resumed sweep chooses as an uninterrupted one.
        self.study.sampler = _sampler(self.sweep.method, seed=len(started))
        return self.study.ask()

    def _point(self, trial: Trial) -> Point:
        return {
            name: found.samples()[0] if found.is_constant else found.suggest(trial, name)
            for name, found in self.sweep.parameters.items()
        }

    def _run_trial(
        self, trial: Trial, point: Point, console: Console, extra: list[str], lock: int
    ) -> None:
        folder = self.trial_folder(trial.number)
        if folder.exists():
            shutil.rmtree(folder)  # of a trial that was stopped in the middle
        folder.mkdir(parents=True)
        arguments = folder / ARGUMENTS_FILE
        write_json(arguments, self.sweep.arguments(point))
        write_record(self.folder, self.sweep, self.study)
        names = short_names(self.sweep.searched)
        settings = ", ".join(f"{names[name]} {shown(point[name])}" for name in self.sweep.searched)
        head = f"trial {trial.number}"
        line = f"{head}: {settings or 'as the config has it'}"
        console.print(line, markup=False, highlight=False)
        words = trial_command(
            self.sweep.command, arguments, [*extra, "--trainer.default_root_dir", str(folder)]
        )
        with console.status(f"{head} of {self.count} since {time.strftime('%H:%M:%S')}"):
            outcome = run_trial(
                words,
                folder,
                self._environment(),
                self.sweep.metric,
                None if self.sweep.stopping is None else lambda values: _is_hopeless(trial, values),
                (lock,),
            )
        self._record(trial, outcome)
        console.print(f"{head}: {self._verdict(outcome)}", markup=False, highlight=False)

    def _record(self, trial: Trial, outcome: Outcome) -> None:
        trial.set_user_attr("seconds", round(outcome.seconds, 1))
        trial.set_user_attr("error", outcome.error)
        if self.sweep.stopping is not None:
            # Hyperband derives the length of a trial from them.
            _report(trial, metric_history(self.trial_folder(trial.number), self.sweep.metric))
        # For a pruned trial, which accepts no value, Optuna knows the last that was reported.
        value = outcome.value if outcome.state == TrialState.FINISHED else None
        self.study.tell(trial, value, state=_STUDY_STATES[outcome.state])
        write_record(self.folder, self.sweep, self.study)

    def _verdict(self, outcome: Outcome) -> str:
        took = format_duration(outcome.seconds)
        if outcome.state == TrialState.FAILED:
            return f"failed after {took}: {outcome.error}"
        how = "stopped early at" if outcome.state == TrialState.PRUNED else ""
        return f"{how} {self.sweep.metric} {shown(outcome.value)} in {took}".strip()

    def _environment(self) -> dict[str, str]:
        return os.environ | {
            "WANDB_MODE": "offline",
            "WANDB_RUN_GROUP": self.folder.name,
            "WANDB_SILENT": "true",
        }


def num_trials(sweep: Sweep, count: int | None) -> int:
    """The total number of trials of a sweep.

    Args:
        sweep: The sweep.
        count: Number from the command line.

    Raises:
        ValueError: Neither the command line nor the file gives it.
    """
    if sweep.num_trials is None:
        if count is None:
            raise ValueError(
                f"{sweep.path}: method {sweep.method} has no end; give --count or run_cap"
            )
        return count
    return sweep.num_trials if count is None else min(count, sweep.num_trials)


def _storage(folder: Path) -> str:
    return f"sqlite:///{(folder / STUDY).resolve()}"


def _stored(sweep: Sweep, point: Point) -> dict[str, Any]:
    return {name: sweep.parameters[name].stored(point[name]) for name in sweep.searched}


def _sampler(method: str, seed: int) -> BaseSampler:
    return TPESampler(seed=seed) if method == "bayes" else RandomSampler(seed=seed)


def _pruner(sweep: Sweep) -> BasePruner:
    if sweep.stopping is None:
        return NopPruner()
    first, factor, last = sweep.stopping
    return HyperbandPruner(
        min_resource=first, max_resource="auto" if last is None else last, reduction_factor=factor
    )


def _is_hopeless(trial: Trial, values: Sequence[float]) -> bool:
    _report(trial, values)
    return trial.should_prune()


def _report(trial: Trial, values: Sequence[float]) -> None:
    """Reports to Optuna the values that it has not seen."""
    known = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
    for number, value in enumerate(values, 1):
        if number not in known:
            trial.report(value, number)


@contextmanager
def _locked(folder: Path, console: Console) -> Iterator[int]:
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
        yield descriptor
    finally:
        os.close(descriptor)
