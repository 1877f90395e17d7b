import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fingpt_lightning.cli.main import main
from fingpt_lightning.evaluation.metrics import label_metrics
from fingpt_lightning.evaluation.paired import intervals
from fingpt_lightning.reporting import charts, comparison
from fingpt_lightning.reporting.comparison import comparison_page
from fingpt_lightning.reporting.page import Table

_LABELS = ("down", "flat", "up")


def make_result(
    folder: Path,
    seed: int,
    skill: float,
    *,
    num_rows: int = 90,
    dropped: Sequence[int] = (),
    **changes: Any,
) -> Path:
    """An evaluation on the rows that all of these share."""
    golds, chance = random.Random(0), random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(1, num_rows + 1):
        gold = golds.choice(_LABELS)
        said = gold if chance.random() < skill else chance.choice(_LABELS)
        row = {"task": "fpb", "row": number, "text": "Foo", "gold": gold, "prediction": said}
        if number in dropped:
            row |= {"prediction": None, "is_dropped": True}
        rows.append(row)
    answered = [row for row in rows if "is_dropped" not in row]
    figures = label_metrics(
        [_LABELS.index(row["gold"]) for row in answered],
        [_LABELS.index(row["prediction"]) for row in answered],
        len(_LABELS),
    )
    entry = figures._asdict() | {
        "labels": _LABELS, "main_metric": "macro_f1", "split": "validation", "kind": "labels",
        "rows_sha256": "0123456789abcdef", "split_rule": "all rows of validation.jsonl",
        "template_sha256": "aa", "task_version": 1, "num_fewshot": 0,
    }  # fmt: skip
    head = {"model": f"models/{folder.name}", "revision": "f" * 64, "settings": {"dtype": "bf16"}}
    found = {"tasks": {"fpb": entry | changes}, **head}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(found))
    (folder / "predictions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def _compare(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    status = 0
    try:
        main(["compare", *map(str, words)])
    except SystemExit as error:
        status = int(error.code or 0)
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_results_stand_side_by_side_with_intervals_and_mcnemars_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = make_result(tmp_path / "base", 1, 0.3), make_result(tmp_path / "tuned", 2, 0.9)
    status, text = _compare(capsys, base, tuned)
    assert status == 0, text
    assert "90 rows of fpb, all rows of validation.jsonl; digest 0123456789ab." in text
    figures, differences, _ = (
        block for s in comparison_page([base, tuned]).sections for block in s.blocks
        if isinstance(block, Table)
    )  # fmt: skip
    assert [cell.text for cell in figures.head][1:3] == ["macro F1 (95 %)", "accuracy (95 %)"]
    stored = [
        json.loads((one / "results.json").read_text())["tasks"]["fpb"] for one in (base, tuned)
    ]
    for row, entry in zip(figures.rows, stored, strict=True):
        assert row[1].text.startswith(f"{entry['macro_f1']:.3f} (")
        low, high = entry["macro_f1_interval"]
        ours = [float(x) for x in row[1].text.rstrip(")").partition("(")[2].split("-")]
        assert ours == pytest.approx([low, high], abs=0.03)
    assert not figures.rows[0][1].is_best
    assert figures.rows[1][1].is_best
    (row,) = differences.rows
    gain = stored[1]["macro_f1"] - stored[0]["macro_f1"]
    assert row[1].text.startswith(f"{gain:+.3f} (+")
    counts = [int(cell.text) for cell in row[2:6]]
    assert sum(counts) == 90
    assert counts[0] + counts[1] == round(90 * stored[1]["accuracy"])
    assert row[6].text == "< 0.0001"
    assert row[7].text == "chi-squared"


def test_pages_are_written_as_html_and_markdown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three = [make_result(tmp_path / name / "out", seed, 0.5) for seed, name in enumerate("abc")]
    for name in ("page.html", "page.md"):
        status, text = _compare(capsys, *three, "--output", tmp_path / name)
        assert status == 0, text
        assert text.strip() == f"{tmp_path / name}: b/out, c/out against a/out, on the same rows"
    html, markdown = ((tmp_path / name).read_text() for name in ("page.html", "page.md"))
    assert html.startswith("<!DOCTYPE html>")
    for page in (html, markdown):
        assert "p-values are not corrected for the number of comparisons" in page
        assert "ffffffffffff" in page
    assert "| result | " in markdown
    assert html.count("<svg") == 2
    for text in ("fpb: macro F1", "Difference from a/out", "Bars hold 95 %.", "b/out"):
        assert text in html


def test_a_picture_has_the_figures_and_intervals_of_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[charts.Interval], float | None]] = []

    def draw(intervals: list[charts.Interval], *_: str, **words: Any) -> str:
        drawn.append((intervals, words.get("reference")))
        return "<svg></svg>"

    monkeypatch.setattr(charts, "interval_chart", draw)
    paths = [make_result(tmp_path / "base", 1, 0.3), make_result(tmp_path / "tuned", 2, 0.9)]
    resampled: list[int] = []

    def counted(compared: Any) -> Any:
        resampled.append(len(compared))
        return intervals(compared)

    monkeypatch.setattr(comparison, "intervals", counted)
    page = comparison_page(paths, has_pictures=True)
    figures, differences, _ = (
        block for s in page.sections for block in s.blocks if isinstance(block, Table)
    )
    assert resampled == [2] * (len(figures.head) - 1), "once per figure"
    (values, no_line), (gains, line) = drawn
    assert (no_line, line) == (None, 0.0)
    assert [one.label for one in (*values, *gains)] == ["base", "tuned", "tuned"]
    for one, row in zip(values, figures.rows, strict=True):
        assert row[1].text == f"{one.value:.3f} ({one.low:.3f}-{one.high:.3f})"
    (gain,) = gains
    text = f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
    assert differences.rows[0][1].text == text


def test_what_differs_beside_the_rows_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_result(tmp_path / "base", 1, 0.5)
    other = make_result(tmp_path / "other", 2, 0.5, dropped=(3, 7), num_fewshot=2)
    status, text = _compare(capsys, base, other)
    assert status == 0, text
    assert "88 rows of fpb" in text
    assert "2 rows that base answered are left out: they do not fit the context" in text
    assert "other was asked otherwise than base: num_fewshot." in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rows_sha256": "f" * 64},
            "fpb: base and other are of different rows (validation, 90 row",
        ),
        ({"num_rows": 80}, "fpb: base holds 90 answers and other 80 to the same rows"),
        ({"macro_f1": 0.99}, "have macro_f1 0.5987, but results.json 0.9900: the files do not"),
        ({"labels": ["down"]}, "a row of fpb: gold 'flat' is none of down"),
        ({"main_metric": None}, "fpb has no main_metric that is known"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_rows_that_are_not_the_same_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    base, other = (
        make_result(tmp_path / "base", 1, 0.5),
        make_result(tmp_path / "other", 2, 0.3, **changes),
    )
    status, text = _compare(capsys, base, other)
    assert status == 1
    (line,) = text.strip().splitlines()
    assert message in line


def test_wrong_paths_and_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, other = make_result(tmp_path / "base", 1, 0.5), make_result(tmp_path / "other", 2, 0.5)
    old = make_result(tmp_path / "old", 3, 0.5)
    found = json.loads((old / "results.json").read_text())
    del found["tasks"]["fpb"]["rows_sha256"]
    (old / "results.json").write_text(json.dumps(found))
    bare = make_result(tmp_path / "bare", 3, 0.5)
    (bare / "predictions.jsonl").unlink()
    alone = make_result(tmp_path / "alone", 3, 0.5)
    found["tasks"] = {"tfns": {}}
    (alone / "results.json").write_text(json.dumps(found))
    make_result(tmp_path / "run" / "eval" / "40", 4, 0.5)
    cases: list[tuple[tuple[str | Path, ...], int, str]] = [
        ((base,), 1, "compare needs two results or more"),
        ((base, base), 1, "base is named twice; fingpt report shows a single one"),
        ((base / "results.json", other), 1, "results.json is a file; name its folder, "),
        ((base, tmp_path / "othr"), 1, "othr does not exist; the nearest name there is other"),
        ((base, tmp_path / "run"), 1, "a run has one for each step, as"),
        ((base, old), 1, "fpb names no rows (rows_sha256)"),
        ((base, bare), 1, "predictions.jsonl is not there: results are compared row by row"),
        ((base, alone), 1, "no two results have a task in common (base: fpb; alone: tfns)"),
        ((base, other, "--tasks", "fbp"), 1, "task 'fbp' is not one that two results have; did y"),
        ((base, other, "--output", tmp_path / "x.htm"), 2, "ends in none of .html, .md; did you"),
        ((base, other, "--output", tmp_path / "no" / "x.md"), 1, "there is no folder"),
        ((base, other, "--outptu", "x.md"), 2, "did you mean --output?"),
        ((), 2, "required: RESULTS"),
    ]
    for words, status, message in cases:
        code, text = _compare(capsys, *words)
        assert code == status, text
        (line,) = text.strip().splitlines()
        assert message in line
    (base / "results.json").write_text('{"tasks": {}}')
    assert (
        "no two results have a task in common (base: none; other: fpb)"
        in _compare(capsys, base, other)[1]
    )
    (base / "results.json").write_text('{"tasks": 3}')
    assert "is not the results of an evaluation" in _compare(capsys, base, other)[1]
