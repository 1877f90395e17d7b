"""Runs one sweep from several machines, which share its study in a database.

A worker chooses its next trial under the database's lock, so that the number of trials is that of
the whole sweep. While a trial runs its worker writes heartbeats; where they end, another worker
runs the same trial again, under the same number and in a new folder.
"""

import os
import secrets
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import optuna
import yaml
from optuna.trial import FrozenTrial, Trial
from optuna.trial import TrialState as StudyState
from rich.console import Console
from typing_extensions import override

from fingpt_lightning.files import write_json, write_whole
from fingpt_lightning.sweeping import database as databases
from fingpt_lightning.sweeping.database import DATABASE_ERRORS, Database
from fingpt_lightning.sweeping.folders import SWEEP_FILE
from fingpt_lightning.sweeping.records import run_folder, write_record
from fingpt_lightning.sweeping.sweep_file import Sweep
from fingpt_lightning.sweeping.sweep_runner import (
    SweepResults,
    SweepRunner,
    direction,
    fill_study,
    num_trials,
    pruner_of,
)
from fingpt_lightning.sweeping.trial_process import Outcome

_T = TypeVar("_T")
STUDY_FILE = "study.json"
_WORKER, _TOKEN, _ATTEMPT, _FOLDER = "worker", "token", "attempt", "folder"
_WAIT_S = 1.0
_OUTAGE_S = 300.0
"""Seconds for which a worker waits for a database that does not answer."""


class LostTrialError(Exception):
    """A trial that this worker runs belongs to another one by now."""


class SharedSweep(SweepRunner):
    """One worker of a sweep whose study is in a database; the first one makes the study.

    Args:
        sweep: Sweep to run; that of all workers is the same.
        database: Database of the study.
        study_name: Name of the study in the database.
        folder: Folder of the sweep, on a disk that the workers share or not.
        count: Number of trials of all workers together; None takes that of the study, or of the
            file. A larger one than the study's extends it.
        project: Project of W&B; None takes that of the study.

    Raises:
        ValueError: The study or the folder is of another sweep, or the count is not valid.
    """

    def __init__(
        self,
        sweep: Sweep,
        database: Database,
        study_name: str,
        folder: Path,
        count: int | None,
        project: str | None,
    ) -> None:
        sweep.check_local()
        self.database = database
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with database.explained(), database.locked():
            study = _joined(sweep, database, study_name, count, project)
            super().__init__(folder, sweep, study)
            self.group = study_name
            if count is not None and num_trials(sweep, count) > self.count:
                self.extend(count)
            _take_folder(folder, study_name, study.user_attrs["identity"], sweep)
        self._token = secrets.token_hex(8)
        self._worker = f"process {os.getpid()} on {socket.gethostname()}"
        self._next_beat_s = 0.0
        self._outage_ends_s: float | None = None
        self._trusts_heartbeats_from_s = 0.0

    @override
    def run(self, console: Console, extra: Sequence[str] = ()) -> int | None:
        return self._through_outages(partial(super().run, console, extra), console)

    @override
    def results(self, console: Console) -> SweepResults:
        return self._through_outages(partial(super().results, console), console)

    def _through_outages(self, work: Callable[[], _T], console: Console) -> _T:
        """What ``work`` gives, which is repeated after an outage of the database."""
        with self.database.explained():
            while True:
                try:
                    done = work()
                except DATABASE_ERRORS as error:
                    self._wait_for_database(error, console)
                else:
                    self._end_outage(console)
                    return done

    def _wait_for_database(self, error: Exception, console: Console) -> None:
        """Waits a moment; raises the error where that has lasted for five minutes."""
        self._doubt_heartbeats()
        if self._outage_ends_s is None:
            self._outage_ends_s = time.monotonic() + _OUTAGE_S
            line = f"waiting for the database: {self.database.described(error)}"
            console.print(line, markup=False, highlight=False)
        if time.monotonic() > self._outage_ends_s:
            raise error
        time.sleep(_WAIT_S)

    def _end_outage(self, console: Console) -> None:
        if self._outage_ends_s is not None:
            console.print("the database answers again", markup=False, highlight=False)
        self._outage_ends_s = None

    def _doubt_heartbeats(self) -> None:
        # None was written in an outage: all workers get the time to write one.
        self._trusts_heartbeats_from_s = (
            time.monotonic() + databases.CONNECT_S + databases.HEARTBEAT_S
        )

    @override
    @contextmanager
    def _held(self, console: Console) -> Iterator[Sequence[int]]:
        yield ()  # the folder is that of all workers

    @override
    def _next(self, console: Console) -> Trial | None:
        is_told = False
        while True:
            with self.database.locked():
                self.count = self.study.user_attrs["count"]
                trials = self.study.get_trials(deepcopy=False)
                if (trial := self._claim(trials, console)) is not None:
                    return trial
            self._end_outage(console)
            running = [frozen for frozen in trials if frozen.state == StudyState.RUNNING]
            if not running:
                return None
            if not is_told:
                whose = ", ".join(f"{one.number} ({one.user_attrs[_WORKER]})" for one in running)
                console.print(f"waiting for trials {whose}", markup=False, highlight=False)
                is_told = True
            time.sleep(_WAIT_S)

    def _claim(self, trials: Sequence[FrozenTrial], console: Console) -> Trial | None:
        """A trial that is this worker's now: one whose worker has ended, else a new one."""
        stale: list[int] = []
        if time.monotonic() >= self._trusts_heartbeats_from_s:
            stale = self.database.storage._get_stale_trial_ids(self.study._study_id)
        for frozen in trials:
            token = frozen.user_attrs.get(_TOKEN)
            # Without a token its worker ended while it chose: it did not give up the lock alive.
            # With this worker's it is one that it could not begin in an outage.
            is_left = frozen._trial_id in stale or token in (None, self._token)
            if frozen.state == StudyState.RUNNING and is_left:
                self._seed(frozen.number)
                attempt = frozen.user_attrs.get(_ATTEMPT, 0)
                if token != self._token:
                    self._take_over(frozen, console)
                    attempt += 1
                return self._owned(Trial(self.study, frozen._trial_id), attempt)
        if self._is_complete(trials):
            return None
        self._seed(sum(frozen.state != StudyState.WAITING for frozen in trials))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Heartbeat of storage")  # ours come from `_tick`
            trial = self.study.ask()
        return self._owned(trial, 1)

    def _take_over(self, frozen: FrozenTrial, console: Console) -> None:
        if before := frozen.user_attrs.get(_WORKER):
            line = f"trial {frozen.number}: {before} has ended; run again"
            console.print(line, markup=False, highlight=False)
            shutil.rmtree(self.folder / run_folder(frozen), ignore_errors=True)

    def _owned(self, trial: Trial, attempt: int) -> Trial:
        self.database.storage.record_heartbeat(trial._trial_id)
        self._point(trial)  # under the lock: a trial that is run again has the same
        trial.set_user_attr(_ATTEMPT, attempt)
        trial.set_user_attr(_FOLDER, str(self.folder.resolve()))
        trial.set_user_attr(_WORKER, self._worker)
        trial.set_user_attr(_TOKEN, self._token)  # the last: it makes the others count
        self._next_beat_s = time.monotonic() + databases.HEARTBEAT_S
        return trial

    def _is_own(self, trial: Trial) -> bool:
        frozen = self.study.get_trials(deepcopy=False)[trial.number]
        return frozen.state == StudyState.RUNNING and frozen.user_attrs.get(_TOKEN) == self._token

    @override
    def _tick(self, trial: Trial) -> None:
        if time.monotonic() < self._next_beat_s:
            return
        try:
            if not self._is_own(trial):
                raise LostTrialError
            self.database.storage.record_heartbeat(trial._trial_id)
        except DATABASE_ERRORS:  # the trial runs on
            self._doubt_heartbeats()
            self._next_beat_s = time.monotonic() + _WAIT_S
        else:
            self._next_beat_s = time.monotonic() + databases.HEARTBEAT_S

    @override
    def _is_hopeless(self, trial: Trial, values: Sequence[float]) -> bool:
        with suppress(*DATABASE_ERRORS):  # the next value reports this one too
            return super()._is_hopeless(trial, values)
        return False

    @override
    def _prepared(self, trial: Trial, console: Console, extra: list[str]) -> tuple[Path, list[str]]:
        prepared = super()._prepared(trial, console, extra)
        self._end_outage(console)
        return prepared

    @override
    def _run_trial(
        self, trial: Trial, console: Console, extra: list[str], inherited: Sequence[int]
    ) -> None:
        try:
            super()._run_trial(trial, console, extra, inherited)
        except LostTrialError:
            line = f"trial {trial.number}: run by another worker by now; dropped here"
            console.print(line, markup=False, highlight=False)
        except DATABASE_ERRORS:
            raise  # it stays this worker's
        except BaseException:
            # Released at once: the others need not wait for its heartbeats to be missed.
            with suppress(*DATABASE_ERRORS):
                if self._is_own(trial):
                    trial.set_user_attr(_TOKEN, None)
            raise

    @override
    def _record(self, trial: Trial, outcome: Outcome, console: Console) -> None:
        while True:
            try:
                with self.database.locked():
                    frozen = self.study.get_trials(deepcopy=False)[trial.number]
                    if frozen.user_attrs.get(_TOKEN) != self._token:
                        raise LostTrialError
                    if frozen.state == StudyState.RUNNING:
                        super()._record(trial, outcome, console)
                    else:  # the database failed after it had taken the result
                        write_record(self.folder, self.sweep, self.study)
                self._end_outage(console)
                return
            except DATABASE_ERRORS as error:
                self._wait_for_database(error, console)

    @override
    def _write_best(self, number: int) -> None:
        frozen = self.study.get_trials(deepcopy=False)[number]
        if (self.folder / run_folder(frozen)).is_dir():
            super()._write_best(number)


def _joined(
    sweep: Sweep, database: Database, name: str, count: int | None, project: str | None
) -> optuna.Study:
    """The study of that name; it is made where it is not there, or not whole."""
    text = yaml.safe_dump(sweep.content)
    names = optuna.get_all_study_names(database.storage)
    pruner = pruner_of(sweep)
    if name in names:
        study = optuna.load_study(study_name=name, storage=database.storage, pruner=pruner)
        attributes = study.user_attrs
        if "count" in attributes:
            if attributes.get("content") != text:
                raise ValueError(
                    f"study {name!r} in {database.shown} is of another sweep than {sweep.path};"
                    " --study gives this one a name of its own"
                )
            if project not in (None, attributes["project"]):
                raise ValueError(f"--project: study {name!r} has {attributes['project']}")
            return study
        optuna.delete_study(study_name=name, storage=database.storage)
    number = num_trials(sweep, count)
    study = optuna.create_study(
        study_name=name, storage=database.storage, direction=direction(sweep), pruner=pruner
    )
    fill_study(study, sweep, number, project, content=text, identity=secrets.token_hex(8))
    return study


def _take_folder(folder: Path, name: str, identity: str, sweep: Sweep) -> None:
    known = {"study": name, "identity": identity}
    file = folder / STUDY_FILE
    folder.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        if yaml.safe_load(file.read_text(encoding="utf-8")) != known:
            raise ValueError(f"output {folder} is of another study than {name!r}")
        return
    if any(path.name != SWEEP_FILE for path in folder.iterdir()):
        raise ValueError(f"output {folder} is not empty and of no shared sweep")
    write_whole(folder / SWEEP_FILE, sweep.path.read_text(encoding="utf-8"))
    write_json(file, known)
