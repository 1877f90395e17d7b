"""What a calibration reads: files one after the other, or a mixture by weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fingpt_lightning.data import documents
from fingpt_lightning.data.calibration_text import (
    Calibration,
    calibration_sources,
    read_calibration,
)
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer

TOKENIZER, CONFIG = tiny_tokenizer(), tiny_network("llama").config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("Profit rose " * 300)
    (tmp_path / "b.txt").write_text("Shares fell " * 300)
    (tmp_path / "a=2.txt").write_text("The dividend " * 300)
    (tmp_path / "fpb").mkdir()
    rows = [{"text": "Foo rose", "label": "positive"}] * 60
    (tmp_path / "fpb" / "train.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    return tmp_path


def _read(folder: Path, *sources: str, tokens: int = 120) -> Calibration:
    found = read_calibration(
        TOKENIZER, CONFIG,
        calibration=[s if s.startswith("task:") else str(folder / s) for s in sources],
        calibration_task=None, calibration_tokens=tokens, data_dir=folder,
    )  # fmt: skip
    assert found is not None
    return found


def _count(calibration: Calibration, word: str) -> int:
    return str(TOKENIZER.decode(calibration.ids.flatten().tolist())).count(word)


def test_weights_are_shares_of_the_tokens(folder: Path) -> None:
    mixed = _read(folder, "a.txt=3", "b.txt")
    assert mixed.ids.numel() <= 120
    assert _count(mixed, "rose") > _count(mixed, "fell") > 0
    assert mixed.name.startswith("90 of ")
    assert "; 30 of " in mixed.name


def test_prompts_of_a_task_are_a_part_of_a_mixture(folder: Path) -> None:
    mixed = _read(folder, "b.txt=1", "task:fpb=2")
    assert "; 80 of train of fpb, " in mixed.name
    assert _count(mixed, "fell") > 0
    assert _count(mixed, "rose") > 0


def test_a_task_whose_first_rows_are_the_longest_fills_its_share(folder: Path) -> None:
    rows = [{"text": "Foo rose " * (10 if number < 64 else 1), "label": "positive"}
            for number in range(400)]  # fmt: skip
    file = folder / "fpb" / "train.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert "; 400 of train of fpb, " in _read(folder, "b.txt", "task:fpb", tokens=800).name


def test_files_without_weights_are_read_one_after_the_other(folder: Path) -> None:
    plain = _read(folder, "a.txt", "b.txt")
    assert _count(plain, "fell") == 0


def test_a_long_line_is_tokenized_in_parts_as_far_as_it_is_needed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a.jsonl").write_text(json.dumps({"text": "Profit rose " * 300}))
    whole = _read(folder, "a.jsonl")
    lengths: list[int] = []
    encode = type(TOKENIZER).encode

    def noted(self: Any, text: str, **options: Any) -> list[int]:
        lengths.append(len(text))
        return list(encode(self, text, **options))

    monkeypatch.setattr(documents, "_PIECE_BYTES", 200)
    monkeypatch.setattr(type(TOKENIZER), "encode", noted)
    assert torch.equal(_read(folder, "a.jsonl").ids, whole.ids)
    assert max(lengths) <= 200
    assert sum(lengths) < 3600


def test_a_file_with_an_equals_sign_in_its_name_is_itself(folder: Path) -> None:
    (source,) = calibration_sources(str(folder / "a=2.txt"))
    assert source.weight == 1
    assert _count(_read(folder, "a=2.txt"), "dividend") > 0


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (("a.txt=0", "b.txt"), r"a\.txt=0: weight 0 is not above 0"),
        (("a.txt=nan", "b.txt"), "weight nan is not above 0"),
        (("a.txt=1000", "b.txt"), r"weight 1 leaves .*b\.txt no token of 120"),
        (("a.txt", "task:fbp"), "fbp.*fpb"),
        (("c.txt=2",), "c.txt does not exist"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(
    folder: Path, sources: tuple[str, ...], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        _read(folder, *sources)


def test_a_source_that_is_too_short_is_named_with_its_tokens(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.txt has 2,701 tokens, fewer than the 3,000 of"):
        _read(folder, "a.txt=1e-9", "b.txt=1e-9", tokens=6000)
