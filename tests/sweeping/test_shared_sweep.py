"""Several workers on one sweep, over a real PostgreSQL where there is one, and over SQLite."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from benchmarks.postgres import PASSWORD, find_programs, running_postgres
from fingpt_lightning.sweeping import database as databases
from fingpt_lightning.sweeping.database import Database
from fingpt_lightning.sweeping.options import parse_options
from fingpt_lightning.sweeping.shared_sweep import SharedSweep
from fingpt_lightning.sweeping.sweep_file import Sweep, read_sweep
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
def postgres_url() -> Iterator[str]:
    if (programs := find_programs()) is None:
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    pytest.importorskip("psycopg")
    # Not below tmp_path, which another user may not enter.
    with (
        tempfile.TemporaryDirectory() as folder,
        running_postgres(programs, Path(folder)) as url,
    ):
        yield url


def _sweep(folder: Path, model: dict[str, Any]) -> Sweep:
    content = {
        "method": "grid",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": {"model": {"parameters": model}},
        "command": COMMAND,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return read_sweep(path)


def _record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return found


@pytest.mark.slow
def test_a_killed_workers_trial_is_run_by_another_and_none_twice(
    postgres_url: str, tmp_path: Path
) -> None:
    model = {"rank": {"values": [8, 7, 6, 5, 4, 3, 2, 1]}, "waits_at": {"value": 8}}
    sweep, folder = _sweep(tmp_path, model), tmp_path / "out"
    words = [sys.executable, "-c", WORKER, postgres_url, str(sweep.path), str(folder)]
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


def _wait_for(path: Path, worker: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert worker.poll() is None
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


def test_a_server_that_refuses_is_one_line_without_the_password(
    postgres_url: str, tmp_path: Path
) -> None:
    wrong = postgres_url.replace(PASSWORD, "wrong-word")
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
        (["--storage", "word"], "--storage is no database URL"),
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
