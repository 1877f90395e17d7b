"""What the data package requires of a source of text, and how a share of it is held out."""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from fingpt_lightning.data.synthetic_news import synthetic_news

OnBadRow = Literal["error", "skip"]
"""What is done with a row that holds no text: it ends the run, or is skipped and counted."""


class Piece(NamedTuple):
    """A document or a part of one; the pieces of a document join to its text exactly.

    A blank document is one piece with an empty text, and so is a bad row that is skipped.

    Attributes:
        bytes_read: Bytes of the corpus read so far, of its ``num_bytes``.
        problem: Place and fault of a bad row; None of all others.
    """

    text: str
    ends_document: bool
    bytes_read: int = 0
    problem: str | None = None


@runtime_checkable
class Corpus(Protocol):
    """Documents that can be streamed again and again, in the same order."""

    def pieces(self) -> Iterator[Piece]:
        """Streams the documents from the first."""
        ...

    def num_bytes(self) -> int | None:
        """The final value of ``bytes_read``, or None where it is unknown."""
        ...

    def fingerprint(self) -> str:
        """Two corpora of equal fingerprint hold equal documents."""
        ...

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class SyntheticCorpus:
    """The embedded synthetic news as documents."""

    num_items: int
    seed: int

    def pieces(self) -> Iterator[Piece]:
        """Each item is one document."""
        return (Piece(item.text, True) for item in synthetic_news(self.num_items, self.seed))

    def num_bytes(self) -> None:
        """Nothing is read."""

    def fingerprint(self) -> str:
        """The digest of the text itself, so that a better generator makes another corpus."""
        return f"synthetic {_sha256_of_news(self.num_items, self.seed)}"

    def __str__(self) -> str:
        return f"{self.num_items} items of synthetic news"


@dataclass(frozen=True)
class CorpusShare:
    """The documents that are held out of a corpus, or the ones that stay.

    A hash of a document's index decides, so both shares stream and no order matters.
    """

    corpus: Corpus
    share: float
    part: Literal["held out", "kept"]

    def pieces(self) -> Iterator[Piece]:
        """Streams the documents of this part.

        Raises:
            ValueError: There are no documents in this part.
        """
        num_documents = num_taken = 0
        for piece in self.corpus.pieces():
            if _is_held_out(num_documents, self.share) == (self.part == "held out"):
                yield piece
                num_taken += piece.ends_document
            num_documents += piece.ends_document
        if num_taken == 0:
            raise ValueError(
                f"with val_share {self.share} none of the {num_documents} documents of "
                f"{self.corpus} is {self.part}: change val_share or name val_files"
            )

    def num_bytes(self) -> int | None:
        """All of the corpus is read."""
        return self.corpus.num_bytes()

    def fingerprint(self) -> str:
        """The corpus and the rule."""
        return f"{self.part} {self.share} of {self.corpus.fingerprint()}"

    def __str__(self) -> str:
        return f"the {self.part} documents (share {self.share}) of {self.corpus}"


@dataclass(frozen=True)
class JoinedCorpus:
    """The documents of several corpora, one corpus after the other."""

    corpora: tuple[Corpus, ...]

    def pieces(self) -> Iterator[Piece]:
        """Streams all corpora."""
        first_byte = 0
        for corpus in self.corpora:
            for piece in corpus.pieces():
                yield piece._replace(bytes_read=first_byte + piece.bytes_read)
            first_byte += corpus.num_bytes() or 0

    def num_bytes(self) -> int | None:
        """The sum, where each is known."""
        sizes = [corpus.num_bytes() for corpus in self.corpora]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def fingerprint(self) -> str:
        """Fingerprints of the corpora, in their order."""
        return f"joined {[corpus.fingerprint() for corpus in self.corpora]}"

    def __str__(self) -> str:
        return " + ".join(str(corpus) for corpus in self.corpora)


@functools.cache
def _sha256_of_news(num_items: int, seed: int) -> str:
    digest = hashlib.sha256()
    for item in synthetic_news(num_items, seed):
        digest.update(item.text.encode() + b"\0")
    return digest.hexdigest()


def _is_held_out(index: int, share: float) -> bool:
    digest = hashlib.blake2b(f"held out {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64
