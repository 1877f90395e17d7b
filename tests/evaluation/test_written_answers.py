import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torchmetrics.functional import (
    mean_absolute_error,
    mean_squared_error,
    pearson_corrcoef,
)

from fingpt_lightning.evaluation import written_answers
from fingpt_lightning.evaluation.written_answers import check_readable, row_fields, written_metrics
from fingpt_lightning.tasks import Task, find_task
from tests.tasks.sample_rows import only_example

OWN: dict[str, dict[str, Any]] = {
    "numeric": {
        "main_metric": "exact_match",
        "template": "{text}\nQuestion: {question}\nAnswer:",
        "numbers": {"rule": "tatqa", "tolerance": 0.05},
        "shapes": [
            {
                "lists": {"table": "table"},
                "fields": {
                    "text": "table", "question": "question", "answer": "answer", "scale": "scale",
                    "type": "answer_type",
                },
            }
        ],
    },
    "spans": {
        "main_metric": "entity_f1",
        "labels": ["person", "organization"],
        "shapes": [
            {
                "entities": {
                    "tokens": "tokens",
                    "tags": "tags",
                    "types": {
                        "O": None, "I-PER": "person", "I-ORG": "organization", "I-MISC": None,
                    },
                }
            },
            {"fields": {"text": "text", "answer": "answer"}},
        ],
    },
    "summary": {
        "main_metric": "rouge_l",
        "max_new_tokens": 9,
        "shapes": [{"fields": {"text": "text", "answer": "summary"}}],
    },
    "regression": {
        "main_metric": "pearson",
        "shapes": [{"fields": {"text": "text", "answer": "score"}}],
    },
}  # fmt: skip
"""A task of each kind whose answers are written."""


def own_task(kind: str, folder: Path, **changes: Any) -> Path:
    """Writes the task of a kind; gives its file."""
    folder.mkdir(exist_ok=True)
    path = folder / f"own_{kind}.yaml"
    head = {"version": 1, "title": "Ours", "source": "our desk", "license": "private"}
    path.write_text(yaml.safe_dump({**head, "kind": kind, **OWN[kind], **changes}))
    return path


@pytest.fixture
def task(tmp_path: Path, request: pytest.FixtureRequest) -> Task:
    return find_task(own_task(request.param, tmp_path))


def _number_row(answer: object, scale: str = "", kind: str = "span") -> dict[str, object]:
    table = [["", "2019"], ["Profit", 3]]
    return {
        "table": table, "question": "How much?", "answer": answer, "scale": scale,
        "answer_type": kind,
    }  # fmt: skip


@pytest.mark.parametrize("task", ["numeric"], indirect=True)
def test_numbers_have_figures_by_type_and_missing_answers_count(task: Task) -> None:
    rows = [
        (_number_row(12.5, "million", "arithmetic"), " 12.5 million"),
        (_number_row(12.5, "million", "arithmetic"), " 12.4 million"),
        (_number_row(2, "", "count"), " many"),
        (_number_row(["2019", "2018"], "", "multi-span"), " 2019"),
    ]
    fields = [row_fields(task, only_example(task, row), answer) for row, answer in rows]
    assert [row["is_right"] for row in fields] == [True, False, False, False]
    assert [row["prediction"] for row in fields] == ["12.5 million", "12.4 million", None, "2019"]
    assert fields[3]["gold"] == "2019; 2018"
    found = written_metrics(task, fields)
    assert found["exact_match"] == 0.25
    assert found["close_match"] == 0.5
    assert found["f1"] == pytest.approx((1 + 0 + 0 + 0.67) / 4)
    assert (found["missing"], found["n"]) == (0.25, 4)
    low, high = found["exact_match_interval"]
    assert 0 <= low <= 0.25 <= high <= 1
    assert found["by_type"]["arithmetic"] == {
        "exact_match": 0.5, "f1": 0.5, "close_match": 1.0, "n": 2,
    }  # fmt: skip
    assert list(found["by_type"]) == ["arithmetic", "count", "multi-span"]


@pytest.mark.parametrize("task", ["spans"], indirect=True)
def test_spans_have_entity_figures_over_all_rows(task: Task) -> None:
    row = {"tokens": ["Ann", "of", "Foo", "Inc", "GAAP"], "tags": ["I-PER", "O", "I-ORG", "I-ORG"]}
    row["tags"].append("I-MISC")
    example = only_example(task, row)
    assert example.choices == (" Ann, person; Foo Inc, organization",)
    none = only_example(task, {"text": "Nobody pays", "answer": []})
    assert none.choices == (" none",)
    answers = [
        (example, " Ann, person; Foo, organization"), (none, " none"), (none, " Bob, person"),
        (example, ""),
    ]  # fmt: skip
    fields = [row_fields(task, one, answer) for one, answer in answers]
    assert [row["counts"] for row in fields] == [[1, 2, 2], [0, 0, 0], [0, 1, 0], [0, 0, 2]]
    found = written_metrics(task, fields)
    assert found["entity_precision"] == pytest.approx(1 / 3)
    assert found["entity_recall"] == pytest.approx(1 / 4)
    assert found["entity_f1"] == pytest.approx(2 / 7)
    assert found["exact_match"] == found["missing"] == 0.25
    assert found["token_f1"] == pytest.approx((2 * 2 / 5 + 1 + 0 + 0) / 4)
    assert found["by_type"]["person"]["entity_f1"] == pytest.approx(2 / 4)
    assert found["by_type"]["organization"]["n"] == 2


@pytest.mark.parametrize("task", ["regression"], indirect=True)
def test_scores_have_the_figures_of_torchmetrics(task: Task) -> None:
    gold = [-0.5, 0.25, 0.9, 0.1, -0.2]
    said = [-0.25, 0.5, 0.75, -0.1, 0.3]
    fields = [
        row_fields(task, only_example(task, {"text": "Foo", "score": right}), f" {answer}\n")
        for right, answer in zip(gold, said, strict=True)
    ]
    found = written_metrics(task, fields)
    x, y = torch.tensor(gold, dtype=torch.float64), torch.tensor(said, dtype=torch.float64)
    assert found["pearson"] == pytest.approx(float(pearson_corrcoef(y, x)))
    assert found["rmse"] == pytest.approx(math.sqrt(mean_squared_error(y, x)))
    assert found["mae"] == pytest.approx(float(mean_absolute_error(y, x)))
    assert found["missing"] == 0
    low, high = found["pearson_interval"]
    assert -1 <= low <= found["pearson"] <= high <= 1


@pytest.mark.parametrize("task", ["regression"], indirect=True)
def test_a_missing_score_counts_as_the_far_end_and_constant_ones_have_no_correlation(
    task: Task,
) -> None:
    def figures(answers: list[str]) -> dict[str, Any]:
        rows = [{"text": "Foo", "score": right} for right in (-0.5, 0.0, 1.0)]
        return written_metrics(
            task,
            [
                row_fields(task, only_example(task, row), answer)
                for row, answer in zip(rows, answers, strict=True)
            ],
        )

    found = figures(["-0.5", "0", "unclear"])
    assert found["missing"] == pytest.approx(1 / 3)
    assert found["mae"] == pytest.approx(1.5 / 3)
    assert found == figures(["-0.5", "0", "-0.5"]) | {"missing": found["missing"]}
    assert figures(["0.1"] * 3)["pearson"] == 0


@pytest.mark.parametrize("task", ["summary"], indirect=True)
def test_summaries_have_rouge_without_stemming(task: Task) -> None:
    pytest.importorskip("rouge_score")
    check_readable(task)
    golds = ("Profit rose to EUR 13.1 mn from EUR 8.7 mn", "The dividend was kept", "Foo")
    said = ("Profit rose from EUR 8.7 mn to EUR 13.1 mn", "dividends were kept", "")
    fields = [
        row_fields(task, only_example(task, {"text": "Foo", "summary": gold}), answer)
        for gold, answer in zip(golds, said, strict=True)
    ]
    found = written_metrics(task, fields)
    # What rouge-score 0.1.2 gives for the three rows.
    assert found["rouge1"] == pytest.approx(np.mean([1, 2 / 7, 0]))
    assert found["rouge2"] == pytest.approx(np.mean([9 / 11, 0, 0]))
    assert found["rouge_l"] == pytest.approx(np.mean([7 / 12, 2 / 7, 0]))
    assert found["missing"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("task", ["summary"], indirect=True)
def test_summaries_without_their_package_are_refused(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    written_answers._rouge.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=r"pip install 'fingpt-lightning\[rouge\]'"):
        check_readable(task)
