from pathlib import Path

import pytest

from fingpt_lightning.reporting.answers import (
    Answer,
    Exam,
    confusion_of,
    exams_of_evaluation,
    exams_of_run,
    worst,
)
from fingpt_lightning.reporting.files import read_metrics, read_object
from tests.reporting.folders import make_evaluation, make_run


def _answer(row: int, gold: str | None, said: str | None, sure: float | None = None) -> Answer:
    return Answer(row, f"text {row}", gold, said, sure)


def test_confusion_counts_known_rows_in_the_order_of_the_tasks_labels() -> None:
    answers = (
        _answer(1, "positive", "positive"),
        _answer(2, "negative", "positive"),
        _answer(3, "neutral", None),
        _answer(4, None, "positive"),
    )
    found = confusion_of(Exam("fpb", "", {}, answers))
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
    assert confusion_of(Exam("piqa", "", {}, (_answer(1, "a", "b"),))) is None


def test_the_surest_mistakes_come_first() -> None:
    answers = (
        _answer(1, "a", "a", 0.99),
        _answer(2, "a", "b", 0.4),
        _answer(3, "a", "b", 0.9),
        _answer(4, None, "b", 0.95),
        _answer(5, "a", None),
    )
    assert [answer.row for answer in worst(Exam("t", "", {}, answers), 9)] == [3, 2, 5]
    assert [answer.row for answer in worst(Exam("t", "", {}, answers), 1)] == [3]


def test_a_runs_tables_belong_to_the_moments_in_order(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tasks=["fpb", "tfns"])
    exams = exams_of_run(run, read_metrics(run / "metrics.csv"))
    assert [(exam.task, exam.moment) for exam in exams] == [
        ("fpb", "before training"),
        ("fpb", "after step 40"),
        ("tfns", "before training"),
        ("tfns", "after step 40"),
    ]
    shares = [sum(not a.is_wrong for a in exam.answers) / len(exam.answers) for exam in exams]
    assert shares[0] < 0.5 < shares[1]
    assert exams[1].answers[0].confidence == pytest.approx(
        exams_of_run(run, read_metrics(run / "metrics.csv"))[1].answers[0].confidence
    )
    assert all(0 <= (answer.confidence or -1) <= 1 for answer in exams[1].answers)


def test_where_a_table_is_missing_the_last_one_belongs_to_the_last_figures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tasks=["fpb"])
    first = min(run.rglob("predictions_*.table.json"), key=lambda path: len(path.name))
    first.unlink()
    before, after = exams_of_run(run, read_metrics(run / "metrics.csv"))
    assert before.answers == ()
    assert len(after.answers) == 60


def test_a_table_that_is_none_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tasks=["fpb"])
    for path in run.rglob("predictions_*.table.json"):
        path.write_text('{"columns": ["row"], "data": [[1, 2]]}')
    with pytest.raises(ValueError, match=r"predictions_\d+_\w+\.table\.json is no table"):
        exams_of_run(run, read_metrics(run / "metrics.csv"))


def test_an_evaluation_gives_figures_interval_and_answers(tmp_path: Path) -> None:
    folder = make_evaluation(tmp_path / "base")
    (exam,) = exams_of_evaluation(folder, read_object(folder / "results.json"))
    assert exam.interval is not None
    assert exam.interval[0] < exam.figures["accuracy"] < exam.interval[1]
    assert len(exam.answers) == 60
