from pathlib import Path

import pytest

from fingpt_lightning.files import new_folder


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
