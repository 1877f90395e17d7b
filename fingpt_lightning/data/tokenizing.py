"""Text to ids on several threads, in order and in memory that does not grow with the corpus.

The tokenizer works outside Python's lock, so that threads suffice. Each encodes batches of its own
in place of the tokenizer's pool, which cannot be resized, works only while its caller waits, and
after which a fork of this process brings a warning.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from fingpt_lightning.data.corpus import Corpus, Piece
from fingpt_lightning.data.documents import short_pieces
from fingpt_lightning.shards.options import Shard

_BATCH_CHARACTERS = 2**19
_BATCH_PIECES = 2**10
_POOL_VARIABLE = "TOKENIZERS_PARALLELISM"

_In = TypeVar("_In")
_Out = TypeVar("_Out")


class EncodedBatch(NamedTuple):
    """The ids of some documents.

    Attributes:
        num_skipped: Number of blank documents, which are not among ``num_documents``.
        bytes_read: Bytes of the corpus read so far.
        num_bytes: Number of bytes of the documents' text in UTF-8.
        num_bad_rows: Number of skipped bad rows, which are among neither.
        first_bad_row: Place and fault of the first of them.
    """

    ids: npt.NDArray[np.unsignedinteger]
    num_documents: int
    num_skipped: int
    bytes_read: int
    num_bytes: int
    num_bad_rows: int = 0
    first_bad_row: str | None = None


def encoded_batches(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    dtype: str,
    num_workers: int | None = None,
    shard: Shard | None = None,
) -> Generator[EncodedBatch]:
    """The ids of a corpus, each document followed by EOS; the same for every ``num_workers``.

    Up to two batches per worker are read ahead. Closing the iterator ends its threads.

    Args:
        corpus: Corpus to read, in the thread of the caller.
        tokenizer: Tokenizer that several threads use at once.
        dtype: Type of the ids.
        num_workers: Threads; None for one on each core that this process may use.
        shard: Share of the batches that is encoded; all of the corpus is read.
    """
    batches = (
        batch
        for index, batch in enumerate(_batches(short_pieces(corpus.pieces())))
        if shard is None or shard.has(index)
    )

    def encode(batch: list[Piece]) -> EncodedBatch:
        return _encode(batch, tokenizer, dtype)

    with _without_the_tokenizers_pool():
        yield from _map_in_order(encode, batches, num_workers or num_available_cores())


def num_available_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _map_in_order(
    function: Callable[[_In], _Out], items: Iterable[_In], num_threads: int
) -> Iterator[_Out]:
    executor = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizing")
    pending: deque[Future[_Out]] = deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > 2 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def _without_the_tokenizers_pool() -> Iterator[None]:
    before = os.environ.get(_POOL_VARIABLE)
    os.environ[_POOL_VARIABLE] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_POOL_VARIABLE]
        else:
            os.environ[_POOL_VARIABLE] = before


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    num_characters = 0
    for piece in pieces:
        batch.append(piece)
        num_characters += len(piece.text)
        if num_characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_PIECES:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _encode(batch: list[Piece], tokenizer: PreTrainedTokenizerFast, dtype: str) -> EncodedBatch:
    # The call on ``tokenizer`` itself would warn of documents beyond the model's context.
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(
        [piece.text for piece in batch], add_special_tokens=False
    )
    end = np.array([tokenizer.eos_token_id], dtype)
    parts = [end[:0]]
    for piece, encoding in zip(batch, encodings, strict=True):
        if piece.text:
            parts.append(np.array(encoding.ids, dtype))
            if piece.ends_document:
                parts.append(end)
    num_empty = sum(not piece.text for piece in batch)
    num_documents = sum(piece.ends_document for piece in batch) - num_empty
    problems = [piece.problem for piece in batch if piece.problem is not None]
    return EncodedBatch(
        np.concatenate(parts),
        num_documents,
        num_empty - len(problems),
        batch[-1].bytes_read,
        sum(len(piece.text.encode()) for piece in batch),
        len(problems),
        problems[0] if problems else None,
    )
