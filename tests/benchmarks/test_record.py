import json
from pathlib import Path

import pytest

from benchmarks.record import markdown_table, new_record, spread, write_record


def test_a_record_says_what_made_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "question.json"
    record = new_record("How fast?", {"seed": 1})
    write_record(path, record, markdown_table(["", "s"], [["dense", "1.0"]]))
    read = json.loads(path.read_text())
    assert set(read) == {
        "question", "command", "commit", "dirty", "started_at", "machine", "versions", "config",
    }  # fmt: skip
    assert read["machine"]["cores"] >= 1
    assert {"python", "torch", "lightning"} <= set(read["versions"])
    table = path.with_suffix(".md").read_text()
    assert "How fast?" in table
    assert "| dense | 1.0 |" in table
    assert {child.name for child in path.parent.iterdir()} == {"question.json", "question.md"}


def test_a_record_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than 50000"):
        write_record(tmp_path / "x.json", {"question": "", "command": "x" * 60_000}, "")
    assert not list(tmp_path.iterdir())


def test_the_spread_of_one_value_is_that_value() -> None:
    assert spread([2.0]) == {"median": 2.0, "p10": 2.0, "p90": 2.0}
    assert spread([float(x) for x in range(11)]) == {"median": 5.0, "p10": 1.0, "p90": 9.0}
