import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fingpt_lightning.cli.main import main
from fingpt_lightning.tasks.audit import (
    AuditedRows,
    check_settings,
    normalized_words,
    overlap,
    pairs_to_audit,
)

_LONG = "Operating profit rose to EUR 13.1 mn from EUR 8.7 mn in the corresponding period of 2008"


def _rows(task: str, split: str, *texts: str, answers: tuple[str | None, ...] = ()) -> AuditedRows:
    numbers = list(range(1, len(texts) + 1))
    return AuditedRows(task, split, texts, numbers, answers or (None,) * len(texts))


def test_rows_are_equal_whatever_case_marks_and_punctuation() -> None:
    seen = _rows("a", "train", "Foo", "The caf\u00e9's profit ROSE!", answers=("up", "up"))
    audited = _rows("a", "test", "the cafe s profit rose", "Bar", answers=("down", "up"))
    found = overlap(seen, audited)
    assert (found.num_rows, found.num_equal, found.num_overlapping) == (2, 1, 0)
    assert found.num_conflicting == 1
    (pair,) = found.examples
    assert (pair.seen, pair.audited, pair.share) == (2, 1, 1.0)


def test_rows_overlap_by_the_share_of_their_ngrams_in_one_row() -> None:
    words = _LONG.split()
    half = " ".join(words[:12] + ["x"] * 6)  # 5 of 11 8-grams are the long row's
    num_shared = len({tuple(words[i : i + 8]) for i in range(5)})
    seen = _rows("a", "train", f"Input: {_LONG} Answer:", " ".join(words[8:]))
    audited = _rows("a", "test", _LONG, half, "new words that nobody has seen before at all")
    found = overlap(seen, audited, threshold=0.4)
    normalized = normalized_words(half)
    grams = {normalized[i : i + 8] for i in range(len(normalized) - 7)}
    of_long = {normalized_words(_LONG)[i : i + 8] for i in range(99)}
    share = len(grams & of_long) / len(grams)
    assert num_shared <= len(grams & of_long)
    assert (found.num_equal, found.num_overlapping) == (0, 2)
    assert [pair.share for pair in found.examples] == [1.0, share]
    assert overlap(seen, audited, threshold=share).num_overlapping == 2
    assert overlap(seen, audited, threshold=share + 0.01).num_overlapping == 1


def test_a_split_is_compared_with_its_own_earlier_rows() -> None:
    rows = _rows("a", "train", "Foo rose", "Bar", "FOO rose.", "foo, rose", "")
    found = overlap(rows, rows)
    assert found.num_equal == 2
    assert [(pair.seen, pair.audited) for pair in found.examples] == [(1, 3), (1, 4)]


def test_training_rows_are_compared_with_the_test_rows_of_all_tasks() -> None:
    splits = [
        _rows(task, split, "x") for task in ("a", "b") for split in ("test", "train", "validation")
    ]
    pairs = [(seen.name, audited.name) for seen, audited in pairs_to_audit(splits)]
    assert len(pairs) == len(set(pairs)) == 6 + 6 + 4
    for expected in (
        ("a/train", "a/test"),
        ("b/train", "a/validation"),
        ("a/test", "a/validation"),
    ):
        assert expected in pairs
    assert ("a/train", "b/train") not in pairs
    assert ("a/test", "b/validation") not in pairs


@given(st.lists(st.text("ab ", min_size=1, max_size=9), max_size=5), st.integers(1, 3))
def test_rows_that_were_seen_are_all_found(texts: list[str], ngram: int) -> None:
    rows = _rows("a", "train", *texts)
    copy = _rows("a", "test", *texts)
    num_words = sum(bool(normalized_words(text)) for text in texts)
    assert overlap(rows, copy, ngram=ngram).num_equal == num_words


@pytest.mark.parametrize(
    ("ngram", "threshold", "message"),
    [(0, 0.5, "ngram 0 is below 1"), (8, 0.0, "threshold 0.0 is outside (0, 1]"), (8, 1.1, "1.1")],
)
def test_settings_out_of_range_are_refused(ngram: int, threshold: float, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_settings(ngram, threshold)


def _write(folder: Path, name: str, rows: list[dict[str, object]]) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _audit(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    status = 0
    try:
        main(["tasks", *map(str, words)])
    except SystemExit as error:
        status = int(error.code or 0)
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_the_command_finds_rows_that_were_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path, "fpb/train.jsonl", [{"text": _LONG, "label": "positive"}] * 2)
    _write(tmp_path, "fpb/validation.jsonl", [{"text": "Foo fell", "label": "negative"}])
    _write(tmp_path, "tfns/validation.jsonl", [{"text": f"RT {_LONG}", "label": 0}])
    prompt = "Instruction: What now?\nInput: Foo fell\nAnswer: "
    _write(tmp_path, "mine.jsonl", [{"context": prompt, "target": "negative"}])
    status, text = _audit(capsys, "audit", "--data_dir", tmp_path)
    assert status == 0, text
    assert re.search(r"^fpb/train +its own later rows +2 +1 +0 +0 +50.00%$", text, re.MULTILINE)
    assert re.search(r"^fpb/train +fpb/validation +1 +0 +0 +0 +0.00%$", text, re.MULTILINE)
    assert re.search(r"^fpb/train +tfns/validation +1 +0 +0 +1 +100.00%$", text, re.MULTILINE)
    assert "fpb/train row 1, tfns/validation row 1 (92%): RT Operating profit rose" in text
    words = ("audit", "fpb", "--data_dir", tmp_path, "--train_files", tmp_path / "mine.jsonl")
    assert "tfns" not in _audit(capsys, *words)[1]
    status, text = _audit(capsys, *words, "--ngram", "2", "--strict")
    assert status == 1
    last = text.strip().splitlines()[-1]
    assert "rows occur twice: 1 rows of fpb/validation in train_files/train" in last


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("audit",), 2, "--data_dir is required: audit reads the rows that lie there"),
        (("audit", "fbp", "--data_dir", "."), 1, "did you mean fpb?"),
        (("audit", "fpb", "--data_dir", "."), 1, "task fpb: fpb holds no split"),
        (("audit", "tfn,fpb", "--data_dir", "."), 1, "task 'tfn' is neither shipped nor"),
        (("audit", "--data_dir", "."), 1, "data_dir . holds no split of any task"),
        (("audit", "--data_dir", "nowhere"), 1, "data_dir: no folder nowhere"),
        (("audit", "--data_dir", ".", "--train_files", "no.jsonl"), 1, "no.jsonl"),
        (("fpb", "tfns"), 2, "one task is shown at a time, not 2; audit takes several"),
        (("fpb", "--ngram", "3"), 2, "--ngram has an effect with audit alone"),
    ],
)
def test_what_cannot_be_audited_is_one_line(
    words: tuple[str, ...],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    found, text = _audit(capsys, *words)
    assert found == status
    (line,) = text.strip().splitlines()
    assert message in line
