import gzip
import json
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fingpt_lightning import files
from fingpt_lightning.tasks import find_task, read_rows, row_files
from fingpt_lightning.tasks.row_files import CsvForm, open_rows

ROWS: list[dict[str, object]] = [{"text": "Umsatz \u00e4ndert", "label": "up"}, {"text": "b\nc"}]


def _zstd(data: bytes) -> bytes:
    packed = pyarrow.compress(data, codec="zstd", asbytes=True)
    assert isinstance(packed, bytes)
    return packed


_PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": _zstd}
_FORMS: dict[str, str] = {
    ".jsonl": "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in ROWS),
    ".json": json.dumps(ROWS, indent=1),
    ".csv": 'text,label\nUmsatz \u00e4ndert,up\n"b\nc"\n',
    ".tsv": 'text\tlabel\r\nUmsatz \u00e4ndert\tup\r\n"b\nc"\r\n',
}


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _read(path: Path, form: CsvForm | None = None) -> list[Mapping[str, object]]:
    return [row for _, row in open_rows(path, form)]


@pytest.mark.parametrize("packed", _PACK)
@pytest.mark.parametrize("ending", _FORMS)
def test_every_form_is_read_packed_or_not(ending: str, packed: str, tmp_path: Path) -> None:
    data = _PACK[packed](_FORMS[ending].encode())
    assert _read(_write(tmp_path / f"a{ending}{packed}", data)) == ROWS


@pytest.mark.parametrize("text", [json.dumps(ROWS), f"\ufeff \n{json.dumps(ROWS)}\n"])
@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_an_array_is_read_whatever_its_ending(ending: str, text: str, tmp_path: Path) -> None:
    assert list(open_rows(_write(tmp_path / f"a{ending}", text.encode()))) == [
        (1, ROWS[0]),
        (2, ROWS[1]),
    ]
    assert _read(_write(tmp_path / f"b{ending}", b"[]")) == []


def test_lines_in_a_json_file_and_an_object_of_objects_are_rows(tmp_path: Path) -> None:
    assert _read(_write(tmp_path / "a.json", _FORMS[".jsonl"].encode())) == ROWS
    named = {"4": ROWS[0], 'a "b"': ROWS[1]}
    assert _read(_write(tmp_path / "b.json", json.dumps(named, indent=2).encode())) == ROWS


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@settings(max_examples=40)
@given(
    st.lists(st.dictionaries(st.text(max_size=3), _values, max_size=3), max_size=4),
    st.sampled_from([None, 1]),
    st.integers(1, 9),
)
def test_arrays_are_read_alike_wherever_their_parts_end(
    rows: list[dict[str, object]], indent: int | None, size: int
) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(row_files, "_CHUNK_BYTES", size)
        path = Path(folder) / "a.json"
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), "utf-8")
        assert _read(path) == rows


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv_is_read_alike_wherever_its_parts_end(
    end: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "_CHUNK_BYTES", size)
    text = f'a,b{end}1,"x{end}\u20acy"{end}{end}2,z'
    rows = list(open_rows(_write(tmp_path / "a.csv", text.encode())))
    assert rows == [(2, {"a": "1", "b": f"x{end}\u20acy"}), (5, {"a": "2", "b": "z"})]


@pytest.mark.parametrize(
    ("header", "values"),
    [
        ("text;label", "a, b;c"), ("text\tlabel", "a, b\tc"), ("text|label", "a, b|c"),
        ('text,"label;x|"', '"a, b",c'), ("text,lab;el", '"a, b",c'),
    ],
)  # fmt: skip
def test_the_separator_is_the_only_one_in_the_header(
    header: str, values: str, tmp_path: Path
) -> None:
    (row,) = _read(_write(tmp_path / "a.csv", f"{header}\n{values}\n".encode()))
    assert list(row.values()) == ["a, b", "c"]


def test_a_wrong_separator_is_named_and_a_given_one_is_taken(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.csv", b"a;b|c\n1;2|3\n1;2|3|4\n")
    assert _read(path, CsvForm(separator=";"))[0] == {"a": "1", "b|c": "2|3"}
    with pytest.raises(ValueError, match=r"a\.csv:3: 3 values, more than the header's 2 names$"):
        _read(path, CsvForm(separator="|"))
    path = _write(tmp_path / "a.csv", b"a,b\n1,2,3\n")
    with pytest.raises(ValueError, match=r"2 names; the separator is taken to be ','$"):
        _read(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_a_byte_order_mark_tells_the_encoding(encoding: str, tmp_path: Path) -> None:
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    path = _write(tmp_path / "a.csv", (mark + _FORMS[".csv"]).encode(encoding))
    assert _read(path) == ROWS


def test_what_is_not_utf8_is_named_and_read_with_its_encoding(tmp_path: Path) -> None:
    for name in ("a.csv", "a.csv.gz"):
        data = _FORMS[".csv"].encode("cp1252")
        path = _write(tmp_path / name, _PACK[Path(name).suffix.replace(".csv", "")](data))
        message = f"{path}:2: no UTF-8 text at byte 18 of the file; set encoding, such as cp1252"
        with pytest.raises(ValueError, match=re.escape(message)):
            _read(path)
        assert _read(path, CsvForm(encoding="cp1252")) == ROWS
        with pytest.raises(
            ValueError, match=re.escape(f"{path}:2: no ascii text at byte 18 of the")
        ):
            _read(path, CsvForm(encoding="ascii"))
        assert _read(path, CsvForm(fallback="cp1252")) == ROWS
    path = _write(tmp_path / "a.csv", _FORMS[".csv"].encode())
    assert _read(path, CsvForm(fallback="cp1252")) == ROWS


def test_a_file_without_header_has_the_columns_that_are_known(tmp_path: Path) -> None:
    form = CsvForm(columns=("label", "text"), headers=(frozenset(("text", "label")),))
    assert _read(_write(tmp_path / "a.csv", b"up,Profit rose\n"), form) == [
        {"label": "up", "text": "Profit rose"}
    ]
    with_header = _write(tmp_path / "b.csv", b"id,text,label\n1,Profit rose,up\n")
    assert _read(with_header, form)[0]["text"] == "Profit rose"


def test_kaggles_phrasebank_is_read_and_cut_as_the_sentence_file_is(tmp_path: Path) -> None:
    rows = [("neutral", f'It is "{i}", \u00e4h .') for i in range(7)] + [("positive", "Up .")]
    (tmp_path / "fpb").mkdir()
    quoted = "".join(f'{label},"{text.replace(chr(34), 2 * chr(34))}"\n' for label, text in rows)
    lines = "".join(f"{text}@{label}\n" for label, text in rows)
    (tmp_path / "fpb" / "all-data.csv").write_bytes(quoted.encode("iso-8859-1"))
    task = find_task("fpb")
    kaggle = {split: read_rows(task, tmp_path, split).examples for split in ("train", "test")}
    assert [len(kaggle[split]) for split in ("train", "test")] == [6, 2]
    (tmp_path / "fpb" / "Sentences_50Agree.txt").write_bytes(lines.encode("iso-8859-1"))
    for split, found in kaggle.items():
        assert read_rows(task, tmp_path, split).examples == found


def test_settings_of_csv_are_checked(tmp_path: Path) -> None:
    (tmp_path / "tfns").mkdir()
    _write(tmp_path / "tfns" / "train.jsonl", b'{"text": "a", "label": 1}\n')
    _write(tmp_path / "tfns" / "test.csv", "text~label\n\u00e4~1\n".encode("cp1252"))
    task = find_task("tfns")
    (example,) = read_rows(task, tmp_path, "test", separator="~", encoding="cp1252").examples
    assert (example.text, example.gold) == ("\u00e4", 2)
    wrong: list[tuple[dict[str, Any], str]] = [
        (
            {"separator": "~"},
            r"separator '~' has an effect on \.csv and \.tsv alone, not on ",
        ),
        ({"encoding": "cp1252"}, r"encoding 'cp1252' has an effect on \.csv and"),
        ({"separator": "<>"}, r"separator '<>' is not one character such as"),
        ({"encoding": "latin9x"}, r"encoding 'latin9x' is not known; such as utf-8"),
        ({"encoding": "hex"}, r"encoding 'hex' is not known"),
    ]
    for given_settings, message in wrong:
        with pytest.raises(ValueError, match=message):
            read_rows(task, tmp_path, "train", **given_settings)
    with pytest.raises(ValueError, match="separator ';' has an effect with data_dir alone"):
        read_rows(task, None, "train", separator=";")


@pytest.mark.parametrize("ending", [".jsonl.zst", ".csv.zst", ".json.zst", ".csv.gz", ".json.gz"])
def test_damaged_packed_files_are_named(ending: str, tmp_path: Path) -> None:
    pack = _PACK[Path(ending).suffix]
    data = pack(_FORMS[Path(ending).stem].encode())
    for broken in (data[:-3], b"no packed data"):
        path = _write(tmp_path / f"a{ending}", broken)
        kind = "Zstandard" if ending.endswith("zst") else "gzip"
        with pytest.raises(
            ValueError, match=re.escape(f"{path} is not a whole {kind} file (")
        ) as told:
            _read(path)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_bombs_are_refused(
    ending: str, packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_MIN_BOMB_BYTES", 2**18)
    start = {".jsonl": b'{"a": "', ".json": b'[{"a": "', ".csv": b'a\n"'}[ending]
    path = _write(tmp_path / f"a{ending}{packed}", _PACK[packed](start + b"\n" * 2**22))
    with pytest.raises(ValueError, match=r"unpacks to more than 500 times its size|no JSON"):
        _read(path)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv"])
def test_one_endless_line_is_refused(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (files, row_files):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(row_files, "_CHUNK_BYTES", 100)
    start = {".jsonl": b'{"a": "', ".json": b'[{"a": "'}.get(ending, b'a\n"')
    path = _write(tmp_path / f"a{ending}", start + b"x" * 9000 + b'"')
    with pytest.raises(ValueError, match=r"longer than 1000 B|field larger than field limit"):
        _read(path)


def _book(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.create_sheet("Notes").append(["not", "read"])
    book.save(path)
    return path


def test_the_first_sheet_of_an_excel_file_is_read(tmp_path: Path) -> None:
    rows: list[list[object]] = [
        ["text", "label", None],
        ["Profit rose", 1, None],
        [None, None, None],
        ["x", None, None],
    ]
    path = _book(tmp_path / "a.xlsx", rows)
    assert list(open_rows(path)) == [
        (2, {"text": "Profit rose", "label": 1}),
        (4, {"text": "x", "label": None}),
    ]


def test_a_wrong_excel_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _book(tmp_path / "a.xlsx", [["text"], ["a", "b"]])
    with pytest.raises(ValueError, match=r"a\.xlsx:2: 2 values, more than the header's 1"):
        _read(path)
    with pytest.raises(ValueError, match=r"b\.xlsx is not a whole Excel file \(File is not a zip"):
        _read(_write(tmp_path / "b.xlsx", b"PK no zip"))
    bomb = _book(tmp_path / "c.xlsx", [["text"], ["a"]])
    with zipfile.ZipFile(bomb, "a", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("xl/more.xml", b"\0" * 2**23)
    monkeypatch.setattr(files, "_MIN_BOMB_BYTES", 2**18)
    with pytest.raises(ValueError, match=r"c\.xlsx unpacks to more than 500 times its size"):
        _read(bomb)
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ImportError, match=r"need the package openpyxl: pip install 'fingpt-lightn"):
        _read(bomb)
    with pytest.raises(ValueError, match=r"d\.xls ends in none of .*; save it as \.xlsx"):
        _read(tmp_path / "d.xls")
