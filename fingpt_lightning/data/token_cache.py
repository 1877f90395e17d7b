"""A corpus, tokenized once, as one memory-mapped file of ids in which each document ends with EOS.

``<key>.bin`` holds the ids and ``<key>.json`` says how many; the key is a digest of all that
decides the ids. Both are renamed into place when they are whole, and any two processes that build
the same key write the same bytes, so that neither can harm the other.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from fingpt_lightning.data.corpus import Corpus
from fingpt_lightning.data.tokenizers import vocabulary_size
from fingpt_lightning.data.tokenizing import EncodedBatch, encoded_batches
from fingpt_lightning.files import to_json, write_whole, written_whole
from fingpt_lightning.models.formats.tokenizer import tokenizer_sha256
from fingpt_lightning.terminal.progress import SoFar, shown_tokenizing

FORMAT_VERSION = 1

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadRows:
    """How many rows of a corpus were skipped because they hold no text.

    Attributes:
        first: Place and fault of the first, as it was called when it was read; None without any.
    """

    number: int = 0
    first: str | None = None

    def __add__(self, other: "BadRows") -> "BadRows":
        return BadRows(self.number + other.number, self.first or other.first)

    def __str__(self) -> str:
        return f"{self.number:,} bad {'row' if self.number == 1 else 'rows'}, first {self.first}"


@dataclass(frozen=True)
class TokenFile:
    """A whole token cache.

    Attributes:
        num_skipped: Number of blank documents, which are not among ``num_documents``.
        num_bytes: Number of bytes of the text in UTF-8; None in a cache of version 0.2.
        bad_rows: Skipped rows, which are among neither.
    """

    path: Path
    dtype: str
    num_tokens: int
    num_documents: int
    num_skipped: int
    num_bytes: int | None = None
    bad_rows: BadRows = BadRows()

    def open(self) -> npt.NDArray[np.unsignedinteger]:
        """Maps the ids into memory, read-only."""
        return np.memmap(self.path, self.dtype, mode="r", shape=(self.num_tokens,))


class TokenPlace:
    """Where the cache of a corpus lies.

    Args:
        corpus: Corpus to read.
        tokenizer: Tokenizer that makes the ids.
        cache_dir: Folder of the caches.

    Attributes:
        path: File of the ids.
        dtype: Type of the ids.
    """

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, cache_dir: Path) -> None:
        self.corpus, self.tokenizer = corpus, tokenizer
        settings = (FORMAT_VERSION, corpus.fingerprint(), tokenizer_sha256(tokenizer))
        key = f"tokens-{hashlib.sha256(repr(settings).encode()).hexdigest()[:24]}"
        self.path = cache_dir / f"{key}.bin"
        self.dtype = "uint16" if vocabulary_size(tokenizer) <= 2**16 else "uint32"


def build_token_file(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: Path,
    num_workers: int | None = None,
) -> TokenFile:
    """Tokenizes a corpus, unless that has been done before, in memory that does not grow with it.

    A damaged cache is logged and built again.

    Args:
        corpus: Corpus to read.
        tokenizer: Tokenizer that makes the ids.
        cache_dir: Folder of the caches.
        num_workers: Threads that tokenize; None for one per core. The file does not depend on it.

    Raises:
        ValueError: The corpus has no text, or what it reads is not text (see ``TextFiles``).
    """
    place = TokenPlace(corpus, tokenizer, cache_dir)
    if (whole := find_or_none(place)) is not None:
        return whole
    cache_dir.mkdir(parents=True, exist_ok=True)
    with closing(encoded_batches(corpus, tokenizer, place.dtype, num_workers)) as batches:
        return write_token_file(place, batches)


def write_token_file(place: TokenPlace, batches: Iterator[EncodedBatch]) -> TokenFile:
    """Writes the cache of a corpus from its batches, with progress.

    Args:
        place: Corpus, tokenizer and file.
        batches: All batches of the corpus, in order.

    Raises:
        ValueError: The corpus has no text.
    """
    corpus, tokenizer, dtype = place.corpus, place.tokenizer, place.dtype
    num_skipped, num_bytes, bad_rows, so_far = 0, 0, BadRows(), SoFar()
    with (
        written_whole(place.path) as aside,
        aside.open("wb") as file,
        shown_tokenizing(str(corpus), corpus.num_bytes()) as show,
    ):
        for batch in batches:
            file.write(batch.ids.data)  # tofile does not report a full disk
            num_skipped += batch.num_skipped
            num_bytes += batch.num_bytes
            bad_rows += BadRows(batch.num_bad_rows, batch.first_bad_row)
            so_far = SoFar(
                so_far.num_documents + batch.num_documents,
                so_far.num_tokens + len(batch.ids),
                batch.bytes_read,
            )
            show(so_far)
        if so_far.num_documents == 0:
            skipped = f" ({bad_rows})" if bad_rows.number else ""
            num_read = num_skipped + bad_rows.number
            raise ValueError(f"{corpus}: no text in any of {num_read} documents{skipped}")
    header = {
        "format_version": FORMAT_VERSION,
        "dtype": dtype,
        "num_tokens": so_far.num_tokens,
        "num_documents": so_far.num_documents,
        "num_skipped": num_skipped,
        "num_bytes": num_bytes,
        "num_bad_rows": bad_rows.number,
        "first_bad_row": bad_rows.first,
        "corpus": str(corpus),
        "corpus_fingerprint_sha256": hashlib.sha256(corpus.fingerprint().encode()).hexdigest(),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
    }
    write_whole(place.path.with_suffix(".json"), to_json(header, indent=2))
    counted = so_far.num_tokens, so_far.num_documents, num_skipped
    return TokenFile(place.path, dtype, *counted, num_bytes, bad_rows)


def find_token_file(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, cache_dir: Path
) -> TokenFile:
    """Finds the file that ``build_token_file`` built.

    Raises:
        RuntimeError: It has not been built on this machine.
    """
    whole = find_or_none(TokenPlace(corpus, tokenizer, cache_dir))
    if whole is None:
        raise RuntimeError(f"no tokens of {corpus} in {cache_dir}: prepare_data has to run first")
    return whole


def find_or_none(place: TokenPlace) -> TokenFile | None:
    """The whole cache of a corpus; None where there is none, which is logged if it is damaged."""
    path = place.path
    try:
        header = json.loads(path.with_suffix(".json").read_bytes())
        names = ("dtype", "num_tokens", "num_documents", "num_skipped")
        known = {name: header[name] for name in names}
        # A header of an earlier version counts no bad rows: there were none without ``skip``.
        bad_rows = BadRows(header.get("num_bad_rows", 0), header.get("first_bad_row"))
        whole = TokenFile(path, **known, num_bytes=header.get("num_bytes"), bad_rows=bad_rows)
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
