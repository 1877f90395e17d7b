"""Several workers on one sweep, over a real PostgreSQL where there is one, and over SQLite."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from io import StringIO
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import sqlalchemy
import yaml
from optuna.exceptions import StorageInternalError
from rich.console import Console

from benchmarks.postgres import PASSWORD, Postgres, find_programs, running_postgres
from fingpt_lightning.sweeping import database as databases
from fingpt_lightning.sweeping.database import Database
from fingpt_lightning.sweeping.local_sweep import LocalSweep
from fingpt_lightning.sweeping.options import parse_options
from fingpt_lightning.sweeping.shared_sweep import SharedSweep
from fingpt_lightning.sweeping.sweep_file import Sweep, read_sweep
from fingpt_lightning.sweeping.trial_process import Outcome, TrialState
from fingpt_lightning.terminal.command_line import WrongOptions
from tests.sweeping.test_local_sweep import COMMAND, OWN_PROGRAM, ROOT

WORKER = (
    OWN_PROGRAM
    + """
import sys
from pathlib import Path
from rich.console import Console
from fingpt_lightning.sweeping import database, shared_sweep
from fingpt_lightning.sweeping.sweep_file import read_sweep
database.HEARTBEAT_S, database.STALE_S, shared_sweep._WAIT_S = 1, 2, 0.1
url, file, folder = sys.argv[1:]
shared_sweep.SharedSweep(
    read_sweep(Path(file)), database.Database(url), "tiny", Path(folder), 8, None
).run(Console())
"""
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fingpt_lightning.sweeping.sweep_file._PROGRAM", "fake_fit")
    monkeypatch.setattr(databases, "HEARTBEAT_S", 1)
    monkeypatch.setattr(databases, "STALE_S", 2)
    monkeypatch.setattr("fingpt_lightning.sweeping.shared_sweep._WAIT_S", 0.1)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    if (programs := find_programs()) is None:
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    pytest.importorskip("psycopg")
    # Not below tmp_path, which another user may not enter.
    with (
        tempfile.TemporaryDirectory() as folder,
        running_postgres(programs, Path(folder)) as server,
    ):
        yield server


@pytest.fixture
def connect() -> Iterator[Callable[[str], Database]]:
    with ExitStack() as stack:
        yield lambda url: stack.enter_context(closing(Database(url)))


def _sweep(folder: Path, model: dict[str, Any], **changes: Any) -> Sweep:
    content = {
        "method": "grid",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": {"model": {"parameters": model}},
        "command": COMMAND,
    } | changes
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return read_sweep(path)


def _record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return found


@pytest.mark.slow
def test_a_killed_workers_trial_is_run_by_another_and_none_twice(
    postgres: Postgres, tmp_path: Path
) -> None:
    model = {"rank": {"values": [8, 7, 6, 5, 4, 3, 2, 1]}, "waits_at": {"value": 8}}
    sweep, folder = _sweep(tmp_path, model), tmp_path / "out"
    words = [sys.executable, "-c", WORKER, postgres.url, str(sweep.path), str(folder)]
    outputs = [(tmp_path / f"{number}.txt").open("w+") for number in range(3)]
    workers = []
    try:
        for output in outputs:
            workers.append(
                subprocess.Popen(
                    words, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=output, stderr=output
                )
            )
            if len(workers) == 1:
                _wait_for(folder / "trials/000/metrics.csv", workers[0])
        workers[0].kill()
        workers[0].wait()
        (folder / "go").touch()
        for worker in workers[1:]:
            assert worker.wait(120) == 0
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
    record = _record(folder)
    assert [(t["number"], t["state"], t["value"]) for t in record["trials"]] == [
        (number, "finished", 8.0 - number) for number in range(8)
    ]
    runs = [trial["run_folder"] for trial in record["trials"]]
    assert runs == ["trials/000-2", *(f"trials/{number:03d}" for number in range(1, 8))]
    assert sorted(f"trials/{path.name}" for path in (folder / "trials").iterdir()) == sorted(runs)
    texts = [(tmp_path / f"{number}.txt").read_text() for number in range(3)]
    assert sum(text.count("has ended; run again") for text in texts) == 1
    assert PASSWORD not in "".join(texts)
    for output in outputs:
        output.close()


def _wait_for(path: Path, worker: "subprocess.Popen[bytes] | None" = None) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert worker is None or worker.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_workers_with_folders_of_their_own_share_the_count(tmp_path: Path) -> None:
    sweep = _sweep(tmp_path, {"rank": {"values": [3, 2, 1]}})
    database = Database(f"sqlite:///{tmp_path}/study.sqlite")
    one = SharedSweep(sweep, database, "tiny", tmp_path / "one", 2, None)
    assert one.run(Console(quiet=True)) == 1
    two = SharedSweep(sweep, database, "tiny", tmp_path / "two", 3, None)
    assert two.run(Console(quiet=True)) == 2
    assert [path.name for path in (tmp_path / "two/trials").iterdir()] == ["002"]
    assert [trial["value"] for trial in _record(tmp_path / "two")["trials"]] == [3, 2, 1]
    # Another sweep under that name, and another study in that folder.
    other = _sweep(tmp_path, {"rank": {"values": [9]}})
    with pytest.raises(ValueError, match=r"study 'tiny' in sqlite:.* is of another sweep"):
        SharedSweep(other, database, "tiny", tmp_path / "three", None, None)
    with pytest.raises(ValueError, match="one is of another study than 'next'"):
        SharedSweep(other, database, "next", tmp_path / "one", None, None)


def test_a_trial_that_another_worker_took_over_is_dropped(tmp_path: Path) -> None:
    sweep = _sweep(tmp_path, {"rank": {"value": 3}})
    database = Database(f"sqlite:///{tmp_path}/study.sqlite")
    first = SharedSweep(sweep, database, "tiny", tmp_path / "out", 1, None)
    second = SharedSweep(sweep, database, "tiny", tmp_path / "out", 1, None)
    claimed = first._next(Console(quiet=True))
    assert claimed is not None
    claimed.set_user_attr("token", None)
    assert second.run(Console(quiet=True)) == 0
    with Console(quiet=True).capture(), (tmp_path / "lines.txt").open("w") as lines:
        first._run_trial(claimed, Console(file=lines), [], ())
    assert "run by another worker by now" in (tmp_path / "lines.txt").read_text()
    assert len(_record(tmp_path / "out")["trials"]) == 1


def _values_and_folders(folder: Path) -> list[tuple[str, float, str]]:
    trials = _record(folder)["trials"]
    return [(trial["state"], trial["value"], trial["run_folder"]) for trial in trials]


def test_an_outage_amid_a_trial_costs_neither_the_trial_nor_its_worker(
    postgres: Postgres,
    connect: Callable[[str], Database],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(databases, "CONNECT_S", 1)
    sweep = _sweep(tmp_path, {"rank": {"values": [2, 1]}, "waits_at": {"value": 2}})
    folder, printed = tmp_path / "out", [StringIO(), StringIO()]
    workers = [
        SharedSweep(sweep, connect(postgres.url), "amid", folder, None, None) for _ in printed
    ]
    threads = [
        Thread(target=worker.run, args=(Console(file=file, width=200),), daemon=True)
        for worker, file in zip(workers, printed, strict=True)
    ]
    threads[0].start()
    _wait_for(folder / "trials/000/metrics.csv")
    threads[1].start()
    _wait_for(folder / "trials/001/config.yaml")
    while "waiting for trials 0 (" not in printed[1].getvalue():
        time.sleep(0.05)
    postgres.stop()
    time.sleep(databases.STALE_S + 0.5)  # no heartbeat is fresh
    postgres.start()
    while "answers again" not in printed[1].getvalue():
        time.sleep(0.05)
    (folder / "go").touch()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert _values_and_folders(folder) == [
        ("finished", 2.0, "trials/000"),
        ("finished", 1.0, "trials/001"),
    ]
    texts = [file.getvalue() for file in printed]
    assert "run again" not in "".join(texts)
    assert texts[1].count("waiting for the database: postgresql://tester:***@127.0.0.1:") == 1
    assert PASSWORD not in "".join(texts)


def test_a_trial_that_ends_in_an_outage_is_recorded_after_it(
    postgres: Postgres, connect: Callable[[str], Database], tmp_path: Path
) -> None:
    sweep = _sweep(tmp_path, {"rank": {"values": [2, 1]}, "waits_at": {"value": 2}})
    folder, printed = tmp_path / "out", StringIO()
    worker = SharedSweep(sweep, connect(postgres.url), "end", folder, None, None)
    thread = Thread(target=worker.run, args=(Console(file=printed, width=200),), daemon=True)
    thread.start()
    _wait_for(folder / "trials/000/metrics.csv")
    started = (folder / "trials/000/started.txt").read_text()
    postgres.stop()
    (folder / "go").touch()
    while "waiting for the database" not in printed.getvalue():
        time.sleep(0.05)
    postgres.start()
    thread.join(60)
    assert not thread.is_alive()
    assert _values_and_folders(folder) == [
        ("finished", 2.0, "trials/000"),
        ("finished", 1.0, "trials/001"),
    ]
    assert (folder / "trials/000/started.txt").read_text() == started, "not run again"
    lines = printed.getvalue().splitlines()
    assert [line for line in lines if "database" in line][1:] == ["the database answers again"]


@pytest.mark.parametrize("failing", ["_prepared", "_owned", "_write_best", "_told"])
def test_an_outage_between_two_trials_repeats_neither(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = _sweep(tmp_path, {"rank": {"values": [2, 1]}})
    database = Database(f"sqlite:///{tmp_path}/study.sqlite")
    worker = SharedSweep(sweep, database, "tiny", tmp_path / "out", None, None)
    owner: Any = worker.study if failing == "_told" else worker
    name = "tell" if failing == "_told" else failing
    work, left = getattr(owner, name), [1]

    def fails_after_its_first_work(*given: Any, **named: Any) -> Any:
        done = work(*given, **named)
        if left:
            left.pop()
            raise StorageInternalError("server closed the connection")
        return done

    monkeypatch.setattr(owner, name, fails_after_its_first_work)
    printed, began_s = StringIO(), time.monotonic()
    assert worker.run(Console(file=printed, width=200)) == 1
    assert not left
    # Sooner than it would trust that its own heartbeats have ended.
    assert time.monotonic() - began_s < databases.CONNECT_S
    assert _values_and_folders(tmp_path / "out") == [
        ("finished", 2.0, "trials/000"),
        ("finished", 1.0, "trials/001"),
    ]
    said = "waiting for the database: sqlite:///"
    assert printed.getvalue().count(said) == 1
    assert "run again" not in printed.getvalue()
    assert "dropped" not in printed.getvalue()


def test_the_last_table_waits_for_a_database_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = _sweep(tmp_path, {"rank": {"values": [2, 1]}})
    database = Database(f"sqlite:///{tmp_path}/study.sqlite")
    worker = SharedSweep(sweep, database, "tiny", tmp_path / "out", None, None)
    printed, left, get_trials = StringIO(), [1], worker.study.get_trials

    def fails_once(*given: Any, **named: Any) -> Any:
        if left:
            left.pop()
            raise StorageInternalError("server closed the connection")
        return get_trials(*given, **named)

    monkeypatch.setattr(worker.study, "get_trials", fails_once)
    table, *place = worker.results(Console(file=printed, width=200))
    assert [column.header for column in table.columns][:2] == ["trial", "rank"]
    assert place == [None, None]
    waiting, back = printed.getvalue().splitlines()
    assert waiting.startswith("waiting for the database: sqlite:///")
    assert back == "the database answers again"


def test_an_early_stopping_that_cannot_be_asked_lets_the_trial_run(tmp_path: Path) -> None:
    stopping = {"type": "hyperband", "max_iter": 8, "s": 3, "eta": 2}
    sweep = _sweep(tmp_path, {"rank": {"values": [2, 1]}}, early_terminate=stopping)
    database = Database(f"sqlite:///{tmp_path}/study.sqlite")
    worker = SharedSweep(sweep, database, "tiny", tmp_path / "out", None, None)
    trial = worker._next(Console(quiet=True))
    assert trial is not None
    with database._engine.connect() as connection:
        connection.execute(sqlalchemy.text("ALTER TABLE trial_intermediate_values RENAME TO away"))
        assert not worker._is_hopeless(trial, [1.0])
        connection.execute(sqlalchemy.text("ALTER TABLE away RENAME TO trial_intermediate_values"))
    assert not worker._is_hopeless(trial, [1.0, 0.5])
    assert worker.study.trials[0].intermediate_values == {1: 1.0, 2: 0.5}


def test_a_database_that_stays_away_ends_the_worker_with_one_line(
    postgres: Postgres,
    connect: Callable[[str], Database],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fingpt_lightning.sweeping.shared_sweep._OUTAGE_S", 0.5)
    sweep = _sweep(tmp_path, {"rank": {"values": [1]}, "waits_at": {"value": 1}})
    folder = tmp_path / "out"
    worker = SharedSweep(sweep, connect(postgres.url), "away", folder, None, None)

    def stop() -> None:
        _wait_for(folder / "trials/000/metrics.csv")
        postgres.stop()
        (folder / "go").touch()

    thread = Thread(target=stop)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match=r"postgresql://tester:\*\*\*@.*refused") as ended:
            worker.run(Console(quiet=True))
    finally:
        thread.join()
        postgres.start()
    assert len(str(ended.value).splitlines()) == 1
    # Nothing is lost: another worker runs that trial again.
    other = SharedSweep(sweep, connect(postgres.url), "away", folder, None, None)
    assert other.run(Console(quiet=True)) == 0
    assert _values_and_folders(folder) == [("finished", 1.0, "trials/000-2")]


@pytest.mark.parametrize("method", ["grid", "random", "bayes"])
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_shared_sweep_chooses_as_a_local_one(
    kind: str,
    method: str,
    request: pytest.FixtureRequest,
    connect: Callable[[str], Database],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fingpt_lightning.sweeping.sweep_runner.run_trial", _computed)
    model: dict[str, Any] = {"rank": {"values": [4, 0.25, None]}, "bias": {"values": [True, False]}}
    if method != "grid":
        model |= {
            "width": {"min": 8, "max": 64},
            "rate": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        }
    count = None if method == "grid" else 12  # TPE draws the first ten at random
    sweep = _sweep(tmp_path, model, method=method)
    LocalSweep.begin(sweep, tmp_path / "local", count, None).run(Console(quiet=True))
    url = f"sqlite:///{tmp_path}/study.sqlite"
    if kind == "postgresql":
        url = request.getfixturevalue("postgres").url
    shared = SharedSweep(sweep, connect(url), method, tmp_path / "shared", count, None)
    shared.run(Console(quiet=True))
    found, expected = _record(tmp_path / "shared"), _record(tmp_path / "local")
    assert len(found["trials"]) == (6 if method == "grid" else 12)
    assert found["best"] == expected["best"]
    assert [(t["parameters"], t["value"]) for t in found["trials"]] == [
        (t["parameters"], t["value"]) for t in expected["trials"]
    ]


def _computed(command: Sequence[str], folder: Path, *_: Any) -> Outcome:
    """A trial without a process; its loss follows from its settings."""
    model = json.loads((folder / "arguments.json").read_text())["model"]
    loss = (model["rank"] or 9) + model["bias"] + model.get("width", 0) / 8
    loss += abs(model.get("rate", 0) - 1e-3)
    (folder / "config.yaml").write_text(
        json.dumps(
            {
                "model": model, "trainer": {"logger": True, "callbacks": None},
                "best_checkpoint": {}, "last_checkpoint": {},
            }
        )
    )  # fmt: skip
    return Outcome(TrialState.FINISHED, float(loss), None, 0.0)


def test_a_vanished_machine_does_not_keep_its_connection_for_hours(
    postgres: Postgres, connect: Callable[[str], Database]
) -> None:
    with connect(postgres.url)._engine.connect() as connection:
        found = connection.execute(sqlalchemy.text("SHOW tcp_keepalives_idle")).scalar()
    assert found == "15"


def test_a_server_that_refuses_is_one_line_without_the_password(
    postgres: Postgres, tmp_path: Path
) -> None:
    wrong = postgres.url.replace(PASSWORD, "wrong-word")
    with pytest.raises(RuntimeError, match="password authentication failed") as refused:
        Database(wrong)
    assert "wrong-word" not in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_an_unreachable_server_is_one_line() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(RuntimeError, match=r"postgresql://me:\*\*\*@127.0.0.1:1/x: .*refused"):
        Database("postgresql://me:word@127.0.0.1:1/x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--storage", "postgres://a:word@h/d"], "did you mean postgresql"),
        (["--storage", "word"], "--storage is not a database URL"),
        (["--storage", "sqlite:////"], "sqlite://// is a folder; write sqlite:///FILE"),
        (["--storage", "env:NOT_SET_HERE"], "that environment variable is not set"),
        (["--storge", "postgresql://a:word@h/d"], "did you mean --storage"),
        (["--study", "a"], "--study names a sweep in a database"),
        (["--storage", "sqlite:///a", "--server"], "--storage is of local sweeps"),
    ],
)
def test_a_wrong_storage_is_named_without_its_password(words: list[str], message: str) -> None:
    with pytest.raises(WrongOptions, match=message) as error:
        parse_options(["quick_rank", *words])
    assert "word@" not in str(error.value)


def test_the_url_may_be_in_an_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWEEPS", "sqlite:///a")
    assert parse_options(["quick_rank", "--storage", "env:SWEEPS"]).storage == "sqlite:///a"
