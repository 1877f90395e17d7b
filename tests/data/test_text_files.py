import json
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fingpt_lightning.data import text_files
from fingpt_lightning.data.corpus import Piece
from fingpt_lightning.data.text_files import TextFiles, find_text_files
from fingpt_lightning.data.tokenizers import load_tokenizer


def _write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def _documents(paths: str | list[str], text_field: str = "text") -> list[str]:
    texts = [""]
    for piece in TextFiles(find_text_files(paths), text_field).pieces():
        texts[-1] += piece.text
        if piece.ends_document:
            texts.append("")
    return texts[:-1]


def test_a_line_of_jsonl_and_a_txt_file_are_one_document_each(tmp_path: Path) -> None:
    lines = _write_jsonl(tmp_path / "a.jsonl", ["one\n\ntwo", "thr\u00e9e"])
    (tmp_path / "b.txt").write_text("first\n\nsecond\n")
    assert _documents([str(lines), str(tmp_path / "b.txt")]) == [
        *("one\n\ntwo", "thr\u00e9e", "first\n\nsecond\n")
    ]


def test_the_text_field_can_be_named(tmp_path: Path) -> None:
    path = _write_jsonl(tmp_path / "a.jsonl", ["x"], field="body")
    assert _documents(str(path), text_field="body") == ["x"]


def test_blank_documents_are_empty_pieces(tmp_path: Path) -> None:
    path = _write_jsonl(tmp_path / "a.jsonl", ["x", " \n", ""])
    path.write_text(path.read_text() + "\n  \n")
    (tmp_path / "b.txt").write_text(" \n\t")
    (tmp_path / "c.txt").write_text("")
    assert _documents(str(tmp_path)) == ["x", "", "", "", ""]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "x"}\n')
    (tmp_path / "b.txt").write_text("\ufeffy")
    assert _documents(str(tmp_path)) == ["x", "y"]


def test_folders_are_recursive_sorted_and_without_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b/2.txt", "b/1.txt", "a.txt", "c.md", ".git/x.txt"):
        (tmp_path / name).write_text("x")
    assert [path.relative_to(tmp_path).as_posix() for path in find_text_files(str(tmp_path))] == [
        *("a.txt", "b/1.txt", "b/2.txt")
    ]


def test_globs_are_sorted_and_a_file_is_taken_once(tmp_path: Path) -> None:
    for name in ("2.txt", "1.txt", "3.jsonl"):
        (tmp_path / name).write_text("x")
    found = find_text_files([str(tmp_path / "2.txt"), str(tmp_path / "*.txt")])
    assert [path.name for path in found] == ["2.txt", "1.txt"]


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (
            "trian.jsonl",
            FileNotFoundError,
            "trian.jsonl does not exist; the nearest name there is ",
        ),
        ("no/a.txt", FileNotFoundError, "no/a.txt does not exist: there is no folder "),
        ("empty", FileNotFoundError, "empty has no file that ends in .jsonl or .txt"),
        ("*.txt", FileNotFoundError, "train_files: no file matches "),
        ("a.csv", ValueError, "a.csv ends in '.csv', not in .jsonl or .txt"),
    ],
)
def test_a_path_without_text_is_refused(
    path: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(error, match=re.escape(message)) as raised:
        find_text_files(str(tmp_path / path), "train_files")
    assert str(raised.value).startswith("train_files: ")
    assert "\n" not in str(raised.value)


def test_no_path_is_refused() -> None:
    with pytest.raises(ValueError, match="train_files: no path is given"):
        find_text_files([], "train_files")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'text': 1}", "a.jsonl:2: no JSON (Expecting property name"),
        (b"[" * 100_000, "a.jsonl:2: no JSON (maximum recursion depth"),
        (b'["x"]', "a.jsonl:2: a JSON list where an object is needed"),
        (b'{"title": "x", "body": "y"}', "a.jsonl:2: no field 'text'; the fields are ['body', 't"),
        (b'{"text": 3}', "a.jsonl:2: field 'text' holds a int, not a string"),
        (b'{"text": null}', "a.jsonl:2: field 'text' holds a NoneType, not a string"),
        (b'{"text": "\xff"}', "a.jsonl:2: no UTF-8 text at byte 10 of the line"),
        (b'{"text": "ab\\ud800"}', "a.jsonl:2: half a surrogate pair at character 2"),
    ],
)
def test_a_bad_line_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        _documents(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"ab\xffcd", "a.txt: no UTF-8 text at byte 2"),
        (b"abc\xe2\x82", "a.txt: no UTF-8 text at byte 3"),
        (b"abcd\xe2\x82x", "a.txt: no UTF-8 text at byte 4"),
        (b"abcde\0", "a.txt: binary data, a zero byte at 5"),
    ],
)
def test_bytes_that_are_no_text_are_named(
    data: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "_PIECE_BYTES", 2)
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)):
        _documents(str(tmp_path / "a.txt"))


@given(
    text=st.text(alphabet="ab\n \t\r\u00e9\u20ac", max_size=60).filter(str.strip),
    piece_bytes=st.integers(1, 20),
)
@example(text="a \n", piece_bytes=3)
def test_pieces_of_a_txt_file_join_exactly_and_end_at_line_ends(
    text: str, piece_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_PIECE_BYTES", piece_bytes)
        pieces = list(TextFiles((path,)).pieces())
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.text for piece in pieces)
    assert all(piece.text.endswith("\n") for piece in pieces[:-1])


def test_pieces_have_the_tokens_of_the_whole(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "_PIECE_BYTES", 3000)
    encode = load_tokenizer(str(shared_data / "tokenizers/gpt2")).backend_tokenizer.encode
    prose = "A paragraph\nof two lines.\n\nAnother one,\n  indented.\n\n\n" * 300
    (tmp_path / "prose.txt").write_text(prose)
    for path in (shared_data / "wikitext2/validation.txt", tmp_path / "prose.txt"):
        text = path.read_text()[:200_000]
        (tmp_path / "a.txt").write_text(text)
        pieces = list(TextFiles((tmp_path / "a.txt",)).pieces())
        assert len(pieces) > 4
        assert [i for piece in pieces for i in encode(piece.text).ids] == encode(text).ids


def test_the_fingerprint_follows_contents_order_and_field_but_not_names(tmp_path: Path) -> None:
    first, second, copy = tmp_path / "1.txt", tmp_path / "2.txt", tmp_path / "3.txt"
    first.write_text("x")
    second.write_text("y")
    copy.write_text("x")
    before = TextFiles((first, second)).fingerprint()
    assert TextFiles((copy, second)).fingerprint() == before
    assert TextFiles((second, first)).fingerprint() != before
    assert TextFiles((first, second), "body").fingerprint() != before
    first.write_text("longer")
    assert TextFiles((first, second)).fingerprint() != before


@pytest.mark.parametrize("ending", [".jsonl", ".txt"])
def test_memory_does_not_grow_with_the_file(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{ending}"
    line = json.dumps({"text": "x" * 5000}) + "\n"
    with path.open("w") as file:
        for _ in range(10):
            file.write(line * 1000)
    assert path.stat().st_size > 50e6
    num_characters = 0
    tracemalloc.start()
    try:
        for piece in TextFiles((path,)).pieces():
            num_characters += len(piece.text)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_characters >= 50e6
    assert peak_bytes < 12e6


def test_a_document_is_yielded_before_the_next_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\nno JSON\n')
    pieces = TextFiles((path,)).pieces()
    assert next(pieces) == Piece("x", True)
    with pytest.raises(ValueError, match=r"a\.jsonl:2"):
        next(pieces)
