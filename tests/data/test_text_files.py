import gzip
import json
import random
import re
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pyarrow import parquet

from fingpt_lightning.data import documents
from fingpt_lightning.data.corpus import Piece
from fingpt_lightning.data.text_files import TextFiles, find_text_files
from fingpt_lightning.data.tokenizers import load_tokenizer, train_tokenizer

_ENDINGS = ".jsonl, .jsonl.gz, .jsonl.zst, .txt, .txt.gz, .txt.zst or .parquet"


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
    for name in ("b/2.txt", "b/1.txt", "a.txt", ".git/x.txt", ".git/x.csv"):
        (tmp_path / name).write_text("x")
    assert [path.relative_to(tmp_path).as_posix() for path in find_text_files(str(tmp_path))] == [
        *("a.txt", "b/1.txt", "b/2.txt")
    ]


def test_files_of_a_folder_that_are_not_read_are_counted_in_one_warning(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "The mill made a profit."}')
    for name in ("b.json", "c.csv", "b/d.csv", "d.csv.zst", "LICENSE"):
        (tmp_path / name).write_text("x")
    message = (
        f"train_files: 5 of the 6 files in {tmp_path} are not read: 2 .csv, 1 .json, 1 .zst,"
        f" 1 LICENSE; text is what ends in {_ENDINGS}"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        assert [path.name for path in find_text_files(str(tmp_path), "train_files")] == ["a.jsonl"]
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"; there are 2 \.csv, 1 \.json, 1 \.zst, 1 LIC"):
        find_text_files(str(tmp_path))


def test_endings_may_be_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "a.JSONL").write_text('{"text": "one"}')
    (tmp_path / "b.TXT").write_text("two")
    (tmp_path / "c.Jsonl.GZ").write_bytes(gzip.compress(b'{"text": "three"}'))
    (tmp_path / "d.txt.GZ").write_bytes(gzip.compress(b"four"))
    assert _documents(str(tmp_path)) == ["one", "two", "three", "four"]


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
        ("empty", FileNotFoundError, "empty has no file that ends in " + _ENDINGS),
        ("*.txt", FileNotFoundError, "train_files: no file matches "),
        ("a.csv", ValueError, "a.csv ends in '.csv', not in " + _ENDINGS),
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


def test_an_empty_path_is_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("not meant")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="train_files: an empty path"):
        find_text_files("", "train_files")


_BAD_LINES = [
    (b"{broken", "no JSON (Expecting property name"),
    (b'{"body": "x"}', "no field 'text'"),
    (b"{}", "no field 'text': the object is empty"),
    (b'{"text": "a", "text": "b"}', "key 'text' is there twice"),
    (b'{"text": 3}', "field 'text' holds a number, not a text"),
    (b'{"text": null}', "field 'text' holds nothing, not a text"),
    (b'{"text": "\xff"}', "no UTF-8 text at byte 10 of the line"),
    (b'{"text": "\\ud800"}', "half a surrogate pair at character 0"),
    (b"[1]", "it holds a list, not an object"),
]


@pytest.mark.parametrize(("line", "fault"), _BAD_LINES)
def test_a_bad_line_is_skipped_in_its_place_where_that_is_requested(
    line: bytes, fault: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "two"}\n')
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: {fault}")):
        list(TextFiles((path,)).pieces())
    one, bad, two = TextFiles((path,), "text", "skip").pieces()
    assert (one.text, one.problem, two.text, two.problem) == ("one", None, "two", None)
    assert (bad.text, bad.ends_document) == ("", True)
    assert bad.problem is not None
    assert bad.problem.startswith(f"{path}:2: {fault}")
    assert bad.bytes_read <= two.bytes_read == path.stat().st_size


def test_rows_of_parquet_are_skipped_but_a_missing_column_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    broken = pa.Array.from_buffers(  # bytes that are no UTF-8, as a careless writer leaves them
        pa.utf8(), 3, pa.array([b"one", b"\xff", None]).buffers()
    )
    parquet.write_table(pa.table({"text": broken}), path)
    pieces = list(TextFiles((path,), "text", "skip").pieces())
    assert [(piece.text, piece.problem) for piece in pieces] == [
        ("one", None),
        ("", f"{path}, row 2: no UTF-8 text"),
        ("", f"{path}, row 3: field 'text' holds nothing, not a text"),
    ]
    with pytest.raises(ValueError, match="row 2: no UTF-8 text"):
        list(TextFiles((path,)).pieces())
    with pytest.raises(ValueError, match="no field 'body'"):
        list(TextFiles((path,), "body", "skip").pieces())


def test_damaged_packed_data_are_not_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n' * 9)[:-9])
    with pytest.raises(ValueError, match="the packed data are damaged or cut off here"):
        list(TextFiles((path,), "text", "skip").pieces())


def test_text_with_rows_skipped_is_another_text(tmp_path: Path) -> None:
    path = _write_jsonl(tmp_path / "a.jsonl", ["x"])
    fingerprints = {TextFiles((path,), "text", rule).fingerprint() for rule in ("error", "skip")}
    assert len(fingerprints) == 2


def test_no_path_is_refused() -> None:
    with pytest.raises(ValueError, match="train_files: no path is given"):
        find_text_files([], "train_files")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'text': 1}", "a.jsonl:2: no JSON (Expecting property name"),
        (b"[" * 100_000, "a.jsonl:2: no JSON (maximum recursion depth"),
        (b'["x"]', "a.jsonl:2: it holds a list, not an object"),
        (b'{"title": "x", "body": "y"}', "a.jsonl:2: no field 'text'; the fields are ['body', 't"),
        (b'{"text": 3}', "a.jsonl:2: field 'text' holds a number, not a text"),
        (b'{"text": null}', "a.jsonl:2: field 'text' holds nothing, not a text"),
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
    monkeypatch.setattr(documents, "_PIECE_BYTES", 2)
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
        patch.setattr(documents, "_PIECE_BYTES", piece_bytes)
        pieces = list(TextFiles((path,)).pieces())
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.text for piece in pieces)
    assert all(piece.text.endswith("\n") for piece in pieces[:-1])


def test_pieces_have_the_tokens_of_the_whole(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_PIECE_BYTES", 3000)
    encode = load_tokenizer(str(shared_data / "tokenizers/gpt2")).backend_tokenizer.encode
    prose = "A paragraph\nof two lines.\n\nAnother one,\n  indented.\n\n\n" * 300
    (tmp_path / "prose.txt").write_text(prose)
    for path in (shared_data / "wikitext2/validation.txt", tmp_path / "prose.txt"):
        text = path.read_text()[:200_000]
        (tmp_path / "a.txt").write_text(text)
        pieces = list(TextFiles((tmp_path / "a.txt",)).pieces())
        assert len(pieces) > 4
        assert [i for piece in pieces for i in encode(piece.text).ids] == encode(text).ids


def test_a_line_that_is_too_long_is_cut_before_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_PIECE_BYTES", 100)
    monkeypatch.setattr(documents, "_LONG_LINE_CHARACTERS", 300)
    text = "shares  rose by 3 % on Monday " * 100 + "\n" + "x" * 2000 + "\nend of it"
    (tmp_path / "a.txt").write_text(text)
    pieces = [piece.text for piece in TextFiles((tmp_path / "a.txt",)).pieces()]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) < 500
    in_the_line = [piece for piece in pieces[1:] if piece.startswith(" ")]
    assert len(in_the_line) > 6
    tokenizer = train_tokenizer([text], 300).backend_tokenizer
    # A word that is as long is cut itself, which is another encoding; before it there is none.
    words = [piece for piece in pieces if "x" not in piece]
    assert len(words) > 8
    found = [i for piece in words[:-1] for i in tokenizer.encode(piece).ids]
    assert found == tokenizer.encode("".join(words[:-1])).ids


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


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".txt", ".txt.gz"])
def test_memory_does_not_grow_with_the_file(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{ending}"
    line = json.dumps({"text": "x" * 5000}) + "\n"
    with (
        gzip.open(path, "wt", compresslevel=1) if ending.endswith("gz") else path.open("w") as file
    ):
        for _ in range(10):
            file.write(line * 1000)
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
    assert next(pieces) == Piece("x", True, 14)
    with pytest.raises(ValueError, match=r"a\.jsonl:2"):
        next(pieces)


def test_packed_files_hold_the_same_documents(tmp_path: Path) -> None:
    texts = ["one\n\ntwo", " ", "thr\u00e9e"]
    plain = _write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.txt").write_text("first\n\nsecond\n")
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    _write_parquet(tmp_path / "c.parquet", texts)
    expected = ["one\n\ntwo", "", "thr\u00e9e"]
    assert _documents(str(plain)) == expected
    assert _documents(str(tmp_path / "a.jsonl.gz")) == expected
    assert _documents(str(tmp_path / "c.parquet")) == expected
    assert _documents(str(tmp_path / "b.txt.gz")) == ["first\n\nsecond\n"]
    assert len(find_text_files(str(tmp_path))) == 5


def _write_parquet(path: Path, texts: Sequence[object], field: str = "text") -> Path:
    table = pa.table({field: pa.array(texts), "id": list(range(len(texts)))})
    parquet.write_table(table, path, row_group_size=3)
    return path


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_every_kind_of_text_column_is_read(kind: str, tmp_path: Path) -> None:
    types = {
        "string": pa.string(),
        "large_string": pa.large_string(),
        "string_view": pa.string_view(),
        "dictionary": pa.dictionary(pa.int32(), pa.string()),
    }
    texts = [f"document {index % 5}" for index in range(200)]
    table = pa.table({"text": pa.array(texts).cast(types[kind])})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert _documents(str(tmp_path)) == texts


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["fine", None], "a.parquet, row 2: field 'text' holds nothing, not a text"),
        ([3, 4], "a.parquet, row 1: field 'text' holds a number, not a text"),
    ],
)
def test_a_bad_row_is_named(texts: list[object], message: str, tmp_path: Path) -> None:
    path = _write_parquet(tmp_path / "a.parquet", texts)
    with pytest.raises(ValueError, match=re.escape(message)):
        _documents(str(path))


def test_a_missing_column_names_the_nearest(tmp_path: Path) -> None:
    path = _write_parquet(tmp_path / "a.parquet", ["x"], field="txt")
    message = "a.parquet: no field 'text'; did you mean 'txt'? The fields are ['id', 'txt']"
    with pytest.raises(ValueError, match=re.escape(message)):
        _documents(str(path))


def _no_parquet(path: Path) -> str:
    path.write_text('{"text": "x"}')
    return "a.parquet: no parquet data (Parquet magic bytes not found in footer"


def _cut_off_parquet(path: Path) -> str:
    path.write_bytes(_write_parquet(path, ["x"] * 9).read_bytes()[:-20])
    return "a.parquet: no parquet data ("


def _damaged_parquet(path: Path) -> str:
    data = bytearray(_write_parquet(path, [f"number {index}" for index in range(9)]).read_bytes())
    data[10:20] = b"\xff" * 10
    path.write_bytes(data)
    return "a.parquet: no parquet data ("


@pytest.mark.parametrize("make", [_no_parquet, _cut_off_parquet, _damaged_parquet])
def test_a_file_that_is_no_whole_parquet_is_named(
    make: Callable[[Path], str], tmp_path: Path
) -> None:
    path = tmp_path / "a.parquet"
    message = make(path)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        _documents(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl.gz",
            b"no gzip",
            "a.jsonl.gz:1: the packed data are damaged or cut off here (No",
        ),
        ("a.txt.gz", b"no gzip", "a.txt.gz, text byte 0: the packed data are damaged or cut off"),
    ],
)
def test_a_file_that_is_no_gzip_is_named(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        _documents(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "a.jsonl.gz",
            r"a\.jsonl\.gz:\d+: the packed data are damaged or cut off here \(C",
        ),
        (
            "a.txt.gz",
            r"a\.txt\.gz, text byte \d+: the packed data are damaged or cut off here \(C",
        ),
    ],
)
def test_a_cut_off_gzip_is_named(name: str, message: str, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"{index * 7919}"}) + "\n" for index in range(3000))
    (tmp_path / name).write_bytes(gzip.compress(lines.encode())[:-500])
    with pytest.raises(ValueError, match=message):
        _documents(str(tmp_path / name))


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".txt", ".txt.gz", ".parquet"])
def test_bytes_read_grow_to_the_sizes_of_the_files(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_PIECE_BYTES", 1000)
    texts = [f"text {index}" for index in range(200)]
    for name in "ab":
        path = tmp_path / f"{name}{ending}"
        if ending == ".parquet":
            _write_parquet(path, texts)
        else:
            content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
            path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    corpus = TextFiles(find_text_files(str(tmp_path)))
    read = [piece.bytes_read for piece in corpus.pieces()]
    sizes = [path.stat().st_size for path in corpus.paths]
    assert read == sorted(read)
    assert read[-1] == corpus.num_bytes() == sum(sizes)
    assert sizes[0] in read
    if not ending.endswith(".gz"):  # small gzip files are read in one go
        assert read[0] < sizes[0]


def test_memory_does_not_grow_with_a_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    schema = pa.schema({"text": pa.string()})
    with parquet.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for _ in range(10):
            texts = [random.randbytes(2500).hex() for _ in range(1000)]
            writer.write_table(pa.table({"text": texts}, schema))
    pool = pa.default_memory_pool()
    before = peak = pool.bytes_allocated()
    num_characters = 0
    for piece in TextFiles((path,)).pieces():
        num_characters += len(piece.text)
        peak = max(peak, pool.bytes_allocated())
    assert num_characters == 50e6
    assert 0 < peak - before < 12e6
