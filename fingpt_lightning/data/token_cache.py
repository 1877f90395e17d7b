"""A corpus, tokenised once, as one memory-mapped file of ids in which each document ends with EOS.

``<key>.bin`` holds the ids and ``<key>.json`` says how many; the key is a digest of all that
decides the ids. Both are renamed into place when they are whole, and any two processes that build
the same key write the same bytes, so that neither can harm the other.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerFast

from fingpt_lightning.data.corpus import Corpus, Piece
from fingpt_lightning.data.tokenizers import tokenizer_sha256, vocabulary_size

FORMAT_VERSION = 1

_BATCH_CHARACTERS = 2**21
_BATCH_PIECES = 2**10
_QUIET_S = 2.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenFile:
    """A whole token cache.

    Attributes:
        num_skipped: Blank documents, which are not among ``num_documents``.
    """

    path: Path
    dtype: str
    num_tokens: int
    num_documents: int
    num_skipped: int

    def open(self) -> npt.NDArray[np.unsignedinteger]:
        """Maps the ids into memory, read-only."""
        return np.memmap(self.path, self.dtype, mode="r", shape=(self.num_tokens,))


def build_token_file(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, cache_dir: Path
) -> TokenFile:
    """Tokenises a corpus, unless that has been done before, in memory that it does not grow.

    A damaged cache is logged and built again.

    Raises:
        ValueError: The corpus has no text, or what it reads is no text (see ``TextFiles``).
    """
    key = _cache_key(corpus, tokenizer)
    if (whole := _find(cache_dir, key)) is not None:
        return whole
    cache_dir.mkdir(parents=True, exist_ok=True)
    path = cache_dir / f"{key}.bin"
    dtype = "uint16" if vocabulary_size(tokenizer) <= 2**16 else "uint32"
    num_characters = num_tokens = num_documents = num_skipped = 0
    with _written_atomically(path) as file, _progress(str(corpus)) as show:
        for batch in _batches(corpus.pieces()):
            skipped = sum(not piece.text for piece in batch)
            num_skipped += skipped
            num_documents += sum(piece.ends_document for piece in batch) - skipped
            ids = _encode(batch, tokenizer, dtype)
            ids.tofile(file)
            num_tokens += len(ids)
            num_characters += sum(len(piece.text) for piece in batch)
            show(num_characters, num_tokens)
        if num_documents == 0:
            raise ValueError(f"{corpus}: no text in any of {num_skipped} documents")
    header = {
        "format_version": FORMAT_VERSION,
        "dtype": dtype,
        "num_tokens": num_tokens,
        "num_documents": num_documents,
        "num_skipped": num_skipped,
        "corpus": str(corpus),
        "corpus_fingerprint_sha256": hashlib.sha256(corpus.fingerprint().encode()).hexdigest(),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
    }
    with _written_atomically(path.with_suffix(".json")) as file:
        file.write(json.dumps(header, indent=2).encode())
    return TokenFile(path, dtype, num_tokens, num_documents, num_skipped)


def find_token_file(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, cache_dir: Path
) -> TokenFile:
    """Finds what ``build_token_file`` built.

    Raises:
        RuntimeError: It has not been built on this machine.
    """
    whole = _find(cache_dir, _cache_key(corpus, tokenizer))
    if whole is None:
        raise RuntimeError(f"no tokens of {corpus} in {cache_dir}: prepare_data has to run first")
    return whole


def _cache_key(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> str:
    settings = (FORMAT_VERSION, corpus.fingerprint(), tokenizer_sha256(tokenizer))
    return f"tokens-{hashlib.sha256(repr(settings).encode()).hexdigest()[:24]}"


def _find(cache_dir: Path, key: str) -> TokenFile | None:
    path = cache_dir / f"{key}.bin"
    try:
        header = json.loads(path.with_suffix(".json").read_bytes())
        names = ("dtype", "num_tokens", "num_documents", "num_skipped")
        whole = TokenFile(path, *(header[name] for name in names))
        needed_bytes = whole.num_tokens * np.dtype(whole.dtype).itemsize
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        _log.warning("token cache %s has a damaged header and is built again", path)
        return None
    if size_bytes != needed_bytes:
        _log.warning(
            "token cache %s has %d bytes, not the %d of its header, and is built again",
            *(path, size_bytes, needed_bytes),
        )
        return None
    return whole


@contextmanager
def _written_atomically(path: Path) -> Iterator[BinaryIO]:
    """Opens a scratch file beside ``path`` that replaces it when, and only when, all went well."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")
    try:
        with scratch.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


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


def _encode(
    batch: list[Piece], tokenizer: PreTrainedTokenizerFast, dtype: str
) -> npt.NDArray[np.unsignedinteger]:
    # The call on ``tokenizer`` itself would warn of documents beyond the model's context.
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(
        [piece.text for piece in batch], add_special_tokens=False
    )
    end = np.array([tokenizer.eos_token_id], dtype)
    parts: list[npt.NDArray[np.unsignedinteger]] = []
    for piece, encoding in zip(batch, encodings, strict=True):
        if piece.text:
            parts.append(np.array(encoding.ids, dtype))
            if piece.ends_document:
                parts.append(end)
    return np.concatenate(parts) if parts else end[:0]


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A line on the terminal, where stderr is one, for work that takes longer than two seconds.

    Yields:
        What is to be called with the number of characters and of tokens so far.
    """
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    display = Progress(*columns, console=Console(stderr=True), transient=True)
    task = display.add_task(what, total=None)
    started_s = time.monotonic()

    def show(num_characters: int, num_tokens: int) -> None:
        if not display.live.is_started:
            if time.monotonic() - started_s < _QUIET_S:
                return
            display.start()
        so_far = f"{num_characters / 1e6:.0f} M characters, {num_tokens / 1e6:.1f} M tokens"
        display.update(task, description=f"{what}: {so_far}")

    try:
        yield show
    finally:
        display.stop()
