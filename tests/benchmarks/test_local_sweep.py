import json
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import local_sweep
from tests.sweeping.test_local_sweep import COMMAND, OWN_PROGRAM, ROOT

# `fingpt sweep` of a program that only pretends to train, with a report of one line.
_PROGRAM = (
    OWN_PROGRAM
    + """
import sys
from pathlib import Path
from fingpt_lightning.sweeping.local_sweep import LocalSweep
from fingpt_lightning.sweeping.sweep_file import read_sweep
from rich.console import Console
words = sys.argv[1:]
folder = Path(words[-1])
if "--resume" not in words:
    LocalSweep.begin(read_sweep(Path(words[0])), folder, int(words[3]), None)
local = LocalSweep(folder)
local.run(Console(quiet=True))
(folder / "report.html").write_text("done")
"""
)


@pytest.mark.slow
def test_a_sweep_killed_by_each_signal_repeats_no_finished_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"rank": {"values": [3, 1, 2]}, "steps": {"value": 2}, "step_time_s": {"value": 0.4}}
    sweep = {
        "method": "grid",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": {"model": {"parameters": model}},
        "command": COMMAND,
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(sweep))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(local_sweep, "PROGRAM", [sys.executable, "-c", _PROGRAM])
    words = ["--sweep", str(tmp_path / "tiny.yaml"), "--count", "3"]
    words += ["--output", str(tmp_path / "out"), "--json", str(tmp_path / "record.json")]
    local_sweep.main(words)
    record = json.loads((tmp_path / "record.json").read_text())
    found = record["summary"]
    assert found.pop("sweep_seconds") == record["rows"][0]["seconds"] > 2.4
    assert found == {
        "finished_trials": 3,
        "finished_trials_after_kill": 3,
        "repeated_trials_after_kill": 0,
        "largest_value_difference": 0.0,
    }
    assert [row["values"] for row in record["rows"]] == [[3.0, 1.0, 2.0]] * 2
    assert "| killed twice, resumed |" in (tmp_path / "record.md").read_text()


def test_a_trial_that_was_started_again_is_counted() -> None:
    before = {0: 10, 1: 11, local_sweep.KILLED_TRIAL: 12}
    after = {0: 10, 1: 20, local_sweep.KILLED_TRIAL: 21, 3: 22}
    assert local_sweep._num_repeated(before, after) == 1
    assert local_sweep._num_repeated(before, {**after, 1: 11}) == 0
