"""Runs the trials of a sweep one after the other, each in a process of its own."""

import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial
from optuna.trial import TrialState as StudyState
from rich.console import Console
from rich.table import Table

from fingpt_lightning.files import named_when_full, remove_leftovers, write_json
from fingpt_lightning.sweeping.records import (
    best_number,
    run_folder,
    table,
    write_best_config,
    write_record,
)
from fingpt_lightning.sweeping.space import Point, short_names, shown
from fingpt_lightning.sweeping.sweep_file import Sweep
from fingpt_lightning.sweeping.trial_process import (
    ARGUMENTS_FILE,
    Outcome,
    TrialState,
    metric_history,
    run_trial,
    trial_command,
)
from fingpt_lightning.units import format_duration

_STUDY_STATES = {
    TrialState.FINISHED: StudyState.COMPLETE,
    TrialState.FAILED: StudyState.FAIL,
    TrialState.PRUNED: StudyState.PRUNED,
}


class SweepResults(NamedTuple):
    """What a sweep ends with.

    Attributes:
        table: Table of all trials.
        worker: Worker that ran the best trial of a shared sweep.
        folder: Folder of the sweep on that worker's machine.
    """

    table: Table
    worker: str | None
    folder: str | None


class SweepRunner(ABC):
    """A sweep in a folder, of which every trial is an offline W&B run in one group.

    Args:
        folder: Folder of the sweep.
        sweep: Sweep file.
        study: Optuna's study, as `fill_study` made it.

    Attributes:
        group: W&B group of the trials.
    """

    def __init__(self, folder: Path, sweep: Sweep, study: optuna.Study) -> None:
        self.folder, self.sweep, self.study = folder, sweep, study
        attributes = study.user_attrs
        self.count: int = attributes["count"]
        self.name: str = attributes["name"]
        self.project: str | None = attributes["project"]
        self.group = folder.name

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
            KeyboardInterrupt: It was interrupted; a runner of the same folder resumes it.
        """
        with named_when_full(self.folder), self._held(console) as inherited:
            remove_leftovers(self.folder)
            write_record(self.folder, self.sweep, self.study)
            while (trial := self._next(console)) is not None:
                self._run_trial(trial, console, [*extra], inherited)
            write_record(self.folder, self.sweep, self.study)
            best = best_number(self.study)
            if self.has_reached_target():
                line = f"{self.sweep.metric} has reached {self.sweep.compared_by.target:g}"
                console.print(f"{line}: no further trial", markup=False, highlight=False)
            if best is not None:
                self._write_best(best)
        return best

    def results(self, console: Console) -> SweepResults:
        """The table of the trials, and where the best one was run.

        Args:
            console: Console that prints what delays them.
        """
        has_best = best_number(self.study) is not None
        attributes = self.study.best_trial.user_attrs if has_best else {}
        trials = table(self.sweep, self.study)
        return SweepResults(trials, attributes.get("worker"), attributes.get("folder"))

    def has_reached_target(self) -> bool:
        """Whether a trial has finished with a value at the metric's target or beyond it."""
        trials = self.study.get_trials(deepcopy=False, states=(StudyState.COMPLETE,))
        is_reached = self.sweep.compared_by.is_reached
        return any(trial.value is not None and is_reached(trial.value) for trial in trials)

    @abstractmethod
    def _held(self, console: Console) -> AbstractContextManager[Sequence[int]]:
        """Keeps the folder for this process; yields the open files that its trials keep open."""

    @abstractmethod
    def _next(self, console: Console) -> Trial | None:
        """The trial to run now; None at the end of the sweep."""

    def _tick(self, trial: Trial) -> None:
        """Called twice a second while a trial runs; an exception ends the trial."""
        return

    def _write_best(self, number: int) -> None:
        write_best_config(self.folder, self.study.get_trials(deepcopy=False)[number])

    def _trial_folder(self, trial: Trial) -> Path:
        return self.folder / run_folder(self.study.get_trials(deepcopy=False)[trial.number])

    def _is_complete(self, trials: Sequence[FrozenTrial]) -> bool:
        """Whether no further trial is started."""
        started = [frozen for frozen in trials if frozen.state != StudyState.WAITING]
        return len(started) >= self.count or self.has_reached_target()

    def _seed(self, number: int) -> None:
        # A sampler of its own for each trial: a resumed sweep chooses as an uninterrupted one.
        self.study.sampler = _sampler(self.sweep.method, seed=number)

    def _point(self, trial: Trial) -> Point:
        return {
            name: found.samples()[0] if found.is_constant else found.suggest(trial, name)
            for name, found in self.sweep.parameters.items()
        }

    def _run_trial(
        self, trial: Trial, console: Console, extra: list[str], inherited: Sequence[int]
    ) -> None:
        folder, words = self._prepared(trial, console, extra)
        with console.status(
            f"trial {trial.number} of {self.count} since {time.strftime('%H:%M:%S')}"
        ):
            outcome = run_trial(
                words,
                folder,
                self._environment(),
                self.sweep.metric,
                None
                if self.sweep.stopping is None
                else lambda values: self._is_hopeless(trial, values),
                inherited,
                lambda: self._tick(trial),
            )
        self._record(trial, outcome, console)
        line = f"trial {trial.number}: {self._verdict(outcome)}"
        console.print(line, markup=False, highlight=False)

    def _prepared(self, trial: Trial, console: Console, extra: list[str]) -> tuple[Path, list[str]]:
        """The new run folder of a trial, and its command."""
        point = self._point(trial)
        folder = self._trial_folder(trial)
        if folder.exists():
            shutil.rmtree(folder)  # of a trial that was stopped in the middle
        folder.mkdir(parents=True)
        arguments = folder / ARGUMENTS_FILE
        write_json(arguments, self.sweep.arguments(point))
        write_record(self.folder, self.sweep, self.study)
        names = short_names(self.sweep.searched)
        settings = ", ".join(f"{names[name]} {shown(point[name])}" for name in self.sweep.searched)
        line = f"trial {trial.number}: {settings or 'as the config has it'}"
        console.print(line, markup=False, highlight=False)
        words = trial_command(
            self.sweep.command, arguments, [*extra, "--trainer.default_root_dir", str(folder)]
        )
        return folder, words

    def _is_hopeless(self, trial: Trial, values: Sequence[float]) -> bool:
        _report(trial, values)
        return trial.should_prune()

    def _record(self, trial: Trial, outcome: Outcome, console: Console) -> None:
        trial.set_user_attr("seconds", round(outcome.seconds, 1))
        trial.set_user_attr("error", outcome.error)
        if self.sweep.stopping is not None:
            # Hyperband derives the length of a trial from them.
            _report(trial, metric_history(self._trial_folder(trial), self.sweep.metric))
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
            "WANDB_RUN_GROUP": self.group,
            "WANDB_SILENT": "true",
        }


def fill_study(
    study: optuna.Study, sweep: Sweep, count: int, project: str | None, **attributes: str
) -> None:
    """Writes into a new study what a runner reads; ``count`` is the last and marks it as whole.

    Args:
        study: New study.
        sweep: Sweep to run.
        count: Number of trials in all.
        project: Project of W&B; None leaves it to the trials' config.
        attributes: Further attributes of the study.
    """
    for name, value in attributes.items():
        study.set_user_attr(name, value)
    study.set_user_attr("name", sweep.name)
    study.set_user_attr("sweep_file", str(sweep.path))
    study.set_user_attr("project", project)
    study.set_user_attr("started_at", datetime.now(UTC).isoformat(timespec="seconds"))
    if sweep.method == "grid":
        # In the order of the file: Optuna's own sampler of grids shuffles them.
        for point in sweep.grid():
            study.enqueue_trial(_stored(sweep, point))
    study.set_user_attr("count", count)


def direction(sweep: Sweep) -> Literal["minimize", "maximize"]:
    """Optuna's word for which values of the metric are better."""
    return "maximize" if sweep.is_maximized else "minimize"


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


def _stored(sweep: Sweep, point: Point) -> dict[str, Any]:
    return {name: sweep.parameters[name].stored(point[name]) for name in sweep.searched}


def _sampler(method: str, seed: int) -> BaseSampler:
    return TPESampler(seed=seed) if method == "bayes" else RandomSampler(seed=seed)


def pruner_of(sweep: Sweep) -> BasePruner:
    """Optuna's pruner for the early stopping of a sweep."""
    if sweep.stopping is None:
        return NopPruner()
    first, factor, last = sweep.stopping
    return HyperbandPruner(
        min_resource=first, max_resource="auto" if last is None else last, reduction_factor=factor
    )


def _report(trial: Trial, values: Sequence[float]) -> None:
    """Reports to Optuna the values that it has not seen."""
    known = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
    for number, value in enumerate(values, 1):
        if number not in known:
            trial.report(value, number)
