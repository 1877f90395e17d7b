"""The way of a run through the commands on a GPU: ``pytest -m gpu``. On a CPU it is kept working.

`tests/test_on_cuda.py` has what an emulated device can tell, and ``benchmarks.gpu_check`` the
numbers; here are the options, files and devices of the commands.
"""

import json
import math
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from tests.support.killed_runs import Killed, status_of, write_base_and_rows

_COMMON = (
    "--seed_everything 1 --trainer.logger false --trainer.num_sanity_val_steps 0"
    " --trainer.limit_val_batches 1 --trainer.gradient_clip_val 1.0"
    " --trainer.devices 1 --last_checkpoint.every_n_train_steps 2"
)
_PRETRAINING = (
    f"fit --config configs/debug_quickstart.yaml {_COMMON} --trainer.precision bf16-mixed"
    " --model.optimizer spectron"
)
_FINETUNING = (
    f"fit --config configs/debug_finetune_smollm2_fpb.yaml {_COMMON} --model.random_base null"
)
_CONFIGS = Path(__file__).parents[2]


class Noted(Killed):
    """Where the steps of all runs were made, and their losses."""

    places: ClassVar[set[str]] = set()
    losses: ClassVar[list[float]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer)
        tensors = [*pl_module.parameters(), batch["input_ids"]]
        self.places.update(tensor.device.type for tensor in tensors)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


class Walk(NamedTuple):
    """A device, and the folder of ``base``, ``data`` and the runs on it."""

    accelerator: str
    folder: Path

    @property
    def device(self) -> str:
        return {"cpu": "cpu", "gpu": "cuda"}[self.accelerator]

    def fit(self, line: str, run: str, *words: str, stop_before: int | None = None) -> list[float]:
        """Trains into the folder of a name, and gives the losses."""
        Noted.places.clear()
        Noted.losses.clear()
        Noted.after = stop_before
        # What goes on is without the monitors of the configs, for the time that they take.
        sign = "=" if stop_before is not None or "--ckpt_path" in words else "+="
        line += f" --trainer.accelerator {self.accelerator}"
        line += f" --trainer.callbacks{sign}{__name__}.Noted"
        line += f" --trainer.default_root_dir {self.folder / run}"
        line = line.replace("configs/", f"{_CONFIGS}/configs/")
        status = status_of([*line.split(), *words])
        assert status == (0 if stop_before is None else 1)
        assert Noted.places == {self.device}
        assert all(map(math.isfinite, Noted.losses))
        return list(Noted.losses)

    def finetune(self, run: str, *words: str, stop_before: int | None = None) -> list[float]:
        base = ["--model.base", str(self.folder / "base")]
        return self.fit(_FINETUNING, run, *base, *words, stop_before=stop_before)

    def last_checkpoint(self, run: str) -> str:
        return str(self.folder / run / "checkpoints" / "last.ckpt")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("cpu", marks=pytest.mark.xdist_group("commands, CPU")),
        pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.xdist_group("commands, GPU")]),
    ],
)
def walk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    folder = tmp_path_factory.mktemp("commands")
    write_base_and_rows(folder, 48)
    return Walk(request.param, folder)


@pytest.fixture(scope="module")
def finetuned(walk: Walk) -> list[float]:
    """Losses of the run ``nf4``."""
    return walk.finetune("nf4")


def test_a_pretraining_that_is_killed_goes_on_as_if_it_had_not_been(walk: Walk) -> None:
    whole = walk.fit(_PRETRAINING, "whole")
    assert len(whole) == 6
    before = walk.fit(_PRETRAINING, "killed", stop_before=4)
    after = walk.fit(_PRETRAINING, "resumed", "--ckpt_path", walk.last_checkpoint("killed"))
    # Sums on a GPU need not be made in the same order twice.
    torch.testing.assert_close([*before, *after], whole, rtol=1e-3, atol=0)
    words = ["--model", str(walk.folder / "resumed"), "--device", walk.device]
    texts = walk.folder / "texts.jsonl"
    generate = ["generate", *words, "--prompt", "Shares", "--max_new_tokens", "3"]
    assert status_of([*generate, "--output", str(texts)]) == 0
    assert len(texts.read_text().splitlines()) == 1


def test_a_finetuning_over_nf4_is_resumed(walk: Walk, finetuned: list[float]) -> None:
    assert len(finetuned) == 6
    before = walk.finetune("nf4-killed", stop_before=4)
    ckpt_path = ["--ckpt_path", walk.last_checkpoint("nf4-killed")]
    after = walk.finetune("nf4-resumed", *ckpt_path)
    torch.testing.assert_close([*before, *after], finetuned, rtol=1e-3, atol=0)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_answers_of_a_finetuned_model_are_scored(
    walk: Walk, finetuned: list[float], quantize: str
) -> None:
    out = walk.folder / f"answers-{quantize}"
    words = f"evaluate --tasks fpb --data_dir {walk.folder}/data --output {out}"
    words += f" --model {walk.folder}/nf4 --quantize {quantize} --device {walk.device}"
    assert status_of(words.split()) == 0
    results = json.loads((out / "results.json").read_text())
    assert (results["settings"]["device"] == "cpu") == (walk.device == "cpu")
    assert math.isfinite(results["tasks"]["fpb"]["accuracy"])


def test_a_finetuned_model_writes(walk: Walk, finetuned: list[float]) -> None:
    prompts, texts = walk.folder / "prompts.txt", walk.folder / "nf4.jsonl"
    prompts.write_text("Shares of Foo\nGold\n")
    words = f"generate --prompts {prompts} --output {texts} --max_new_tokens 3"
    words += f" --model {walk.folder}/nf4 --device {walk.device}"
    assert status_of(words.split()) == 0
    assert len(texts.read_text().splitlines()) == 2
