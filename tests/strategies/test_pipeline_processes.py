"""The program in a pipeline, as Lightning, torchrun and SLURM start it, and when a rank fails."""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from tests.support.programs import ROOT, free_port, run_together, torchrun_command

pytestmark = pytest.mark.timeout(900)
CONFIGS = ROOT / "configs"
TIMEOUT_S = 10
ENDED_WITHIN_S = 10  # the end of the interpreter included
PROGRAM = ["-m", "fingpt_lightning"]


class FailingRank(Callback):
    """Raises on the second rank after two steps, and notes when."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if trainer.global_step == 2 and trainer.global_rank == 1:
            Path("ended_at").write_text(str(time.time()))
            raise RuntimeError("the second device is on fire")


class HangingRank(Callback):
    """Lets the second rank do nothing more after two steps, and notes when and who it is."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if trainer.global_step == 2 and trainer.global_rank == 1:
            Path("ended_at").write_text(str(time.time()))
            Path("process").write_text(str(os.getpid()))
            time.sleep(600)


def _words(*changes: str) -> list[str]:
    files = ("debug_quickstart.yaml", "overlays/pipeline.yaml")
    named = [word for file in files for word in ("--config", str(CONFIGS / file))]
    return [
        "fit", *named, "--trainer.accelerator", "cpu", "--trainer.logger", "false",
        "--trainer.devices", "2", "--data.cache_dir", "cache", *changes,
    ]  # fmt: skip


def _failing(kind: type[Callback]) -> list[str]:
    return ["--trainer.callbacks+", f"{__name__}.{kind.__name__}"]


def _seconds_since_the_end(folder: Path) -> float:
    return time.time() - float((folder / "ended_at").read_text())


@pytest.mark.slow
def test_a_rank_that_raises_ends_all_within_seconds_and_its_message_arrives(
    tmp_path: Path,
) -> None:
    (code,), output = run_together(tmp_path, [[*PROGRAM, *_words(*_failing(FailingRank))]])
    assert code != 0
    assert _seconds_since_the_end(tmp_path) < ENDED_WITHIN_S
    assert output.count("fingpt: error (rank 1): the second device is on fire") == 1, output
    assert "Run summary" not in output


@pytest.mark.slow
def test_a_rank_that_hangs_is_given_up_after_the_timeout_and_ended(tmp_path: Path) -> None:
    timeout = ("--trainer.strategy.init_args.timeout_s", str(TIMEOUT_S))
    words = _words(*_failing(HangingRank), *timeout)
    (code,), output = run_together(tmp_path, [[*PROGRAM, *words]])
    assert code != 0
    assert _seconds_since_the_end(tmp_path) < TIMEOUT_S + ENDED_WITHIN_S
    assert f"no answer for timeout_s {TIMEOUT_S} while the others waited: rank 1 (host" in output
    assert "strategies/test_pipeline_processes.py:" in output
    assert "Traceback" not in output
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int((tmp_path / "process").read_text())).wait(ENDED_WITHIN_S)


@pytest.mark.slow
def test_torchrun_ends_all_when_a_rank_raises_and_runs_a_pipeline_else(tmp_path: Path) -> None:
    torchrun = torchrun_command(
        "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"
    )
    (code,), output = run_together(tmp_path, [[*torchrun, *_words()]])
    assert code == 0, output
    assert "1F1B, 2 stages on 2 ranks, 4 microbatches" in output
    assert output.count("Run summary") == 1
    (code,), output = run_together(tmp_path, [[*torchrun, *_words(*_failing(FailingRank))]])
    assert code != 0
    assert _seconds_since_the_end(tmp_path) < ENDED_WITHIN_S
    assert output.count("fingpt: error (rank 1): the second device is on fire") == 1, output


@pytest.mark.slow
def test_slurm_starts_a_pipeline_over_two_nodes(tmp_path: Path) -> None:
    job = {
        "SLURM_JOB_ID": "4217", "SLURM_JOB_NAME": "pretrain", "SLURM_NODELIST": "localhost",
        "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_LOCALID": "0", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    tasks = [job | {"SLURM_PROCID": task, "SLURM_NODEID": task} for task in ("0", "1")]
    command = [*PROGRAM, *_words("--trainer.num_nodes", "2", "--trainer.devices", "1")]
    codes, output = run_together(tmp_path, [command, command], tasks)
    assert codes == [0, 0], output
    assert "1F1B, 2 stages on 2 ranks, 4 microbatches" in output
    assert output.count("Run summary") == 1
    assert len(list(tmp_path.glob("runs/*/checkpoints/last.ckpt"))) == 1
