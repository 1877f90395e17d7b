import ast
import errno
import fcntl
import gzip
import math
import os
import re
import resource
from pathlib import Path

import pytest

from fingpt_lightning import files
from fingpt_lightning.files import (
    CountedWriter,
    InUseError,
    NoSpaceError,
    append_whole,
    exchange,
    is_unused,
    lines_of,
    new_folder,
    owned,
    scratch_folder,
    write_json,
    write_whole,
    written_whole,
)
from tests.support.warm_python import run_warm

_KILLED = """
import os, signal, sys
from pathlib import Path
from fingpt_lightning.files import owned, scratch_folder, written_whole
target = Path(sys.argv[1])
with written_whole(target / "file") as aside:
    aside.write_text("half")
    with scratch_folder(target / "folder") as made:
        (made / "half").touch()
        with owned(target / "parts"):
            (target / "parts" / "one").touch()
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def _one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda _: "20260101-000000")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_end_on_the_way_leaves_the_old_file_alone(
    tmp_path: Path, error: type[BaseException]
) -> None:
    write_whole(tmp_path / "file", "old")

    def end_on_the_way() -> None:
        with written_whole(tmp_path / "file") as aside:
            aside.write_text("half")
            raise error

    with pytest.raises(error):
        end_on_the_way()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_file_and_folder_are_on_the_disk_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[bool, bool]] = []

    def note(descriptor: int) -> None:
        is_file = Path(f"/proc/self/fd/{descriptor}").is_file()
        synced.append((is_file, (tmp_path / "file").exists()))

    monkeypatch.setattr(os, "fsync", note)
    write_whole(tmp_path / "file", "new")
    assert synced == [(True, False), (False, True)]


def test_what_killed_processes_left_goes_with_the_next_writer(tmp_path: Path) -> None:
    killed = run_warm(["-c", _KILLED, tmp_path], timeout=60)
    assert killed.returncode < 0
    left = {path.name.rpartition(".")[0].rpartition(".")[0] for path in tmp_path.glob("*.partial")}
    assert left == {"file", "folder"}
    (tmp_path / "file.7-7.partial").mkdir()  # killed before it had its lock
    write_whole(tmp_path / "file", "whole")
    with scratch_folder(tmp_path / "folder") as made:
        made.rename(tmp_path / "folder")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder", "parts"}
    assert (tmp_path / "file").read_text() == "whole"
    with owned(tmp_path / "parts") as parts:  # taken over
        assert {path.name for path in parts.iterdir()} == {"one", "owner.lock"}


def test_what_a_living_process_writes_is_no_leftover(tmp_path: Path) -> None:
    with written_whole(tmp_path / "file") as first, scratch_folder(tmp_path / "folder") as made:
        first.write_text("first")
        write_whole(tmp_path / "file", "second")
        with scratch_folder(tmp_path / "folder"):
            assert made.is_dir()
        assert first.read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_owned_folder_names_its_owner_and_goes_when_it_is_empty(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    with owned(folder):
        with pytest.raises(InUseError) as refused, owned(folder):
            pass
        assert folder.is_dir()
        (folder / "sub").mkdir()
        (folder / "sub" / "a.1-2.partial").touch()
        assert is_unused(folder)
        (folder / "sub" / "a").touch()
        assert not is_unused(folder)
        assert is_unused(folder, "a")
    message = rf"{folder} is in use by process {os.getpid()} on \S+ \({folder}/owner.lock\)"
    refused.match(message)
    assert folder.is_dir()
    with owned(folder):
        files.clear_owned(folder)
    assert not folder.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", fail)
    monkeypatch.setattr(files, "_warned", set())
    for _ in range(2):
        with owned(tmp_path / "parts"):
            write_whole(tmp_path / "parts" / "file", "whole")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "this file system has no locks" in caplog.text


def test_a_full_disk_keeps_the_old_file_and_names_path_and_bytes(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_whole(file, "old")

    def write() -> None:
        with written_whole(file), CountedWriter(Path("/dev/full")) as writer:
            for _ in range(3):
                writer.write(b"x" * 5000)

    with pytest.raises(NoSpaceError) as full:
        write()
    full.match(
        rf"^{file} cannot be written \(No space left on device\): it needs 15,000 bytes,"
        r" [\d.]+ \w+ free; the one that was there is kept$"
    )
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_what_does_not_fit_behind_a_file_is_not_there_at_all(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_whole(file, "old\n")
    append_whole(file, "more\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12, limits[1]))
    try:
        with pytest.raises(NoSpaceError, match=r"file cannot be written \(File too large\): "):
            append_whole(file, "too much\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text() == "old\nmore\n"


def test_a_native_writer_that_meets_a_full_disk_is_understood(tmp_path: Path) -> None:
    with (
        pytest.raises(NoSpaceError, match=r"new cannot be written \(No space left on device\): "),
        written_whole(tmp_path / "new"),
    ):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    for folder in (scratch_folder(tmp_path / "made"), owned(tmp_path / "parts")):
        with pytest.raises(NoSpaceError, match=r"(made|parts) cannot be written"), folder:
            raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NoSpaceError, match=r"database or disk is full"), scratch_folder(tmp_path):
        raise RuntimeError("a commit failed") from ValueError("database or disk is full")


def test_an_error_of_the_writer_is_not_hidden_by_a_full_disk(tmp_path: Path) -> None:
    def fail() -> None:
        with CountedWriter(tmp_path / "file") as writer:
            writer.write(b"x")
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        fail()


def test_two_folders_change_names_in_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if exchange(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "a" / "b").exists()
        assert (tmp_path / "b" / "a").exists()
    assert not exchange(tmp_path / "a", tmp_path / "none")


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


def test_a_line_is_read_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fingpt_lightning.files.MAX_LINE_BYTES", 10)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"123456789\nab")
    assert list(lines_of(path)) == [(1, b"123456789\n", 10), (2, b"ab", 12)]
    path.write_bytes(b"ab\n1234567890\n")
    with pytest.raises(ValueError, match=r"a.jsonl:2: the line is longer than 10 B"):
        list(lines_of(path))


def test_a_gzip_bomb_is_refused_and_its_lines_are_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fingpt_lightning.files._MIN_BOMB_BYTES", 2**20)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress((b"a" * 99_999 + b"\n") * 90))
    with pytest.raises(ValueError, match=r"a.jsonl.gz unpacks to more than 500 times its size"):
        list(lines_of(path))
    path.write_bytes(gzip.compress(b"ab\nc\n"))
    assert [line for _, line, _ in lines_of(path)] == [b"ab\n", b"c\n"]


def test_a_file_that_a_writer_makes_private_is_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("as the mask of the process has it")
    with written_whole(tmp_path / "file") as aside:
        aside.unlink()  # as safetensors does, whose files are their owner's alone
        aside.write_text("weights")
        aside.chmod(0o600)
    usual, made = ((tmp_path / name).stat().st_mode for name in ("usual", "file"))
    assert made == usual
