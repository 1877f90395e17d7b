import json
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import shared_sweep
from benchmarks.postgres import find_programs
from tests.sweeping.test_local_sweep import COMMAND, OWN_PROGRAM, ROOT

# `fingpt sweep --storage` of a program that only pretends to train.
_PROGRAM = (
    OWN_PROGRAM
    + """
import os
import sys
from pathlib import Path
from rich.console import Console
from fingpt_lightning.sweeping import database, shared_sweep
from fingpt_lightning.sweeping.sweep_file import read_sweep
database.HEARTBEAT_S, database.STALE_S, shared_sweep._WAIT_S = 1, 2, 0.1
sweep, _, storage, _, study, _, folder = sys.argv[1:]
url = os.environ[storage.removeprefix("env:")]
shared_sweep.SharedSweep(
    read_sweep(Path(sweep)), database.Database(url), study, Path(folder), None, None
).run(Console(width=200))
"""
)


@pytest.mark.slow
def test_a_killed_worker_loses_and_doubles_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_programs() is None:
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    pytest.importorskip("psycopg")
    model = {
        "rank": {"values": [4, 3, 2, 1]}, "steps": {"value": 2}, "step_time_s": {"value": 0.6},
    }  # fmt: skip
    sweep = {
        "method": "grid",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": {"model": {"parameters": model}},
        "command": COMMAND,
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(sweep))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("fingpt_lightning.sweeping.sweep_file._PROGRAM", "fake_fit")
    monkeypatch.setattr(shared_sweep, "PROGRAM", [sys.executable, "-c", _PROGRAM])
    words = ["--sweep", str(tmp_path / "tiny.yaml"), "--workers", "2"]
    words += ["--output", str(tmp_path / "out"), "--json", str(tmp_path / "record.json")]
    shared_sweep.main(words)
    record = json.loads((tmp_path / "record.json").read_text())
    found = record["summary"]
    assert 1 < found.pop("takeover_s") < found.pop("sweep_seconds")
    assert found.pop("median_trial_seconds") >= 1.2
    killed = found.pop("killed_trial")
    assert found == {
        "trials": 4,
        "different_settings": 4,
        "finished": 4,
        "finished_in_sweep_json": 4,
        "lost": 0,
        "doubled": 0,
        "starts_of_the_killed_trial": 2,
        "starts_of_all_others": 3,
        "run_folders_without_a_trial": 0,
        "password_printed": False,
    }
    rows = record["rows"]
    assert sorted(number for row in rows for number in row["trials"]) == [0, 1, 2, 3]
    assert killed in rows[1]["trials"]
    assert "| worker 1, killed |" in (tmp_path / "record.md").read_text()
