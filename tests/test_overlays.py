"""The overlays of several devices, started as on a cluster: torchrun and SLURM, on gloo."""

import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from fingpt_lightning.cli.main import main
from tests.support.programs import ROOT, free_port, run_together, torchrun_command

CONFIGS = ROOT / "configs"
# The blocks of one step are those of two ranks with half of them each.
ONE_RANK, TWO_RANKS = ("--data.batch_size", "8"), ("--data.batch_size", "4")
# The second rank's clock is an hour ahead.
SKEWED_PROGRAM = """
import os, time
ahead_s, strftime = 3600 * int(os.environ["SLURM_PROCID"]), time.strftime
time.strftime = lambda text, *at: strftime(text, *at or [time.localtime(time.time() + ahead_s)])
from fingpt_lightning.cli.main import main
main()
"""


class FailingRank(Callback):
    """Raises on the second rank after two steps."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if trainer.global_step == 2 and trainer.global_rank == 1:
            raise RuntimeError("the second device is on fire")


class DyingRank(Callback):
    """Leaves the second rank without a word after two steps, and notes when."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if trainer.global_step == 2 and trainer.global_rank == 1:
            Path("died_at").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


def _words(overlay: str | None, cache: Path, *changes: str) -> list[str]:
    configs = [CONFIGS / "debug_quickstart.yaml"]
    if overlay is not None:
        configs.append(CONFIGS / "overlays" / f"{overlay}.yaml")
    named = [word for path in configs for word in ("--config", str(path))]
    return [
        "fit", *named, "--trainer.accelerator", "cpu", "--trainer.logger", "false",
        "--data.cache_dir", str(cache), *changes,
    ]  # fmt: skip


def _losses(folder: Path) -> dict[tuple[str, int], float]:
    """Of the only run in a folder, by key and step."""
    (run,) = (folder / "runs").iterdir()
    with (run / "metrics.csv").open(newline="") as file:
        return {
            (key, int(row["step"])): float(row[key])
            for row in csv.DictReader(file)
            for key in ("train/loss", "val/loss")
            if row.get(key)
        }


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def truth(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], float]:
    """The losses of one process on the same global batches."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(_words(None, cache, *ONE_RANK, "--trainer.callbacks", "[]"))
    losses = _losses(folder)
    assert len(losses) == 6 + 2
    return losses


def _assert_one_run(folder: Path, truth: dict[tuple[str, int], float]) -> None:
    assert _losses(folder) == pytest.approx(truth, rel=2e-5)
    (summary,) = folder.rglob("summary.json")
    assert json.loads(summary.read_text())["steps"] == 6
    (last,) = folder.rglob("last.ckpt")
    assert last.parents[1] == summary.parent


@pytest.mark.slow
def test_torchrun_on_two_nodes_equals_one_process(
    tmp_path: Path, cache: Path, truth: dict[tuple[str, int], float]
) -> None:
    """Two agents on one machine, one rank each."""
    torchrun = torchrun_command(
        "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
        "--rdzv-id", "test", "--rdzv-endpoint", f"localhost:{free_port()}",
    )  # fmt: skip
    on_nodes = ("--trainer.num_nodes", "2", "--trainer.devices", "1")
    command = [*torchrun, *_words("ddp", cache, *TWO_RANKS, *on_nodes)]
    codes, output = run_together(tmp_path, [command, command])
    assert codes == [0, 0], output
    _assert_one_run(tmp_path, truth)
    assert output.count("Run summary") == 1


@pytest.mark.slow
def test_slurm_on_two_nodes_equals_one_process_whatever_the_clocks_say(
    tmp_path: Path, cache: Path, truth: dict[tuple[str, int], float]
) -> None:
    on_nodes = ("--trainer.num_nodes", "2", "--trainer.devices", "1")
    command = ["-c", SKEWED_PROGRAM, *_words("fsdp", cache, *TWO_RANKS, *on_nodes)]
    job = {
        "SLURM_JOB_ID": "4217", "SLURM_JOB_NAME": "pretrain", "SLURM_NODELIST": "localhost",
        "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_LOCALID": "0", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    tasks = [job | {"SLURM_PROCID": task, "SLURM_NODEID": task} for task in ("0", "1")]
    codes, output = run_together(tmp_path, [command, command], tasks)
    assert codes == [0, 0], output
    _assert_one_run(tmp_path, truth)


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_run_and_says_why_in_one_line(
    tmp_path: Path, cache: Path, truth: dict[tuple[str, int], float]
) -> None:
    """One torchrun with two ranks; up to the failure the run is that of one process."""
    torchrun = torchrun_command(
        "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"
    )
    failing = ("--trainer.callbacks+", '{"class_path": "tests.test_overlays.FailingRank"}')
    words = _words("fsdp", cache, *TWO_RANKS, "--trainer.devices", "2", *failing)
    (code,), output = run_together(tmp_path, [[*torchrun, *words]])
    assert code != 0
    assert output.count("fingpt: error (rank 1): the second device is on fire") == 1, output
    assert "Run summary" not in output
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert not list(tmp_path.rglob("summary.json"))


@pytest.mark.slow
def test_a_pipeline_of_two_processes_equals_one_process(
    tmp_path: Path, cache: Path, truth: dict[tuple[str, int], float]
) -> None:
    """Started as on a laptop: Lightning makes the second process."""
    words = _words("pipeline", cache, *ONE_RANK, "--trainer.devices", "2")
    trace = ("--trainer.callbacks+", "callbacks.PipelineTrace")
    command = ["-m", "fingpt_lightning", *words, *trace]
    (code,), output = run_together(tmp_path, [command])
    assert code == 0, output
    _assert_one_run(tmp_path, truth)
    assert "1F1B, 2 stages on 2 ranks, 8 microbatches" in output
    assert output.count("Run summary") == 1
    assert len(list(tmp_path.glob("runs/*/pipeline/step_3.*"))) == 2


@pytest.mark.slow
def test_a_pipeline_that_loses_a_rank_ends_within_seconds_and_says_so(
    tmp_path: Path, cache: Path
) -> None:
    dying = ("--trainer.callbacks+", '{"class_path": "tests.test_overlays.DyingRank"}')
    words = _words("pipeline", cache, *ONE_RANK, "--trainer.devices", "2", *dying)
    (code,), output = run_together(tmp_path, [["-m", "fingpt_lightning", *words]])
    assert code != 0
    assert time.time() - float((tmp_path / "died_at").read_text()) < 15
    assert "fingpt: error: rank 1 (host " in output, output
    assert "is lost: its connection closed without a word" in output
    assert "Run summary" not in output


@pytest.mark.parametrize("is_requeued", [False, True])
def test_the_sbatch_script_of_the_docs_resumes_when_there_is_something_to_resume(
    tmp_path: Path, is_requeued: bool
) -> None:
    """Run with an ``srun`` that only says what it was asked."""
    text = (ROOT / "docs" / "several_devices.md").read_text()
    script = text.partition("```bash\n")[2].partition("```")[0]
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    srun.chmod(0o755)
    last = tmp_path / "runs" / "gpt2-small-4217" / "checkpoints" / "last.ckpt"
    if is_requeued:
        last.parent.mkdir(parents=True)
        last.touch()
    job = {"SLURM_JOB_ID": "4217", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
    words = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    ).stdout.splitlines()  # fmt: skip
    assert words[1:3] == ["fingpt", "fit"]
    given = dict(zip(words[3::2], words[4::2], strict=True))
    assert given["--trainer.num_nodes"] == "2"
    assert given["--trainer.devices"] == "4"
    assert given.get("--ckpt_path") == (str(last.relative_to(tmp_path)) if is_requeued else None)
    assert "configs/overlays/fsdp.yaml" in words
