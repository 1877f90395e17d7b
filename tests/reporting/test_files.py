from pathlib import Path

import pytest

from fingpt_lightning.reporting.files import read_config, read_metrics, read_object, read_objects


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,loss\n0,1.5\n1,abc\n", r"metrics\.csv:3: loss is 'abc', which is not a number"),
        ("step,loss\n0,1.5\n1\n", r"metrics\.csv:3: 1 cells, and the header has 2"),
        ("loss\n1.5\n", r"metrics\.csv:1: there is no column step"),
        ("step,loss\n,1.5\n", r"metrics\.csv:2: there is no step"),
    ],
    ids=["word", "cut", "header", "step"],
)
def test_a_broken_line_of_figures_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_metrics(path)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,loss\n0,\xff\n")
    with pytest.raises(ValueError, match=r"metrics\.csv:2: no UTF-8 text at byte 12 of the file"):
        read_metrics(path)


def test_half_a_line_at_the_end_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    for half in ("", "1", "1,0.", "1,0.25", "1,0.25\r"):
        path.write_bytes(f"step,loss\r\n0,0.5\r\n{half}".encode())
        assert read_metrics(path) == [{"step": 0.0, "loss": 0.5}]
    path.write_text("step,lo")
    assert read_metrics(path) == []


def test_empty_cells_have_no_entry_and_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert read_metrics(path) == []
    path.write_text("")
    assert read_metrics(path) == []
    path.write_text("step,loss,nan\n0,,nan\n")
    (row,) = read_metrics(path)
    assert set(row) == {"step", "nan"}


def test_broken_objects_and_settings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text('{"a": 1,\n b}')
    with pytest.raises(ValueError, match=r"file:2: Expecting property name"):
        read_object(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"file:1: it holds a list, not an object"):
        read_object(path)
    path.write_text('{"a": 1}\n{"a": 1, "a": 2}\n')
    with pytest.raises(ValueError, match="file:2: key 'a' is there twice"):
        read_objects(path, {})
    path.write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(ValueError, match=r"file:2: Expecting ':'"):
        read_objects(path, {})
    path.write_text("a: 1\nb: [1\n")
    with pytest.raises(ValueError, match=r"file:3: "):
        read_config(path)
    path.write_text("just words")
    with pytest.raises(ValueError, match="it holds a text, not settings"):
        read_config(path)
