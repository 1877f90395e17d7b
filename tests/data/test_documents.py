from pathlib import Path

import pytest

from fingpt_lightning.data.corpus import Piece
from fingpt_lightning.data.documents import short_pieces, txt_pieces
from fingpt_lightning.data.tokenizers import train_tokenizer
from fingpt_lightning.data.tokenizing import _encode


@pytest.mark.parametrize(
    ("text", "is_cut"),
    [
        ("Profit rose. " * 9, True),
        ("Profit\nrose\n\n  it " * 9, True),
        ("Profitrose" * 20, True),
        ("", False),
        ("short", False),
    ],
    ids=["words", "lines", "one_word", "empty", "short"],
)
def test_long_documents_are_cut_into_short_pieces(
    text: str, is_cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fingpt_lightning.data.documents._PIECE_BYTES", 40)
    pieces = list(short_pieces([Piece(text, True, 7), Piece("next", True, 9)]))
    assert "".join(piece.text for piece in pieces[:-1]) == text
    assert all(len(piece.text) <= 40 for piece in pieces)
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 2) + [True, True]
    assert (len(pieces) > 2) is is_cut


@pytest.mark.parametrize("text", ["Profit rose. " * 9, "Profit\nrose\n\n  it " * 9])
def test_pieces_have_the_tokens_of_the_whole(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer([text], 280)
    monkeypatch.setattr("fingpt_lightning.data.documents._PIECE_BYTES", 40)
    pieces = list(short_pieces([Piece(text, True)]))
    assert len(pieces) > 2
    whole = _encode([Piece(text, True)], tokenizer, "uint16")
    assert _encode(pieces, tokenizer, "uint16").ids.tolist() == whole.ids.tolist()


def test_a_word_without_end_is_not_held_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fingpt_lightning.data.documents._PIECE_BYTES", 40)
    monkeypatch.setattr("fingpt_lightning.data.documents._LONG_LINE_CHARACTERS", 100)
    path = tmp_path / "a.txt"
    path.write_text("Profitrose" * 100)
    pieces = list(txt_pieces(path, "", "error"))
    assert "".join(piece.text for piece in pieces) == "Profitrose" * 100
    assert max(len(piece.text) for piece in pieces) <= 140
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
