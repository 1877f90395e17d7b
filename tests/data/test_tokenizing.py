import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fingpt_lightning.data import tokenizing
from fingpt_lightning.data.corpus import JoinedCorpus, Piece, SyntheticCorpus
from fingpt_lightning.data.tokenizers import train_tokenizer
from fingpt_lightning.data.tokenizing import EncodedBatch, encoded_batches, num_available_cores


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["shares rose, shares fell"], 270)


@pytest.mark.parametrize("num_workers", [2, 5, None])
def test_the_ids_do_not_depend_on_the_number_of_workers(
    num_workers: int | None, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "_BATCH_PIECES", 3)
    corpus = SyntheticCorpus(40, seed=1)
    batches = list(encoded_batches(corpus, tokenizer, "uint16", num_workers))
    assert len(batches) == 14
    alone = list(encoded_batches(corpus, tokenizer, "uint16", 1))
    for batch, expected in zip(batches, alone, strict=True):
        assert np.array_equal(batch.ids, expected.ids)
        assert batch[1:] == expected[1:]


def test_batches_are_encoded_at_once_and_read_ahead_within_bounds(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch waits for a second one that is encoded at the same time."""
    both = threading.Barrier(2, timeout=20)
    num_read = 0

    def encode(batch: list[Piece], *_: object) -> EncodedBatch:
        both.wait()
        return EncodedBatch(np.zeros(1, np.uint16), len(batch), 0, 0, 0)

    class Counted(SyntheticCorpus):
        def pieces(self) -> Iterator[Piece]:
            nonlocal num_read
            for piece in super().pieces():
                num_read += 1
                yield piece

    monkeypatch.setattr(tokenizing, "_BATCH_PIECES", 1)
    monkeypatch.setattr(tokenizing, "_encode", encode)
    num_written = 0
    for _ in encoded_batches(Counted(12, seed=1), tokenizer, "uint16", 2):
        num_written += 1
        assert num_read - num_written <= 4
    assert num_written == num_read == 12


def test_the_tokenizers_own_pool_is_left_alone(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    batches = encoded_batches(SyntheticCorpus(3, seed=1), tokenizer, "uint16", 1)
    next(batches)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    batches.close()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_an_error_of_a_worker_ends_all(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: object) -> None:
        raise MemoryError("of a worker")

    monkeypatch.setattr(tokenizing, "_encode", encode)
    with pytest.raises(MemoryError, match="of a worker"):
        list(encoded_batches(SyntheticCorpus(3, seed=1), tokenizer, "uint16", 2))
    assert not any(thread.name.startswith("tokenizing") for thread in threading.enumerate())


@given(sizes=st.lists(st.integers(0, 12), max_size=20))
def test_batches_are_bounded(sizes: list[int]) -> None:
    pieces = [Piece("x" * size, True) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "_BATCH_PIECES", 3)
        patch.setattr(tokenizing, "_BATCH_CHARACTERS", 10)
        batches = list(tokenizing._batches(iter(pieces)))
    assert [piece for batch in batches for piece in batch] == pieces
    for batch in batches:
        assert 1 <= len(batch) <= 3
        assert sum(len(piece.text) for piece in batch[:-1]) < 10


def test_positions_in_the_corpus_come_along(tokenizer: PreTrainedTokenizerFast) -> None:
    class Read(SyntheticCorpus):
        def pieces(self) -> Iterator[Piece]:
            return (piece._replace(bytes_read=5) for piece in super().pieces())

    both = JoinedCorpus((Read(2, seed=1), SyntheticCorpus(1, seed=1)))
    (batch,) = encoded_batches(both, tokenizer, "uint16", 1)
    assert batch.bytes_read == 0
    (batch,) = encoded_batches(Read(2, seed=1), tokenizer, "uint16", 1)
    assert (batch.bytes_read, batch.num_documents, batch.num_skipped) == (5, 2, 0)


def test_cores_are_those_of_this_process() -> None:
    assert 1 <= num_available_cores() <= (os.cpu_count() or 1)
