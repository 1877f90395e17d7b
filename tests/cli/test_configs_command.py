"""``fingpt configs`` lists, shows and copies what comes with the package."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fingpt_lightning.cli.main import main
from fingpt_lightning.cli.sweep import build_fit

_REPOSITORY = Path(__file__).parents[2]

Configs = Callable[..., tuple[int, str, str]]


@pytest.fixture
def configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Configs:
    """Runs ``fingpt configs`` in an empty folder; gives status, output and error."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        status = 0
        try:
            main(["configs", *words])
        except SystemExit as error:
            status = int(error.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_the_list_has_each_name_with_its_question(configs: Configs) -> None:
    status, output, error = configs()
    assert status == 0, error
    lines = [line.split(maxsplit=1) for line in output.splitlines() if line.startswith("  ")]
    questions = {name: question for name, question in lines}  # noqa: C416 (pairs are lists)
    assert questions["quickstart"].startswith("how small and how fast is a low-rank GPT-2")
    assert {"overlays/fsdp", "debug_quickstart", "quick_rank"} <= questions.keys()
    num_files = len(list((_REPOSITORY / "configs").glob("*.yaml")))
    num_files += len(list((_REPOSITORY / "configs" / "overlays").glob("*.yaml")))
    num_files += len(list((_REPOSITORY / "sweeps").glob("*.yaml")))
    assert len(lines) == num_files


def test_a_name_alone_shows_the_file(configs: Configs) -> None:
    assert configs("quick_rank")[1] == (_REPOSITORY / "sweeps" / "quick_rank.yaml").read_text()


def test_a_copy_is_whole_and_builds_the_same_run(
    configs: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    status, output, error = configs("debug_quickstart", "--copy", "mine")
    assert status == 0, error
    assert output.splitlines()[-1] == "use it: fingpt fit --config mine/debug_quickstart.yaml"
    copied = {path.relative_to("mine").as_posix() for path in Path("mine").rglob("*.yaml")}
    assert copied == {
        "debug_quickstart.yaml", "trainer/debug.yaml", "data/debug.yaml", "model/debug.yaml",
    }  # fmt: skip
    own, shipped = (
        build_fit(["fit", "--config", name]).settings
        for name in ("mine/debug_quickstart.yaml", "debug_quickstart")
    )
    assert own == shipped


def test_what_differs_is_not_replaced(configs: Configs) -> None:
    assert configs("quickstart", "--copy", "mine")[0] == 0
    assert configs("quickstart", "--copy", "mine")[0] == 0, "the same again"
    Path("mine/model/gpt2_nano_low_rank.yaml").write_text("changed: true\n")
    Path("mine/quickstart.yaml").unlink()
    status, _, error = configs("quickstart", "--copy", "mine")
    assert status == 1
    assert "mine/model/gpt2_nano_low_rank.yaml is there already and differs" in error
    assert not Path("mine/quickstart.yaml").exists(), "nothing is copied then"


def test_a_file_in_place_of_the_folder_is_named(configs: Configs) -> None:
    Path("news.csv").touch()
    status, _, error = configs("quickstart", "--copy", "news.csv")
    assert status == 1
    assert "copy news.csv/quickstart.yaml: news.csv is a file, not a folder" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("quikstart",), "no shipped config or sweep 'quikstart'; did you mean quickstart?"),
        (("quick_rnk",), "did you mean quick_rank?"),
        (("--copy", "mine"), "--copy needs the name of a config"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    configs: Configs, words: tuple[str, ...], message: str
) -> None:
    status, _, error = configs(*words)
    assert status == 2
    (line,) = error.splitlines()
    assert message in line
