"""TensorBoard and MLflow beside W&B and CSV: all that W&B gets arrives, also in a resumed run."""

import csv
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import numpy
import pytest
import wandb
import yaml
from jsonargparse import Namespace
from lightning.pytorch.loggers import Logger, MLFlowLogger
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fingpt_lightning.cli import logger_packages
from fingpt_lightning.cli.early_checks import OFF_VARIABLE, check_trainer_command
from fingpt_lightning.cli.errors import ConfigError
from fingpt_lightning.cli.experiment_loggers import RunMLflow, RunTensorBoard, place_logger
from fingpt_lightning.cli.main import main
from fingpt_lightning.cli.trainer import build_trainer_command
from tests.evaluation.tiny_language import write_rows

CONFIGS = Path(__file__).parents[2] / "configs"
OVERLAYS = [
    word
    for name in ("tensorboard", "mlflow")
    for word in ("--config", str(CONFIGS / "overlays" / f"{name}.yaml"))
]
PRETRAINING = ("fit", "--config", str(CONFIGS / "debug_quickstart.yaml"))
FINETUNING = ("fit", "--config", str(CONFIGS / "debug_finetune_smollm2_fpb.yaml"))
SHORT = ("--trainer.max_steps", "3", "--trainer.val_check_interval", "2")
# What W&B keeps of itself, and what it alone is given.
NOT_FIGURES = ("_", "trainer/global_step")

# Steps and values by key, in order; rows of training, validation and evaluation share some keys.
History = dict[str, list[tuple[int, float]]]


class Found(NamedTuple):
    """What the loggers of one run hold: values by key and step."""

    folder: Path
    wandb_summary: dict[str, Any]
    rows: History
    tensorboard: History
    mlflow: History


def _rows(path: Path) -> History:
    history: History = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if key != "step" and value:
                    history.setdefault(key, []).append((int(row["step"]), float(value)))
    return {key: sorted(points) for key, points in history.items()}


def _of_tensorboard(folder: Path) -> History:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        key: sorted((point.step, point.value) for point in events.Scalars(key))
        for key in events.Tags()["scalars"]
    }


def _mlflow_run(folder: Path) -> Any:
    client = MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fingpt")
    assert experiment is not None
    found = client.search_runs(
        [experiment.experiment_id], f"tags.`mlflow.runName` = '{folder.name}'"
    )
    (run,) = found
    return run, client


def _of_mlflow(folder: Path) -> History:
    run, client = _mlflow_run(folder)
    found = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    return {
        key: sorted((point.step, point.value) for point in points) for key, points in found.items()
    }


def _run(*words: str) -> Found:
    """Runs ``fit``, and reads what it has logged; the newest folder is its own."""
    before = dict(os.environ)
    cache = () if FINETUNING[2] in words else ("--data.cache_dir", "cache")
    main([*words, *SHORT, *cache])
    summary = {} if wandb.run is None else dict(wandb.run.summary)
    wandb.finish()
    assert {k: v for k, v in os.environ.items() if "MLFLOW" in k} == {
        k: v for k, v in before.items() if "MLFLOW" in k
    }
    folder = max(Path("runs").glob("debug_*"), key=lambda path: path.stat().st_mtime).absolute()
    rows = _rows(folder / "metrics.csv")
    return Found(folder, summary, rows, _of_tensorboard(folder), _of_mlflow(folder))


@pytest.fixture(scope="module", autouse=True)
def _one_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All runs of this file share one database, which takes seconds to make."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_MODE", "dryrun")  # as Lightning sets it
        yield
        mlflow.set_tracking_uri("")


@pytest.fixture(scope="module")
def pretrained() -> Found:
    names = ("--model.rank_overrides", '{"*.c_attn.q": 4}')
    return _run(*PRETRAINING, *OVERLAYS, *names)


@pytest.fixture(scope="module")
def finetuned() -> Found:
    write_rows(Path("data"), "fpb")
    evaluation = {
        "class_path": "callbacks.FinancialEvaluation",
        "init_args": {"tasks": ["fpb"], "data_dir": "data"},
    }
    extra = Path("extra.yaml")
    extra.write_text(yaml.safe_dump({"trainer": {"callbacks+": [evaluation]}}))
    return _run(*FINETUNING, "--config", str(extra), *OVERLAYS)


@pytest.mark.parametrize("name", ["pretrained", "finetuned"])
def test_all_that_w_and_b_gets_arrives_in_both(name: str, request: pytest.FixtureRequest) -> None:
    found: Found = request.getfixturevalue(name)
    sent = {
        key: value
        for key, value in found.wandb_summary.items()
        if isinstance(value, int | float) and not key.startswith(NOT_FIGURES)
    }
    expected = {"train/loss", "val/loss", "memory/peak_rss_mib", "summary/steps"}
    expected |= {"eval/fpb/accuracy"} if name == "finetuned" else {"compression/parameters"}
    assert expected <= sent.keys()
    for key, value in sent.items():
        assert found.mlflow[key][-1][1] == pytest.approx(value, rel=1e-12), key
        assert found.tensorboard[key][-1][1] == numpy.float32(value), key


@pytest.mark.parametrize("name", ["pretrained", "finetuned"])
def test_each_row_of_the_csv_file_is_in_both(name: str, request: pytest.FixtureRequest) -> None:
    found: Found = request.getfixturevalue(name)
    assert [step for step, _ in found.rows["train/loss"]] == [0, 1, 2]
    for kept, digits in ((found.mlflow, numpy.float64), (found.tensorboard, numpy.float32)):
        of_rows = {k: v for k, v in kept.items() if not k.startswith("summary/")}
        expected = {
            key: [(step, float(digits(value))) for step, value in points]
            for key, points in found.rows.items()
        }
        assert of_rows == expected


def test_text_of_the_summary_and_the_config_are_in_mlflow(finetuned: Found) -> None:
    run, client = _mlflow_run(finetuned.folder)
    assert run.info.status == "FINISHED"
    assert "rank 4" in run.data.tags["summary/adapter"]
    path = client.download_artifacts(run.info.run_id, "config.yaml", ".")
    assert Path(path).read_text() == (finetuned.folder / "config.yaml").read_text()
    assert not Path("mlruns").exists()


def test_a_name_that_mlflow_refuses_is_changed(pretrained: Found) -> None:
    run, _ = _mlflow_run(pretrained.folder)
    assert run.data.params["rank_overrides/_.c_attn.q"] == "4"
    assert run.data.params["optimizer"] == "adamw"


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_is_continued_without_doubled_steps(pretrained: Found) -> None:
    """From the checkpoint of step 2 of a run that had come to step 3."""
    run, _ = _mlflow_run(pretrained.folder)
    settings = {"experiment_name": "fingpt", "run_id": run.info.run_id}
    mlflow_logger = {"class_path": "lightning.pytorch.loggers.MLFlowLogger", "init_args": settings}
    words = [
        *PRETRAINING, "--trainer.logger", "false", *OVERLAYS[:2],
        "--trainer.logger+", yaml.safe_dump(mlflow_logger, default_flow_style=True).strip(),
        "--ckpt_path", str(pretrained.folder / "checkpoints" / "best.ckpt"),
        "--trainer.default_root_dir", str(pretrained.folder),
    ]  # fmt: skip
    found = _run(*words)
    assert found.folder == pretrained.folder
    assert [step for step, _ in found.rows["train/loss"]] == [2], "it has one more step to go"
    for before, after in (
        (pretrained.tensorboard, found.tensorboard), (pretrained.mlflow, found.mlflow),
    ):  # fmt: skip
        for key, steps in _steps(before).items():
            # One step yields no throughput, and no validation.
            assert _steps(after)[key] in (steps, [step for step in steps if step < 2]), key
        for key in ("train/loss", "val/loss", "train/tokens"):
            assert after[key] == before[key], key


@pytest.mark.parametrize(("resumed_step", "kept"), [(None, [0, 1, 2, 3]), (2, [0, 1])])
def test_only_training_takes_the_place_of_later_steps(
    tmp_path: Path, resumed_step: int | None, kept: list[int]
) -> None:
    """Of validation in the folder of a run the later steps of the run stay."""
    for step in (0, None):
        logger = RunTensorBoard(tmp_path, name="tensorboard", version="", default_hp_metric=False)
        logger.resumed_step = 0 if step == 0 else resumed_step
        for at in range(4) if step == 0 else (2,):
            logger.log_metrics({"train/loss" if step == 0 else "val/loss": 1.0}, at)
        logger.finalize("success")
    found = _of_tensorboard(tmp_path)
    assert [at for at, _ in found["train/loss"]] == kept
    assert found["val/loss"] == [(2, 1.0)]


def _steps(history: History) -> dict[str, list[int]]:
    return {key: [step for step, _ in points] for key, points in history.items()}


def test_a_run_that_is_only_built_writes_nothing(tmp_path: Path) -> None:
    words = [*PRETRAINING, *OVERLAYS, "--runs_dir", str(tmp_path / "runs")]
    cli = build_trainer_command(words)
    kinds = [type(logger) for logger in cli.trainer.loggers]
    assert {RunTensorBoard, RunMLflow} <= set(kinds)
    assert not list(tmp_path.iterdir())
    mlflow_logger = cli.trainer.loggers[kinds.index(RunMLflow)]
    assert isinstance(mlflow_logger, MLFlowLogger)
    assert mlflow_logger._tracking_uri == f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"


class MyLoggers:
    """Classes of a user, whose names are those of Lightning's."""

    class TensorBoardLogger(Logger):
        """Not Lightning's."""

    class MLFlowLogger(Logger):
        """Not Lightning's."""


@pytest.mark.parametrize("name", ["TensorBoardLogger", "MLFlowLogger"])
def test_only_lightnings_own_loggers_get_a_place(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"save_dir": ".", "run_name": None, "run_id": None, "tracking_uri": None}
    settings |= {"name": "lightning_logs", "version": None, "artifact_location": None}
    of_lightning = "tensorboard" if name == "TensorBoardLogger" else "mlflow"
    places = (
        ("lightning.pytorch.loggers", True),
        (f"lightning.pytorch.loggers.{of_lightning}", True),
        (__name__, False),
    )
    monkeypatch.setattr(sys.modules[__name__], name, getattr(MyLoggers, name), raising=False)
    for module, is_ours in places:
        monkeypatch.setattr(logger_packages, "find_spec", lambda package: True)
        logger = Namespace(class_path=f"{module}.{name}", init_args=Namespace(**settings))
        place_logger(logger, tmp_path / "run", tmp_path)
        assert (logger.class_path != f"{module}.{name}") is is_ours
        assert (logger.init_args.as_dict() != settings) is is_ours
        monkeypatch.setattr(logger_packages, "find_spec", lambda package: None)
        with pytest.raises(ConfigError) if is_ours else nullcontext():
            logger_packages.refuse_missing_package(f"{module}.{name}")
    os.environ.pop("MLFLOW_DISABLE_TELEMETRY", None)


def test_commands_that_log_nothing_need_no_package_of_a_logger(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logger_packages, "find_spec", lambda package: None)
    for off in ("0", "1"):
        monkeypatch.setenv(OFF_VARIABLE, off)
        main(["tokenize", *PRETRAINING[1:], *OVERLAYS, "--data.cache_dir", "cache"])
    assert " tokens of " in capsys.readouterr().out
    main(["plan", *PRETRAINING[1:], *OVERLAYS])
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_missing_package_is_named_with_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logger_packages, "find_spec", lambda package: None)
    overlay = ["--config", str(CONFIGS / "overlays" / f"{name}.yaml")]
    line = f"is not installed: pip install 'fingpt-lightning\\[{name}\\]'$"
    with pytest.raises(ConfigError, match=line):
        check_trainer_command("fit", [*PRETRAINING[1:], *overlay])
    check_trainer_command("fit", [*PRETRAINING[1:], *overlay, "--trainer.logger", "false"])
    monkeypatch.setenv(OFF_VARIABLE, "1")
    with pytest.raises(SystemExit) as ended:
        main([*PRETRAINING, *overlay])
    assert ended.value.code == 2
    assert f"'fingpt-lightning[{name}]'" in capsys.readouterr().err.splitlines()[-1]
