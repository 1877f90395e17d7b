import json
from pathlib import Path

import pytest

from fingpt_lightning.metric_keys import THROUGHPUT_TRAINING_TIME_S as TIME_S
from fingpt_lightning.metric_keys import TRAIN_TOKENS as TOKENS
from fingpt_lightning.reporting.runs import (
    Run,
    Sweep,
    differing,
    read_folder,
    read_run,
)
from tests.reporting.folders import make_run, make_sweep, write_metrics, write_trace


def test_a_curve_keeps_its_place_until_the_axis_is_logged_again(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "val/loss": 9.0},
        {"step": 1, "train/tokens": 10.0},
        {"step": 2, "val/loss": 8.0},
        {"step": 3, "val/loss": float("nan")},
        {"step": 4, "train/tokens": 20.0, "val/loss": 7.0},
    ]
    write_metrics(tmp_path / "metrics.csv", rows)
    run = read_run(tmp_path)
    assert run.curve("val/loss", TOKENS) == [(10.0, 8.0), (20.0, 7.0)]
    assert run.values("val/loss") == [9.0, 8.0, 7.0]
    assert not run.is_finished


def test_a_run_that_was_resumed_in_its_folder_is_one_course(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 8, is_finished=False)
    whole = read_run(run)
    rows = [row for row in whole.rows if "train/loss" in row]
    # Stopped after step 5, gone on with from a checkpoint of step 3.
    write_metrics(run / "metrics-1.csv", rows[:6])
    resumed = [row | {TIME_S: row[TIME_S] - rows[3][TIME_S]} for row in rows[4:]]
    write_metrics(run / "metrics.csv", resumed)
    joined = read_run(run)
    assert joined.num_steps == 8
    for key in ("train/loss", TOKENS, TIME_S):
        assert joined.values(key) == pytest.approx(whole.values(key))


def test_steps_are_those_of_the_summary_where_it_is_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 9)
    assert read_run(run).num_steps == 9
    write_metrics(run / "metrics.csv", [{"step": 4, "train/loss": 3.0}])
    assert read_run(run).num_steps == 9


def test_a_recorded_step_is_read_back(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 4)
    write_trace(run, step=3)
    (recorded,) = read_run(run).steps
    assert recorded.step == 3
    assert len(recorded.passes) == 16
    assert recorded.passes[0].end_s - recorded.passes[0].start_s == pytest.approx(0.09)


def test_settings_that_say_where_a_run_lies_do_not_differ(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / name, 4, rank=len(name))) for name in ("a", "bb")]
    assert differing(runs) == ["model.init_args.rank"]


def test_only_trials_that_came_to_their_end_are_ranked(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "sweep")
    # Nor one that was pruned, however well it stood then.
    record = json.loads((folder / "sweep.json").read_text())
    record["trials"][4] |= {"state": "pruned", "value": 0.1}
    (folder / "sweep.json").write_text(json.dumps(record))
    sweep = read_folder(folder)
    assert isinstance(sweep, Sweep)
    assert [trial.number for trial in sweep.ranked()] == [2, 1, 0, 3]
    assert sweep.trials[-1].error is not None
    assert isinstance(sweep.trials[-1].run, Run)
    assert not sweep.trials[-1].run.is_finished
