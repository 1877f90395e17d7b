import re
from pathlib import Path

import pytest

from fingpt_lightning.reporting.answers import (
    Answer,
    StoredResult,
    confusion_of,
    task_results_of_evaluation,
    task_results_of_run,
    worst,
)
from fingpt_lightning.reporting.files import read_object
from tests.reporting.folders import make_evaluation, make_run, write_run_evaluation


def _answer(row: int, gold: str | None, said: str | None, sure: float | None = None) -> Answer:
    is_right = None if gold is None else gold == said
    return Answer(row, f"text {row}", gold, said, sure, is_right)


def test_confusion_counts_known_rows_in_the_order_of_the_tasks_labels() -> None:
    answers = (
        _answer(1, "positive", "positive"),
        _answer(2, "negative", "positive"),
        _answer(3, "neutral", None),
        _answer(4, None, "positive"),
    )
    found = confusion_of(StoredResult("fpb", "", {}, answers))
    assert found is not None
    assert sorted(found.labels) == ["negative", "neutral", "positive"]
    assert found.answers == (*found.labels, "missing")
    counted = {
        (gold, said): count
        for gold, row in zip(found.labels, found.counts, strict=True)
        for said, count in zip(found.answers, row, strict=True)
        if count
    }
    assert counted == {
        ("positive", "positive"): 1,
        ("negative", "positive"): 1,
        ("neutral", "missing"): 1,
    }


def test_a_task_of_choices_has_no_confusion() -> None:
    assert confusion_of(StoredResult("piqa", "", {}, (_answer(1, "a", "b"),))) is None


def test_the_surest_mistakes_come_first() -> None:
    answers = (
        _answer(1, "a", "a", 0.99),
        _answer(2, "a", "b", 0.4),
        _answer(3, "a", "b", 0.9),
        _answer(4, None, "b", 0.95),
        _answer(5, "a", None),
    )
    assert [answer.row for answer in worst(StoredResult("t", "", {}, answers), 9)] == [3, 2, 5]
    assert [answer.row for answer in worst(StoredResult("t", "", {}, answers), 1)] == [3]


def test_the_evaluations_of_a_run_come_by_task_and_step_with_their_answers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tasks=["fpb", "tfns"])
    task_results = task_results_of_run(run)
    assert [(result.task, result.moment) for result in task_results] == [
        ("fpb", "before training"),
        ("fpb", "after step 40"),
        ("tfns", "before training"),
        ("tfns", "after step 40"),
    ]
    shares = [
        sum(not a.is_wrong for a in result.answers) / len(result.answers) for result in task_results
    ]
    assert shares[0] < 0.5 < shares[1]
    assert task_results[1].figures["accuracy"] == 0.78
    assert task_results[1].interval == (0.78 - 0.1, 0.78 + 0.1)
    assert all(0 <= (answer.confidence or -1) <= 1 for answer in task_results[1].answers)
    assert task_results_of_run(tmp_path) == []


def test_of_a_step_whose_predictions_were_dropped_the_figures_stay(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tasks=["fpb"])
    write_run_evaluation(run, 20, ["fpb"], 0.5, has_answers=False)
    moments = {result.moment: len(result.answers) for result in task_results_of_run(run)}
    assert moments == {"before training": 60, "after step 20": 0, "after step 40": 60}


def test_what_another_client_kept_is_not_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    table = run / "wandb/offline-run-1/files/media/table/eval/fpb/predictions_1_ab.table.json"
    table.parent.mkdir(parents=True)
    table.write_text("broken")
    assert task_results_of_run(run) == []


def test_an_attempt_that_was_given_up_and_a_step_that_was_not_finished_are_left_out(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    for step, minute in ((0, 0), (20, 1), (40, 2), (60, 3)):
        write_run_evaluation(run, step, ["fpb"], 0.5, started_at=f"2026-01-01T00:{minute:02}:00")
    (run / "eval" / "notes").mkdir()
    assert [result.moment for result in task_results_of_run(run)][-1] == "after step 60"
    # Resumed from step 20, it has come to step 30.
    write_run_evaluation(run, 30, ["fpb"], 0.5, started_at="2026-01-01T01:00:00")
    assert [result.moment for result in task_results_of_run(run)] == [
        *("before training", "after step 20", "after step 30")
    ]
    # The writer was killed at step 50.
    (write_run_evaluation(run, 50, ["fpb"], 0.5) / "results.json").unlink()
    assert [result.moment for result in task_results_of_run(run)][-1] == "after step 30"


@pytest.mark.parametrize(
    "broken",
    [
        "{",
        "[]",
        '{"tasks": {}}',
        '{"tasks": [], "started_at": "2026"}',
        '{"tasks": {"fpb": {"main_metric": "mcc"}}, "started_at": "2026"}',
    ],
)
def test_results_that_are_none_are_named(broken: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tasks=["fpb"])
    path = run / "eval" / "40" / "results.json"
    path.write_text(broken)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is not the results of an eval"):
        task_results_of_run(run)


def test_an_evaluation_gives_figures_interval_and_answers(tmp_path: Path) -> None:
    folder = make_evaluation(tmp_path / "base")
    (result,) = task_results_of_evaluation(folder, read_object(folder / "results.json"))
    assert result.interval is not None
    assert result.interval[0] < result.figures["accuracy"] < result.interval[1]
    assert len(result.answers) == 60
