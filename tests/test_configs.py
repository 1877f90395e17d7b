import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

from fingpt_lightning.cli.main import main
from fingpt_lightning.cli.trainer import FinGPTCLI, build_trainer_command
from fingpt_lightning.terminal import inputs
from tests.support.warm_python import run_warm

CONFIGS = Path(__file__).parents[1] / "configs"
RUNNABLE = sorted(CONFIGS.glob("*.yaml"))
OVERLAYS = sorted((CONFIGS / "overlays").glob("*.yaml"))
LOGGERS = ["mlflow", "tensorboard"]


def test_the_number_of_configs_is_known() -> None:
    """A new runnable file needs its debug twin, a new overlay its test."""
    names = {path.stem for path in RUNNABLE}
    full = {name for name in names if not name.startswith("debug_")}
    assert len(full) == 10
    assert names - full == {f"debug_{name}" for name in full}
    assert {path.stem for path in OVERLAYS} == {"ddp", "fsdp", "pipeline", *LOGGERS}


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_a_config_builds_what_it_names(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    build_trainer_command(["fit", "--config", str(path), "--trainer.accelerator", "cpu"])
    assert not list(tmp_path.iterdir()), "building a run writes nothing"


@pytest.mark.parametrize("overlays", [["ddp"], ["fsdp"], ["pipeline"], LOGGERS], ids="+".join)
@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_an_overlay_fits_a_config(
    path: Path, overlays: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[FinGPTCLI] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FinGPTCLI, "_run_subcommand", lambda self, subcommand: built.append(self))
    monkeypatch.setattr(inputs, "refuse_unknown_on_hub", lambda name, revision: None)
    monkeypatch.setattr(inputs, "_reason_of_hub", lambda name, revision: None)
    monkeypatch.setenv("WANDB_SILENT", "true")
    files = [CONFIGS / "overlays" / f"{name}.yaml" for name in overlays]
    named = [word for file in (path, *files) for word in ("--config", str(file))]
    main(["fit", *named, "--trainer.accelerator", "cpu", "--trainer.devices", "2"])
    (cli,) = built
    assert cli.trainer.world_size == 2
    for file in files:
        given = yaml.safe_load(file.read_text())["trainer"]
        if "strategy" in given:
            name = given["strategy"]["class_path"].rpartition(".")[2]
            assert type(cli.trainer.strategy).__name__ == name
            continue
        name = given["logger+"][0]["class_path"].rpartition(".")[2]
        # Beside those of the config, as a logger of ours that stands on Lightning's.
        names = {kind.__name__ for logger in cli.trainer.loggers for kind in type(logger).__mro__}
        assert {"WandbLogger", "RunMetrics", name} <= names
        assert not list(tmp_path.rglob("*.db"))


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_an_overlay_says_question_need_and_command(path: Path) -> None:
    head = " ".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert "Question: " in head
    assert "Needs " in head
    assert f"--config configs/overlays/{path.name}" in head


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_a_config_says_question_need_and_command(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(head)
    assert "Question: " in text
    assert "Needs " in text
    assert f"Run: fingpt fit --config configs/{path.name}" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [path for path in RUNNABLE if path.stem.startswith("debug_")],
    ids=lambda path: path.stem,
)
def test_a_debug_config_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = ["--data.cache_dir", str(tmp_path / "cache")] if "finetune" not in path.stem else []
    words = ["fit", "--config", str(path), *cache, "--trainer.logger", "false"]
    if "pipeline" in path.stem:  # Lightning starts the other process by this one's command line
        printed = run_warm(["-m", "fingpt_lightning", *words], timeout=200).stdout
    else:
        main(words)
        printed = capsys.readouterr().out
    assert "Run summary" in printed
    assert list(tmp_path.glob("runs/*/summary.json"))


def test_blocks_are_values_without_a_root() -> None:
    roots = {"trainer", "model", "data", "seed_everything"}
    blocks = [path for part in ("trainer", "model", "data") for path in (CONFIGS / part).iterdir()]
    assert len(blocks) == 30
    for path in blocks:
        assert not roots & set(yaml.safe_load(path.read_text())), path


def test_configs_work_from_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are found beside the file that names them, wherever the program is started."""
    shutil.copytree(CONFIGS, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FinGPTCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setenv("WANDB_SILENT", "true")
    main(["fit", "--config", "mine/debug_quickstart.yaml"])


@pytest.mark.slow
def test_the_quickstart_learns_and_ends_with_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real config, its data and its network, for a tenth of its steps."""
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(CONFIGS / "quickstart.yaml"), "--trainer.logger", "false",
          "--data.cache_dir", str(tmp_path / "cache"), "--trainer.max_steps", "40",
          "--trainer.val_check_interval", "20", "--trainer.limit_val_batches", "2"])  # fmt: skip
    (folder,) = (tmp_path / "runs").iterdir()
    figures = json.loads((folder / "summary.json").read_text())
    assert figures["last_val_loss"] < figures["first_val_loss"] < math.log(2048)
    assert figures["total_parameter_ratio"] > 2.5
    assert figures["dense_baseline_tokens_per_s"] > 0
    assert figures["peak_rss_mib"] > 0
    assert Path(figures["last_checkpoint"]).is_file()
    printed = capsys.readouterr().out
    for row in ("parameters, total", "tokens/s, timed in turn", "last validation loss"):
        assert row in printed
