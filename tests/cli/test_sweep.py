"""What is wrong with a sweep is one line before anything runs."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

# Lightning sets an environment variable when it is imported: not in a test.
import fingpt_lightning.cli.sweep
from fingpt_lightning.cli.main import main
from fingpt_lightning.sweeping.database import STALE_S
from fingpt_lightning.sweeping.options import parse_options
from tests.sweeping.test_local_sweep import COMMAND

CONFIG = Path(__file__).parents[2] / "configs" / "debug_quickstart.yaml"


def _sweep(settings: dict[str, Any], metric: str = "val/loss") -> str:
    command = ["${env}", "${interpreter}", "-m", "fingpt_lightning", "fit", "--config"]
    content = {
        "method": "grid",
        "metric": {"name": metric, "goal": "minimize"},
        "parameters": {"model": {"parameters": {"init_args": {"parameters": settings}}}},
        "command": [*command, str(CONFIG), "--config", "${args_json_file}"],
    }
    return yaml.safe_dump(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_sweep({"rnk": {"values": [1, 2]}}), "model has no setting 'rnk'; did you mean rank?"),
        (_sweep({"rank": {"values": [4, 99]}}), "rank 99 is outside [1, 32]"),
        (_sweep({"rank": {"values": [4]}}, "val/los"), "'val/los' is logged by no module or"),
        (_sweep({"rank": {"values": []}}), "parameter model.init_args.rank: values is empty"),
        (_sweep({}), "parameters is empty"),
        ("a: [1,", "mine.yaml line 1 is not YAML"),
        (
            _sweep({"rank": {"values": [4]}}).replace("goal:", "impute: worst\n  goal:"),
            "mine.yaml: metric.impute is honored by W&B's server alone; remove it or run with",
        ),
    ],
    ids=["name", "value", "metric", "empty_values", "empty_grid", "no_yaml", "server_alone"],
)
def test_a_wrong_sweep_ends_before_anything_runs(
    text: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "mine.yaml", "--local"])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"], "no folder was made"


@pytest.mark.parametrize("words", [("sweep", "--resume", "empty"), ("report", "empty")])
def test_a_folder_that_is_no_sweep_or_run_is_said_to_be_none(
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "fingpt: error: empty is not a " in error


def test_a_wrong_sweep_leaves_no_study_to_other_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(_sweep({"rank": {"values": [4, 99]}}))
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "mine.yaml", "--storage", "sqlite:///study.sqlite"])
    assert ended.value.code == 2
    assert "rank 99 is outside [1, 32]" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_shared_sweep_names_its_best_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fingpt_lightning.sweeping.sweep_file._PROGRAM", "fake_fit")
    monkeypatch.setattr(fingpt_lightning.cli.sweep, "check_sweep", lambda *_: None)
    content = {
        "method": "grid",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": {"model": {"parameters": {"rank": {"values": [2, 1]}}}},
        "command": COMMAND,
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(content))
    words = ["tiny.yaml", "--storage", "sqlite:///study.sqlite"]
    fingpt_lightning.cli.sweep.run(parse_options(words), lambda *_: None)
    printed = capsys.readouterr().out
    assert "study 'tiny' in sqlite:///study.sqlite\n" in printed
    assert "best: fingpt fit --config runs/sweeps/tiny/best.yaml\n" in printed
    # A worker with a folder of its own, which joins at the end, has only the values.
    words += ["--output", "other"]
    fingpt_lightning.cli.sweep.run(parse_options(words), lambda *_: None)
    folder = tmp_path / "runs/sweeps/tiny"
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("best: trial 1 by process ") and line.endswith(f" in {folder}")
        for line in lines
    )


def test_an_interrupted_worker_gives_its_trial_back_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fingpt_lightning.sweeping.sweep_file._PROGRAM", "fake_fit")
    monkeypatch.setattr(fingpt_lightning.cli.sweep, "check_sweep", lambda *_: None)
    model = {"rank": {"values": [2, 1]}, "waits_at": {"value": 2}}
    content = {
        "method": "grid",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": {"model": {"parameters": model}},
        "command": COMMAND,
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(content))
    words = ["tiny.yaml", "--storage", "sqlite:///study.sqlite", "--output", "out"]

    def interrupt() -> None:
        deadline_s = time.monotonic() + 60
        while not Path("out/trials/000/metrics.csv").exists() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    # A shell's background job ignores interrupts, and so would this.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(SystemExit) as ended:
            main(["sweep", *words])
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["fingpt: error: interrupted"]
    line = "another worker goes on with its trial; the same command joins again"
    assert captured.out.splitlines()[-1] == line
    # Long before its heartbeats would be missed.
    Path("out/go").touch()
    began_s = time.monotonic()
    fingpt_lightning.cli.sweep.run(parse_options(words), lambda *_: None)
    assert time.monotonic() - began_s < STALE_S / 2
    trials = json.loads(Path("out/sweep.json").read_text())["trials"]
    assert [(trial["value"], trial["run_folder"]) for trial in trials] == [
        (2.0, "trials/000-2"),
        (1.0, "trials/001"),
    ]


@pytest.mark.parametrize(
    ("is_installed", "message"),
    [
        (True, r"postgresql://me:\*\*\*@127\.0\.0\.1:1/x: .*refused"),
        (False, r"PostgreSQL needs psycopg: pip install 'fingpt-lightning\[postgres\]'"),
    ],
)
def test_a_database_out_of_reach_is_one_line(
    is_installed: bool,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if is_installed:
        pytest.importorskip("psycopg")
    else:
        monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fingpt_lightning.cli.sweep, "check_sweep", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "quick_rank", "--storage", "postgresql://me:word@127.0.0.1:1/x"])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert len(error.splitlines()) == 1
    assert ":word" not in error
    assert not any(tmp_path.iterdir())
