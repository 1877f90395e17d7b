import ast
import math
import re
from pathlib import Path

import pytest

from fingpt_lightning.files import new_folder, write_json


@pytest.fixture(autouse=True)
def _one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda _: "20260101-000000")


def test_two_of_one_second_have_a_folder_each(tmp_path: Path) -> None:
    folders = [new_folder(tmp_path / "runs", "rank") for _ in range(3)]

    name = "rank-20260101-000000"
    assert [folder.name for folder in folders] == [name, f"{name}-2", f"{name}-3"]
    assert all(folder.is_dir() for folder in folders)


def test_a_name_is_passed_over_where_a_file_has_it(tmp_path: Path) -> None:
    (tmp_path / "rank-20260101-000000").touch()

    assert new_folder(tmp_path, "rank").name == "rank-20260101-000000-2"


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()

    with pytest.raises(OSError, match="runs"):
        new_folder(tmp_path / "runs", "rank")


def test_json_names_the_file_and_the_place_of_a_number_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"tasks": {"fpb": [0.5, 1]}})
    before = path.read_bytes()
    for value in (math.nan, math.inf, -math.inf):
        found = {"tasks": {"fpb": [0.5, value]}}
        message = f"{path}: tasks.fpb.1 is {value}, which JSON cannot hold"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            write_json(path, found)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_no_file_is_written_by_a_writer_of_json_that_lets_nan_pass() -> None:
    root = Path(__file__).parents[1]
    writers = {"write_whole", "write_text", "write_bytes", "write", "write_tensors", "writelines"}
    found, num_read = [], 0
    for path in (p for name in ("fingpt_lightning", "callbacks") for p in (root / name).rglob("*")):
        if path.suffix != ".py" or path == root / "fingpt_lightning" / "files.py":
            continue
        num_read += 1
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _name(node) in writers:
                inner = (each for value in node.args for each in ast.walk(value))
                if any(isinstance(x, ast.Call) and _name(x) in ("dump", "dumps") for x in inner):
                    found.append(f"{path.relative_to(root)}:{node.lineno}")
    assert num_read > 100
    assert found == [], "write_json or to_json refuses what json.dumps lets pass"


def _name(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
