"""Do several workers of one sweep in a database run every trial once, though one is killed?

Starts a PostgreSQL server of its own on loopback and some ``fingpt sweep --storage`` workers, and
ends one of them by SIGKILL while its trial trains.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import IO, Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState

from benchmarks.postgres import PASSWORD, find_programs, running_postgres
from benchmarks.record import markdown_table, new_record, write_record
from fingpt_lightning.sweeping import database as databases
from fingpt_lightning.sweeping.database import Database
from fingpt_lightning.sweeping.records import run_folder
from fingpt_lightning.sweeping.sweep_file import read_sweep

QUESTION = (
    "Do the workers of one sweep in a PostgreSQL database run every trial once, though one of them"
    " is killed amid a trial, and how long until another worker takes that trial over?"
)
PROGRAM = [sys.executable, "-m", "fingpt_lightning", "sweep"]
STUDY = "shared"
_VARIABLE = "SWEEP_DATABASE"
_POLL_S = 0.1
_TIMEOUT_S = 1800.0
_TOO_LONG = f"the sweep takes longer than {_TIMEOUT_S:.0f} s"
_ENDED = re.compile(r"^trial (\d+): (?:\S+ -?[\d.e+-]+ in |stopped early|failed after)")


class Worker(NamedTuple):
    """A process of ``fingpt sweep``.

    Attributes:
        process: The process.
        output: File of all that it prints.
        started_s: Time of its start.
    """

    process: subprocess.Popen[bytes]
    output: Path
    started_s: float

    def is_worker_of(self, trial: FrozenTrial) -> bool:
        """Whether it was the last to take that trial."""
        worker = trial.user_attrs.get("worker", "")
        return f"{worker} ".startswith(f"process {self.process.pid} ")


class Kill(NamedTuple):
    """The end of the killed worker.

    Attributes:
        trial: Number of the trial that it ran.
        at_s: Time of the signal.
    """

    trial: int
    at_s: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the sweep and writes record and table.

    Args:
        arguments: Options; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument("--sweep", type=Path, default=Path("benchmarks/shared_sweep.yaml"))
    parser.add_argument("--workers", type=int, default=4, help="two at least")
    parser.add_argument("--output", type=Path, default=Path("runs/sweeps/shared_benchmark"))
    options = parser.parse_args(arguments)
    if options.workers < 2:
        parser.error(f"--workers {options.workers} is below 2")
    if (programs := find_programs()) is None:
        parser.error("no PostgreSQL: apt-get install postgresql")
    sweep = read_sweep(options.sweep)
    if sweep.num_trials is None or sweep.num_trials <= options.workers:
        parser.error(f"--sweep {options.sweep} has no grid of more trials than workers")
    record = new_record(
        QUESTION,
        {
            "sweep": str(options.sweep),
            "trials": sweep.num_trials,
            "workers": options.workers,
            "killed_by": "SIGKILL",
            "heartbeat_s": databases.HEARTBEAT_S,
            "stale_s": databases.STALE_S,
            "threads_per_trial": 1,
        },
    )
    # Not below the output, which another user, the server's, may not enter.
    with (
        tempfile.TemporaryDirectory() as scratch,
        running_postgres(programs, Path(scratch)) as server,
    ):
        record |= measured(server.url, options.sweep, options.workers, options.output)
    write_record(options.json, record, table(record["rows"]))
    print(json.dumps(record["summary"], indent=1))


def measured(url: str, sweep: Path, num_workers: int, folder: Path) -> dict[str, Any]:
    """Runs a sweep with one worker killed, and counts what happened to its trials.

    Args:
        url: URL of the database, in which there is no study yet.
        sweep: Sweep file.
        num_workers: Number of workers.
        folder: Folder that is made; all workers share it.

    Returns:
        Rows and summary of the record.

    Raises:
        RuntimeError: A worker failed, or no trial could be interrupted.
    """
    words = [*PROGRAM, str(sweep), "--storage", f"env:{_VARIABLE}", "--study", STUDY]
    words += ["--output", str(folder / "sweep")]
    folder.mkdir(parents=True)
    started_s = time.monotonic()
    workers: list[Worker] = []
    with ExitStack() as stack:
        for number in range(num_workers):
            output = folder / f"worker_{number}.txt"
            file = stack.enter_context(output.open("wb"))
            workers.append(_started(words, url, output, file))
            stack.callback(_end, workers[-1].process)
        database = stack.enter_context(closing(Database(url)))
        study = _study(database, workers)
        killed = _kill_amid_a_trial(study, folder / "sweep", workers)
        takeover_s = _wait_for_takeover(study, killed, workers)
        ends_s = [killed.at_s, *_wait_for_ends(workers[1:])]
        trials = study.get_trials(deepcopy=False)
    return {
        "rows": [
            {
                "contender": f"worker {number + 1}" + (", killed" if number == 0 else ""),
                "repeats": 1,
                "seconds": round(end_s - worker.started_s, 1),
                "trials": [t.number for t in trials if worker.is_worker_of(t)],
            }
            for number, (worker, end_s) in enumerate(zip(workers, ends_s, strict=True))
        ],
        "summary": _summary(trials, killed, folder / "sweep", workers)
        | {
            "takeover_s": round(takeover_s, 1),
            "sweep_seconds": round(time.monotonic() - started_s, 1),
            "median_trial_seconds": statistics.median(t.user_attrs["seconds"] for t in trials),
        },
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A row per worker."""
    header = ["", "s in all", "trials finished", "their numbers"]
    cells = [
        [
            row["contender"],
            f"{row['seconds']:.0f}",
            str(len(row["trials"])),
            ", ".join(map(str, row["trials"])),
        ]
        for row in rows
    ]
    return markdown_table(header, cells)


def _started(words: Sequence[str], url: str, output: Path, file: IO[bytes]) -> Worker:
    environment = os.environ | {_VARIABLE: url, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=environment, stdout=file, stderr=subprocess.STDOUT)
    return Worker(process, output, time.monotonic())


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()


def _study(database: Database, workers: Sequence[Worker]) -> optuna.Study:
    """The study, as soon as a worker has made it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    deadline_s = time.monotonic() + _TIMEOUT_S
    while STUDY not in optuna.get_all_study_names(database.storage):
        _check(workers, deadline_s)
        time.sleep(_POLL_S)
    return optuna.load_study(study_name=STUDY, storage=database.storage)


def _kill_amid_a_trial(study: optuna.Study, folder: Path, workers: Sequence[Worker]) -> Kill:
    """Ends the first worker while a trial of its trains that is not among the first ones."""
    victim, deadline_s = workers[0], time.monotonic() + _TIMEOUT_S
    while True:
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            trains = (folder / run_folder(trial) / "metrics.csv").is_file()
            if trains and trial.number >= len(workers) and victim.is_worker_of(trial):
                victim.process.kill()
                at_s = time.monotonic()
                victim.process.wait()
                if study.get_trials(deepcopy=False)[trial.number].state != TrialState.RUNNING:
                    raise RuntimeError(f"trial {trial.number} ended before its worker was killed")
                return Kill(trial.number, at_s)
        _check(workers, deadline_s)
        time.sleep(_POLL_S)


def _wait_for_takeover(study: optuna.Study, killed: Kill, workers: Sequence[Worker]) -> float:
    """Seconds from the kill until the trial belongs to another worker."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    while workers[0].is_worker_of(study.get_trials(deepcopy=False)[killed.trial]):
        _check(workers[1:], deadline_s)
        time.sleep(_POLL_S)
    return time.monotonic() - killed.at_s


def _wait_for_ends(workers: Sequence[Worker]) -> list[float]:
    """The times when the workers ended."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    ends_s: dict[int, float] = {}
    while len(ends_s) < len(workers):
        for number, worker in enumerate(workers):
            status = worker.process.poll()
            if status:
                said = worker.output.read_text()
                raise RuntimeError(f"a worker ended with status {status}: {said}")
            if status == 0:
                ends_s.setdefault(number, time.monotonic())
        if time.monotonic() > deadline_s:
            raise RuntimeError(_TOO_LONG)
        time.sleep(_POLL_S)
    return [ends_s[number] for number in range(len(workers))]


def _check(workers: Sequence[Worker], deadline_s: float) -> None:
    if time.monotonic() > deadline_s:
        raise RuntimeError(_TOO_LONG)
    for worker in workers:
        if worker.process.poll() is not None:
            raise RuntimeError(f"a worker ended too early: {worker.output.read_text()}")


def _summary(
    trials: Sequence[FrozenTrial], killed: Kill, folder: Path, workers: Sequence[Worker]
) -> dict[str, Any]:
    texts = [worker.output.read_text() for worker in workers]
    lines = [line for text in texts for line in text.splitlines()]
    results = Counter(int(found[1]) for line in lines if (found := _ENDED.match(line)))
    points = {json.dumps(trial.params, sort_keys=True) for trial in trials}
    recorded = json.loads((folder / "sweep.json").read_text())["trials"]
    folders = {f"trials/{path.name}" for path in (folder / "trials").iterdir()}
    return {
        "trials": len(trials),
        "different_settings": len(points),
        "finished": sum(trial.state == TrialState.COMPLETE for trial in trials),
        "finished_in_sweep_json": sum(trial["state"] == "finished" for trial in recorded),
        "lost": sum(results[trial.number] == 0 for trial in trials),
        "doubled": sum(results[trial.number] > 1 for trial in trials),
        "killed_trial": killed.trial,
        "starts_of_the_killed_trial": trials[killed.trial].user_attrs["attempt"],
        "starts_of_all_others": sum(
            trial.user_attrs["attempt"] for trial in trials if trial.number != killed.trial
        ),
        "run_folders_without_a_trial": len(folders - {run_folder(trial) for trial in trials}),
        "password_printed": any(PASSWORD in text for text in texts),
    }


if __name__ == "__main__":
    main()
