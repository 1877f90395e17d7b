import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks import evaluation


def _run(monkeypatch: pytest.MonkeyPatch, path: Path) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["evaluation", "--toy", "--json", str(path)])
    evaluation.main()
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def test_our_side_runs_at_toy_size_without_the_harness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation, "find_spec", lambda _: None)
    record = _run(monkeypatch, tmp_path / "record.json")
    assert [(row["contender"], row["task"]) for row in record["rows"]] == [
        ("fingpt", "fpb"), ("fingpt", "nwgi7"),
    ]  # fmt: skip
    assert set(record["summary"].values()) == {None}
    assert "not installed" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")
@pytest.mark.filterwarnings("ignore")
def test_both_sides_run_at_toy_size_and_answer_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_XET_HIGH_PERFORMANCE", "1")  # else lm_eval leaves it behind
    record = _run(monkeypatch, tmp_path / "record.json")
    assert [row["contender"] for row in record["rows"]] == [evaluation.THEIRS, evaluation.OURS] * 2
    summary = record["summary"]
    assert summary["share_identical_predictions"] == 1.0
    assert summary["prompts_per_s_ratio_nwgi7"] > 0
    assert "| fpb: fingpt |" in (tmp_path / "record.md").read_text()


def test_the_summary_takes_the_lower_share_of_equal_answers() -> None:
    rows = [
        {
            "contender": who,
            "task": task,
            "ratio_to_harness": ratio,
            "share_identical_predictions": s,
        }
        for who, task, ratio, s in (
            (evaluation.THEIRS, "fpb", 1.0, 1.0),
            (evaluation.OURS, "fpb", 2.0, 1.0),
            (evaluation.THEIRS, "nwgi7", 1.0, 1.0),
            (evaluation.OURS, "nwgi7", 6.0, 0.98),
        )
    ]
    assert evaluation.summary(rows) == {
        "prompts_per_s_ratio_one_token_labels": 2.0,
        "prompts_per_s_ratio_nwgi7": 6.0,
        "share_identical_predictions": 0.98,
    }
