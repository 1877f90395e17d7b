"""Real processes, but of a program that only pretends to train (``fake_fit``)."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from fingpt_lightning.sweeping.local_sweep import LocalSweep
from fingpt_lightning.sweeping.records import table
from fingpt_lightning.sweeping.sweep_file import Sweep, WrongSweep, read_sweep
from fingpt_lightning.sweeping.sweep_runner import num_trials

FAKE = Path(__file__).parent / "fake_fit.py"
ROOT = Path(__file__).parents[2]
COMMAND = ["${env}", "${interpreter}", str(FAKE), "fit", "--config", "${args_json_file}"]
# A sweep in a process of its own, to be killed.
RUN = """
import signal
import sys
from pathlib import Path
from rich.console import Console
from fingpt_lightning.sweeping.local_sweep import LocalSweep
# A shell's background job ignores interrupts, and so would this.
signal.signal(signal.SIGINT, signal.default_int_handler)
LocalSweep(Path(sys.argv[1])).run(Console())
"""


@pytest.fixture(autouse=True)
def _fingpt_in_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    # The folder of this checkout need not be called after the project.
    monkeypatch.setattr("fingpt_lightning.sweeping.sweep_file._PROGRAM", "fake_fit")


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


def _run(local: LocalSweep) -> tuple[int | None, dict[str, Any]]:
    best = local.run(Console(quiet=True))
    return best, _record(local.folder)


def _record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return found


def _starts(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("trials/*/started.txt"))]


def test_a_grid_runs_in_order_and_leaves_what_a_report_reads(tmp_path: Path) -> None:
    model: dict[str, Any] = {"rank": {"values": [3, 1, 2]}, "kind": {"value": "a"}}
    local = LocalSweep.begin(_sweep(tmp_path, model), tmp_path / "out", None, None)
    best, record = _run(local)
    assert best == record["best"] == 1
    assert [trial["value"] for trial in record["trials"]] == [3, 1, 2]
    assert record["trials"][1] == {
        "number": 1,
        "state": "finished",
        "value": 1.0,
        "parameters": {"model.rank": 1},
        "run_folder": "trials/001",
        "error": None,
        "seconds": record["trials"][1]["seconds"],
    }
    assert {key: record[key] for key in ("name", "sweep_file", "metric", "method")} == {
        "name": "tiny",
        "sweep_file": str(tmp_path / "tiny.yaml"),
        "metric": {"name": "val/loss", "goal": "minimize"},
        "method": "grid",
    }
    arguments = json.loads((tmp_path / "out/trials/001/arguments.json").read_text())
    assert arguments == {"model": {"rank": 1, "kind": "a"}}
    settings = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())
    assert settings["model"]["rank"] == 1
    assert settings["trainer"]["default_root_dir"] is None
    assert settings["best_checkpoint"]["dirpath"] is None
    assert (tmp_path / "out" / "sweep.yaml").read_text() == (tmp_path / "tiny.yaml").read_text()


@pytest.mark.parametrize(
    ("target", "goal", "ranks"),
    [(2, "minimize", [4, 2]), (4, "maximize", [4]), (0, "minimize", [4, 2, 1])],
)
def test_no_trial_is_started_once_the_target_is_reached(
    target: int, goal: str, ranks: list[int], tmp_path: Path
) -> None:
    metric = {"name": "val/loss", "goal": goal, "target": target}
    sweep = _sweep(tmp_path, {"rank": {"values": [4, 2, 1]}}, metric=metric)
    local = LocalSweep.begin(sweep, tmp_path / "out", None, None)
    best, record = _run(local)
    assert [trial["value"] for trial in record["trials"]] == ranks
    assert record["metric"] == metric
    assert best == len(ranks) - 1
    # Resumed, it starts none either.
    before = _starts(tmp_path / "out")
    _run(LocalSweep(tmp_path / "out"))
    assert _starts(tmp_path / "out") == before


def test_a_failed_trial_keeps_its_line_and_the_sweep_goes_on(tmp_path: Path) -> None:
    model = {"rank": {"values": [1, 2]}, "fails_at": {"value": 1}}
    sweep = _sweep(tmp_path, model, metric={"name": "val/loss", "goal": "maximize"})
    local = LocalSweep.begin(sweep, tmp_path / "out", None, None)
    best, record = _run(local)
    assert best == 1
    assert [(t["state"], t["error"], t["value"]) for t in record["trials"]] == [
        ("failed", "(rank 1): it diverged", None),
        ("finished", None, 2.0),
    ]
    rows = [str(cell) for cell in table(sweep, local.study).columns[-1].cells]
    assert rows == ["best", "(rank 1): it diverged"]


def test_a_metric_that_was_not_logged_fails_the_trial_and_no_best_is_left(tmp_path: Path) -> None:
    sweep = _sweep(tmp_path, {"rank": {"value": 1}}, metric={"name": "val/perplexity"})
    best, record = _run(LocalSweep.begin(sweep, tmp_path / "out", None, None))
    assert best is None
    assert record["trials"][0]["error"] == "val/perplexity was not logged"
    assert not (tmp_path / "out" / "best.yaml").exists()


def test_random_and_bayes_need_a_number_and_repeat_themselves(tmp_path: Path) -> None:
    model = {"rank": {"min": 0.5, "max": 9.5}}
    sweep = _sweep(tmp_path, model, method="random")
    with pytest.raises(ValueError, match="method random has no end; give --count or run_cap"):
        LocalSweep.begin(sweep, tmp_path / "out", None, None)
    found = []
    for name in ("one", "two"):
        local = LocalSweep.begin(sweep, tmp_path / name, 2, None)
        found.append([trial["value"] for trial in _run(local)[1]["trials"]])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]
    # One more, by a sweep that was begun with two: the first two are not run again.
    before = _starts(tmp_path / "two")
    again = LocalSweep(tmp_path / "two")
    again.extend(3)
    record = _run(again)[1]
    assert [trial["value"] for trial in record["trials"]][:2] == found[1]
    assert len(record["trials"]) == 3
    assert _starts(tmp_path / "two")[:2] == before
    assert num_trials(sweep._replace(num_trials=5), 9) == 5


def _killed(folder: Path, trial: int, end: Callable[[subprocess.Popen[bytes]], None]) -> None:
    """Runs a sweep in a process, which is ended as soon as a trial has begun."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWN_PROGRAM + RUN, str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not (folder / f"trials/{trial:03d}/metrics.csv").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        end(process)
        process.wait(60)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


OWN_PROGRAM = "import fingpt_lightning.sweeping.sweep_file as f\nf._PROGRAM = 'fake_fit'\n"


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_a_stopped_sweep_repeats_no_finished_trial(tmp_path: Path, signum: signal.Signals) -> None:
    model = {"rank": {"values": [4, 3, 2, 1]}, "steps": {"value": 3}, "waits_at": {"value": 2}}
    folder = tmp_path / "out"
    LocalSweep.begin(_sweep(tmp_path, model), folder, None, None)
    _killed(folder, 2, lambda process: process.send_signal(signum))
    assert [trial["state"] for trial in _record(folder)["trials"]] == [
        "finished", "finished", "running",
    ]  # fmt: skip
    before = _starts(folder)
    (folder / "go").touch()
    best, record = _run(LocalSweep(folder))
    after = _starts(folder)
    assert best == 3
    assert [(trial["state"], trial["value"]) for trial in record["trials"]] == [
        ("finished", float(rank)) for rank in (4, 3, 2, 1)
    ]
    assert after[:2] == before[:2]
    assert after[2] != before[2]


def test_a_weak_trial_is_stopped_early(tmp_path: Path) -> None:
    model = {
        "rank": {"values": [1, 50]}, "steps": {"value": 8}, "step_time_s": {"value": 0.4},
    }  # fmt: skip
    stopping = {"type": "hyperband", "max_iter": 8, "s": 3, "eta": 2}
    sweep = _sweep(tmp_path, model, early_terminate=stopping)
    local = LocalSweep.begin(sweep, tmp_path / "out", None, None)
    # All trials are of one bracket, the one that looks at them most often.
    local.study.pruner._get_bracket_id = lambda *_: 0  # type: ignore[attr-defined]
    best, record = _run(local)
    assert best == 0
    assert [trial["state"] for trial in record["trials"]] == ["finished", "pruned"]
    assert record["trials"][1]["value"] > 50
    assert record["trials"][1]["error"] is None


def test_a_folder_that_is_no_sweep_or_in_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a sweep: it has no study\.sqlite"):
        LocalSweep(tmp_path)
    sweep = _sweep(tmp_path, {"rank": {"value": 1}})
    with pytest.raises(ValueError, match="is not empty; --resume goes on"):
        LocalSweep.begin(sweep, tmp_path, None, None)


def test_a_sweep_killed_while_its_folder_is_made_can_be_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = _sweep(tmp_path, {"rank": {"value": 1}})
    create, folder = LocalSweep._create, tmp_path / "out"

    def killed(*given: Any) -> None:
        create(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalSweep, "_create", killed)
    with pytest.raises(KeyboardInterrupt):
        LocalSweep.begin(sweep, folder, None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
    monkeypatch.setattr(LocalSweep, "_create", create)
    folder.mkdir()
    assert LocalSweep.begin(sweep, folder, None, None).count == 1


def test_two_processes_do_not_run_one_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = _sweep(tmp_path, {"rank": {"value": 1}})
    local = LocalSweep.begin(sweep, tmp_path / "out", None, None)
    monkeypatch.setattr("fingpt_lightning.sweeping.local_sweep._LOCK_PATIENCE_S", 0.3)
    holder = subprocess.Popen(
        ["flock", "--exclusive", str(tmp_path / "out" / "sweep.lock"), "sleep", "30"],
        start_new_session=True,
    )
    try:
        time.sleep(0.5)
        with pytest.raises(RuntimeError, match=r"out is in use by .*sweep\.lock"):
            _run(local)
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()


def test_a_copied_sweep_file_that_was_broken_is_named(tmp_path: Path) -> None:
    LocalSweep.begin(_sweep(tmp_path, {"rank": {"value": 1}}), tmp_path / "out", None, None)
    (tmp_path / "out" / "sweep.yaml").write_text("a: 1")
    with pytest.raises(WrongSweep, match=r"sweep\.yaml: no sweep file"):
        LocalSweep(tmp_path / "out")
