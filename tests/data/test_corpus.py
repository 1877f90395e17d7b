from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fingpt_lightning.data.corpus import Corpus, CorpusShare, JoinedCorpus, Piece, SyntheticCorpus
from fingpt_lightning.data.synthetic_news import synthetic_news


class _Words:
    """Documents of the given numbers of pieces."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def pieces(self) -> Iterator[Piece]:
        for document, size in enumerate(self.sizes):
            for index in range(size):
                yield Piece(f"{document}.{index} ", index == size - 1, document + 1)

    def num_bytes(self) -> int:
        return len(self.sizes)

    def fingerprint(self) -> str:
        return f"words {self.sizes}"

    def __str__(self) -> str:
        return "words"


@given(sizes=st.lists(st.integers(1, 3), min_size=60, max_size=200), share=st.floats(0.2, 0.8))
def test_each_document_is_held_out_or_kept_whole(sizes: list[int], share: float) -> None:
    corpus: Corpus = _Words(sizes)
    held_out = list(CorpusShare(corpus, share, "held out").pieces())
    kept = list(CorpusShare(corpus, share, "kept").pieces())
    assert sorted(held_out + kept) == sorted(corpus.pieces())
    assert not {piece.text.split(".")[0] for piece in held_out} & {
        piece.text.split(".")[0] for piece in kept
    }


def test_about_the_share_is_held_out() -> None:
    held_out = CorpusShare(_Words([1] * 20_000), 0.05, "held out")
    assert len(list(held_out.pieces())) == pytest.approx(1000, rel=0.1)


def test_a_share_without_documents_names_the_way_out() -> None:
    message = "with val_share 0.01 none of the 3 documents of words is held out: change val_share"
    with pytest.raises(ValueError, match=message):
        list(CorpusShare(_Words([1, 1, 1]), 0.01, "held out").pieces())


def test_fingerprints_tell_corpora_apart() -> None:
    news = SyntheticCorpus(5, seed=1)
    corpora: list[Corpus] = [
        news,
        SyntheticCorpus(6, seed=1),
        SyntheticCorpus(5, seed=2),
        CorpusShare(news, 0.5, "kept"),
        CorpusShare(news, 0.5, "held out"),
        CorpusShare(news, 0.4, "kept"),
        JoinedCorpus((news, news)),
        JoinedCorpus((news, CorpusShare(news, 0.5, "kept"))),
        JoinedCorpus((CorpusShare(news, 0.5, "kept"), news)),
    ]
    assert len({corpus.fingerprint() for corpus in corpora}) == len(corpora)
    assert SyntheticCorpus(5, seed=1).fingerprint() == news.fingerprint()


def test_joined_corpora_follow_each_other_and_count_on() -> None:
    first, second, news = _Words([2, 1]), _Words([1]), SyntheticCorpus(2, seed=1)
    both = JoinedCorpus((first, second))
    assert list(both.pieces()) == [
        Piece("0.0 ", False, 1),
        Piece("0.1 ", True, 1),
        Piece("1.0 ", True, 2),
        Piece("0.0 ", True, 3),
    ]
    assert both.num_bytes() == CorpusShare(both, 0.5, "kept").num_bytes() == 3
    assert JoinedCorpus((first, news)).num_bytes() is None
    assert str(both) == "words + words"


def test_synthetic_documents_are_the_news() -> None:
    texts = [piece.text for piece in SyntheticCorpus(3, seed=1).pieces()]
    assert texts == [item.text for item in synthetic_news(3, seed=1)]
