import fcntl
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from fingpt_lightning.data import token_cache, tokenizing
from fingpt_lightning.data.corpus import Piece, SyntheticCorpus
from fingpt_lightning.data.text_files import TextFiles
from fingpt_lightning.data.token_cache import build_token_file, find_token_file
from fingpt_lightning.data.tokenizers import load_tokenizer, train_tokenizer
from tests.support.warm_python import run_warm

_KILLED = """
import os, signal, sys
from pathlib import Path
from fingpt_lightning.data.corpus import Piece
from fingpt_lightning.data.token_cache import build_token_file
from fingpt_lightning.data.tokenizers import train_tokenizer

class Corpus:
    def pieces(self):
        for _ in range(2000):
            yield Piece("first", True)
        os.kill(os.getpid(), signal.SIGKILL)

    def num_bytes(self):
        return None

    def fingerprint(self):
        return "killed"

build_token_file(Corpus(), train_tokenizer(["x"], 257), Path(sys.argv[1]))
"""


@dataclass
class _Listed:
    """Documents as lists of pieces."""

    documents: list[list[str]]
    name: str = "listed"
    num_readings: int = 0

    def pieces(self) -> Iterator[Piece]:
        self.num_readings += 1
        for document in self.documents:
            for index, text in enumerate(document):
                yield Piece(text, index == len(document) - 1)

    def num_bytes(self) -> None:
        return None

    def fingerprint(self) -> str:
        return self.name

    def __str__(self) -> str:
        return self.name


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["shares rose, shares fell"], 270)


def test_documents_end_with_eos_and_blank_ones_are_counted(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "_BATCH_PIECES", 2)
    documents = [["shares rose"], [""], ["shares\n", "fell\n", "rose"], [""], ["up"]]
    built = build_token_file(_Listed(documents), tokenizer, tmp_path)
    expected: list[int] = []
    for document in documents:
        if document != [""]:
            for text in document:
                expected += tokenizer.backend_tokenizer.encode(text).ids
            expected.append(int(tokenizer.eos_token_id))
    assert built.open().tolist() == expected
    assert (built.num_documents, built.num_skipped, built.dtype) == (3, 2, "uint16")


@pytest.mark.parametrize(("vocabulary_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_the_smallest_type_that_holds_the_vocabulary_is_taken(
    vocabulary_size: int,
    dtype: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_cache, "vocabulary_size", lambda _: vocabulary_size)
    built = build_token_file(_Listed([["rose"]]), tokenizer, tmp_path)
    assert built.open().dtype == built.dtype == dtype


def test_a_corpus_is_tokenized_once(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    corpus = _Listed([["shares rose"]])
    first = build_token_file(corpus, tokenizer, tmp_path)
    assert build_token_file(corpus, tokenizer, tmp_path) == first
    assert find_token_file(corpus, tokenizer, tmp_path) == first
    assert corpus.num_readings == 1


@pytest.mark.parametrize("damage", ["truncated", "longer", "missing", "header"])
def test_a_damaged_cache_is_built_again(
    damage: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    corpus = _Listed([["shares rose"], ["shares fell"]])
    built = build_token_file(corpus, tokenizer, tmp_path)
    whole = built.path.read_bytes()
    match damage:
        case "truncated":
            built.path.write_bytes(whole[:-1])
        case "longer":
            built.path.write_bytes(whole + b"\0\0")
        case "missing":
            built.path.unlink()
        case "header":
            built.path.with_suffix(".json").write_text('{"num_tokens":')
    with caplog.at_level(logging.WARNING):
        assert build_token_file(corpus, tokenizer, tmp_path) == built
    assert built.path.read_bytes() == whole
    assert sum("is built again" in message for message in caplog.messages) == (damage != "missing")


def test_other_text_tokenizer_or_format_is_another_cache(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "a.txt"
    texts.write_text("shares rose")
    built = [build_token_file(TextFiles((texts,)), tokenizer, tmp_path)]
    texts.write_text("shares fell")
    built.append(build_token_file(TextFiles((texts,)), tokenizer, tmp_path))
    other = train_tokenizer(["shares"], 260)
    built.append(build_token_file(TextFiles((texts,)), other, tmp_path))
    monkeypatch.setattr(token_cache, "FORMAT_VERSION", 2)
    built.append(build_token_file(TextFiles((texts,)), other, tmp_path))
    assert len({each.path for each in built}) == 4


def test_two_that_build_at_once_do_not_break_each_other(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    class Slow(_Listed):
        def pieces(self) -> Iterator[Piece]:
            for piece in super().pieces():
                yield piece
                self.other = build_token_file(_Listed(self.documents), tokenizer, tmp_path)
                self.mapped = self.other.open()

    corpus = Slow([["shares rose"]])
    built = build_token_file(corpus, tokenizer, tmp_path)
    assert built == corpus.other
    assert corpus.mapped.tolist() == built.open().tolist()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    killed = run_warm(["-c", _KILLED, tmp_path], timeout=60)
    assert killed.returncode < 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".partial"}
    with pytest.raises(RuntimeError, match="prepare_data has to run first"):
        find_token_file(_Listed([["x"]], "killed"), train_tokenizer(["x"], 257), tmp_path)


def test_what_a_killed_build_left_goes_with_the_next_build(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    corpus = _Listed([["shares rose"]])
    built = build_token_file(corpus, tokenizer, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    built.path.unlink()
    left, held, other = (tmp_path / f"{built.path.name}.{i}.partial" for i in ("7-0", "8-1", "x"))
    for path in (left, held, other):
        path.write_bytes(b"half")
    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        build_token_file(corpus, tokenizer, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names | {held.name, other.name}


def test_a_failed_build_leaves_nothing(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    texts = tmp_path / "a.jsonl"
    texts.write_text('{"text": "fine"}\nno JSON\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: no JSON"):
        build_token_file(TextFiles((texts,)), tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == [texts]


def test_an_interrupt_ends_the_threads_and_leaves_nothing(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(_Listed):
        def pieces(self) -> Iterator[Piece]:
            yield from super().pieces()
            assert any(thread.name.startswith("tokenizing") for thread in threading.enumerate())
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizing, "_BATCH_PIECES", 1)
    with pytest.raises(KeyboardInterrupt):
        build_token_file(Interrupted([["rose"]] * 9), tokenizer, tmp_path, num_workers=2)
    assert not any(thread.name.startswith("tokenizing") for thread in threading.enumerate())
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_without_text_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="blank: no text in any of 2 documents"):
        build_token_file(_Listed([[""], [""]], "blank"), tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_long_documents_bring_no_warning(
    shared_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpt2 = load_tokenizer(str(shared_data / "tokenizers/gpt2"))
    path = shared_data / "wikitext2/validation.txt"
    with caplog.at_level(logging.WARNING):
        built = build_token_file(TextFiles((path,)), gpt2, tmp_path)
    assert caplog.messages == []
    tokens = built.open()
    assert len(tokens) > 200_000
    assert np.count_nonzero(tokens == gpt2.eos_token_id) == built.num_documents == 1
    assert gpt2.decode(tokens[:-1].tolist()) == path.read_text()


def test_the_header_tells_what_was_tokenized(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    built = build_token_file(SyntheticCorpus(3, seed=1), tokenizer, tmp_path)
    header = json.loads(built.path.with_suffix(".json").read_text())
    assert header["num_tokens"] == built.num_tokens == len(built.open())
    assert header["num_documents"] == 3
    assert header["corpus"] == "3 items of synthetic news"
