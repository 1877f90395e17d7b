"""Configs and sweeps that come with the package are found by name, from any folder."""

from pathlib import Path

import pytest

from fingpt_lightning.cli.errors import ConfigError
from fingpt_lightning.cli.shipped import (
    CONFIGS,
    SWEEPS,
    find_file,
    shipped_files,
    with_config_files,
)

_REPOSITORY = Path(__file__).parents[2]
_QUICKSTART = _REPOSITORY / "configs" / "quickstart.yaml"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "given", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml", "configs/quickstart"]
)
def test_a_shipped_config_is_found_by_each_of_its_names(given: str) -> None:
    assert find_file(given, CONFIGS, "--config") == _QUICKSTART


def test_overlays_and_sweeps_have_names_too() -> None:
    overlay = find_file("overlays/ddp", CONFIGS, "--config")
    assert overlay == _REPOSITORY / "configs" / "overlays" / "ddp.yaml"
    assert find_file("quick_rank", SWEEPS, "sweep") == _REPOSITORY / "sweeps" / "quick_rank.yaml"


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_a_file_of_the_working_directory_comes_first(name: str) -> None:
    Path("quickstart").mkdir()  # a folder is not a config
    assert find_file(name, CONFIGS, "--config") == _QUICKSTART
    Path("quickstart.yaml").write_text("seed_everything: 2\n")
    assert find_file(name, CONFIGS, "--config") == Path("quickstart.yaml")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("quikstart", "did you mean quickstart?"),
        ("ddp", "did you mean overlays/ddp?"),
        ("configs/pretrain_gpt2_smal.yaml", "did you mean pretrain_gpt2_small?"),
        ("mine/runn.yaml", "did you mean mine/run.yaml?"),
        ("zzz", "fingpt configs lists them"),
    ],
)
def test_a_wrong_name_gets_the_nearest_right_one(given: str, message: str) -> None:
    Path("mine").mkdir()
    Path("mine/run.yaml").write_text("seed_everything: 2\n")
    with pytest.raises(ConfigError) as error:
        find_file(given, CONFIGS, "--config")
    assert str(error.value) == (
        f"--config {given}: no such file, and no shipped config of that name; {message}"
    )


def test_the_values_of_config_alone_become_files() -> None:
    words = ["fit", "--config", "quickstart", "--config=overlays/ddp", "-c", "quickstart", "--x",
             "quickstart", "--config", "{seed_everything: 3}", "--config", "a:\n  b: 1",
             "--config", "trainer: {}"]  # fmt: skip
    found = with_config_files(words)
    assert found[2] == found[5] == str(_QUICKSTART)
    assert found[3] == f"--config={_REPOSITORY / 'configs' / 'overlays' / 'ddp.yaml'}"
    assert found[6:] == words[6:]


def test_every_shipped_file_says_its_question() -> None:
    files = [*shipped_files(CONFIGS), *shipped_files(SWEEPS)]
    assert len(files) > 20
    for file in files:
        assert file.question().endswith("?"), file.name
    names = [file.name for file in shipped_files(CONFIGS)]
    assert names.index("quickstart") < names.index("overlays/ddp") < names.index("debug_quickstart")
    assert not any(name.startswith(("model/", "data/", "trainer/")) for name in names)
