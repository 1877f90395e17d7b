"""Each kind of task meets each command that takes a task: it works, or is refused in one line."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fingpt_lightning.cli.main import main
from fingpt_lightning.data import FinancialInstructions
from fingpt_lightning.tasks import find_task
from fingpt_lightning.tasks.task import GENERATED, KINDS, METRICS_OF_KIND, Kind
from tests.evaluation.test_written_answers import OWN
from tests.evaluation.tiny_language import ROWS, tiny_network, tiny_tokenizer

_TABLE = [["", "2019"], ["Profit", "12.5"]]
_SHIPPED: dict[Kind, str] = {
    "labels": "fpb", "choices": "piqa", "partial": "winogrande", "last_word": "lambada",
    "instructions": "alpaca",
}  # fmt: skip
_ROWS: dict[Kind, list[dict[str, Any]]] = {
    **{kind: ROWS[name] for kind, name in _SHIPPED.items() if name in ROWS},
    "instructions": [{"instruction": f"Name {n}.", "input": "", "output": "Foo"} for n in "abcd"],
    "numeric": [
        {
            "table": _TABLE, "question": f"Profit {n}?", "answer": 12.5, "scale": "million",
            "answer_type": "arithmetic",
        }
        for n in range(4)
    ],
    "spans": [
        {"tokens": ["Ann", "of", "Foo"], "tags": ["I-PER", "O", tag]} for tag in ("O", "I-ORG")
    ],
    "summary": [{"text": f"Profit of Foo rose {n}", "summary": f"Foo rose {n}"} for n in range(3)],
    "regression": [{"text": f"Profit rose {n}", "score": n / 4} for n in range(4)],
}  # fmt: skip

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and a task of each kind with its rows."""
    folder = tmp_path_factory.mktemp("kinds")
    tiny_network("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for kind in KINDS:
        if kind in GENERATED:
            head = {"version": 1, "title": "Ours", "source": "our desk", "license": "private"}
            own = {**head, "kind": kind, **OWN[kind], "max_new_tokens": 7}
            (folder / f"{kind}.yaml").write_text(yaml.safe_dump(own))
        rows = folder / "data" / find_task(_task(kind, folder)).folder
        rows.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{json.dumps(row)}\n" for row in _ROWS[kind])
        for split in ("train", "validation"):
            (rows / f"{split}.jsonl").write_text(lines)
    return folder


def _task(kind: Kind, folder: Path) -> str:
    return _SHIPPED.get(kind, str(folder / f"{kind}.yaml"))


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(command: str, *words: str) -> tuple[int, str]:
        status = 0
        capsys.readouterr()
        try:
            main([command, *words])
        except SystemExit as error:
            status = int(error.code or 0)
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


def _needs_rouge(kind: Kind) -> None:
    if kind == "summary":
        pytest.importorskip("rouge_score")


def _evaluate(run: Run, folder: Path, kind: Kind, output: Path, *words: str) -> tuple[int, str]:
    return run(
        "evaluate",
        *("--model", str(folder / "model"), "--data_dir", str(folder / "data"), "--device", "cpu"),
        *("--tasks", _task(kind, folder), "--output", str(output), *words),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_and_compare(kind: Kind, folder: Path, run: Run, tmp_path: Path) -> None:
    _needs_rouge(kind)
    status, text = _evaluate(run, folder, kind, tmp_path / "a")
    if kind == "instructions":
        assert status == 1
        assert "is there to train on: it has no right answers" in text
        return
    assert status == 0, text
    found = json.loads((tmp_path / "a" / "results.json").read_text())
    ((name, entry),) = found["tasks"].items()
    assert entry["kind"] == kind
    assert entry["main_metric"] in METRICS_OF_KIND[kind]
    assert entry["main_metric"] in entry
    assert entry["n"] == len(_ROWS[kind])
    assert entry["scoring"] == ("generate" if kind in GENERATED else "choices")
    rows = [json.loads(x) for x in (tmp_path / "a" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == entry["n"]
    assert all(row["gold"] is not None and "prediction" in row for row in rows)
    assert all(("answer" in row) == (kind in GENERATED) for row in rows)
    assert _evaluate(run, folder, kind, tmp_path / "b", "--dtype", "bfloat16")[0] == 0
    status, text = run("compare", str(tmp_path / "a"), str(tmp_path / "b"))
    assert status == 0, text
    assert f"{len(rows)} rows of {name}" in text
    assert ("McNemar" in text) == (kind not in ("summary", "regression"))


@pytest.mark.parametrize("scoring", ["generate", "both"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "instructions"])
def test_every_scoring(kind: Kind, scoring: str, folder: Path, run: Run, tmp_path: Path) -> None:
    _needs_rouge(kind)
    words = ("--scoring", scoring, "--limit", "2")
    status, text = _evaluate(run, folder, kind, tmp_path / "a", *words)
    if scoring == "generate" and kind in ("choices", "partial", "last_word"):
        assert status == 1
        assert f"scoring generate reads labels, which task {_SHIPPED[kind]} of kind {kind}" in text
        return
    assert status == 0, text
    tasks = json.loads((tmp_path / "a" / "results.json").read_text())["tasks"]
    name = find_task(_task(kind, folder)).name
    if kind == "labels" and scoring == "both":
        assert list(tasks) == [name, f"{name}_generated"]
        assert [one["scoring"] for one in tasks.values()] == ["choices", "generate"]
        assert (tmp_path / "a" / f"confusion_{name}_generated.png").is_file()
        assert tasks[name]["rows_sha256"] == tasks[f"{name}_generated"]["rows_sha256"]
    else:
        assert list(tasks) == [name]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("kind", KINDS)
def test_label(kind: Kind, ending: str, folder: Path, run: Run, tmp_path: Path) -> None:
    fields = [{"text": "Profit of Foo rose"}, {"text": " "}]
    if kind == "numeric":
        fields = [{"text": "Profit | 12.5", "question": "What?"}, {"text": "x", "question": ""}]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in fields))
    status, text = run(
        "label",
        *("--model", str(folder / "model"), "--task", _task(kind, folder), "--device", "cpu"),
        *("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / f"out{ending}")),
    )
    if kind != "labels" and kind not in GENERATED:
        assert status == 1
        assert f"is of kind {kind}: it has no labels to give" in text
        return
    assert status == 0, text
    name = find_task(_task(kind, folder)).name
    if kind == "labels":
        added = [f"{name}_{one}" for one in ("label", "negative", "neutral", "positive")]
    else:
        assert "out" + ending in text
        assert "2 rows: 1 answers" in text or "2 rows: 0 answers" in text
        added = [f"{name}_answer"]
        added += [f"{name}_value"] if kind in ("numeric", "regression") else []
    first, second = _read(tmp_path / f"out{ending}")
    assert list(first) == [*fields[0], *added]
    assert all(second[one] in (None, "") for one in added)
    if kind == "spans":
        assert first[f"{name}_answer"]


def _read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".parquet":
        from pyarrow import parquet  # type: ignore[import-untyped]

        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        return rows
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_fit_trains_on_the_answer_as_it_is_scored(kind: Kind, folder: Path) -> None:
    data = FinancialInstructions(
        tasks=[_task(kind, folder)], data_dir=str(folder / "data"), batch_size=1, val_share=0.5,
        tokenizer=str(folder / "model"),
    )  # fmt: skip
    data.setup("fit")
    tokenizer = tiny_tokenizer()
    batch = next(iter(data.train_dataloader()))
    answers = [
        tokenizer.decode([token for token in row.tolist() if token >= 0], skip_special_tokens=True)
        for row in batch["labels"]
    ]
    expected = {
        "numeric": {" 12.5 million"},
        "spans": {" Ann, person", " Ann, person; Foo, organization"},
        "summary": {f" Foo rose {n}" for n in range(3)},
        "regression": {f" {n / 4}" for n in range(4)},
        "labels": {" negative", " neutral", " positive"},
    }.get(kind)
    assert all(answers)
    if expected is not None:
        assert set(answers) <= expected


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_shows_and_audits(kind: Kind, folder: Path, run: Run) -> None:
    status, text = run("tasks", _task(kind, folder), "--data_dir", str(folder / "data"))
    assert status == 0, text
    assert f"kind     {kind}, by " in text
    assert "first row:" in text
    words = ("audit", _task(kind, folder), "--data_dir", str(folder / "data"))
    status, text = run("tasks", *words)
    assert status == 0, text
    assert "100.00%" in text, "both splits hold the same rows"
