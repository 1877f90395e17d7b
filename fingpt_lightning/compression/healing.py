"""Training of a decomposed model on the predictions of the one that it was made of."""

import gc
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from transformers import PreTrainedTokenizerFast
from typing_extensions import override

from fingpt_lightning.compression.options import TEACHER_WEIGHT, WARMUP, WEIGHT_DECAY
from fingpt_lightning.data import TextBlocks
from fingpt_lightning.data.calibration_text import CalibrationSource
from fingpt_lightning.data.instruction_rows import encode_rows
from fingpt_lightning.data.text_files import TextFiles
from fingpt_lightning.data.text_sources import MixturePart
from fingpt_lightning.files import to_json, write_whole
from fingpt_lightning.models.families import max_positions
from fingpt_lightning.modules import LowRankPretraining
from fingpt_lightning.strategies.checkpoint_files import WholeCheckpoints
from fingpt_lightning.tasks import find_task, read_rows
from fingpt_lightning.terminal.progress import shown_progress

_SAVES = 10
"""Checkpoints per run: at most this share of its time is lost to a kill."""


class _Progress(Callback):
    """Shows the steps, and frees the gradients of each, which Lightning keeps in the next one."""

    def __init__(self, show: Any) -> None:
        self._show = show

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pl_module.zero_grad()
        self._show(trainer.global_step)


def heal(
    folder: Path,
    small: Path,
    teacher: str,
    sources: Sequence[CalibrationSource],
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    batch_size: int,
    block_length: int,
    learning_rate: float,
    warmup: float = WARMUP,
    weight_decay: float = WEIGHT_DECAY,
    precision: str,
    teacher_weight: float = TEACHER_WEIGHT,
    teacher_dtype: Literal["bfloat16", "float32"],
    data_dir: Path | None,
    seed: int,
    quantize: str | None = None,
    device: str = "cpu",
) -> Path:
    """Trains all weights, on the divergence from a teacher; goes on where a killed run was.

    Args:
        folder: Folder of the run: token cache, rows of tasks as text, checkpoints.
        small: Folder of the decomposed model.
        teacher: Path of the original.
        sources: Texts and tasks, by their weights.
        tokenizer: Tokenizer of both.
        steps: Number of steps, at least 1.
        batch_size: Number of rows of a step.
        block_length: Number of tokens per row.
        learning_rate: Highest learning rate.
        warmup: Share of the steps in which the rate rises.
        weight_decay: Weight decay of matrices.
        precision: Precision of the trainer.
        teacher_weight: Share of the divergence in the loss; the rest is the cross-entropy of the
            text's own tokens. With 0 there is no teacher.
        teacher_dtype: Dtype of the teacher.
        data_dir: Folder of the tasks' rows; None reads from the hub.
        seed: Seed of the order of the blocks.
        quantize: ``int8`` or ``nf4`` for passes with the weights as an export rounds each to its
            nearest; those that are trained, and stored, are not rounded.
        device: Device of both networks, ``cpu`` or such as ``cuda:1``.

    Returns:
        The checkpoint after the last step.

    Raises:
        ValueError: A source is too small, or a setting does not fit.
    """
    end = folder / "end.ckpt"
    if end.is_file():
        return end
    folder.mkdir(parents=True, exist_ok=True)
    seed_everything(seed, verbose=False)
    beside: dict[str, Any] = {}
    if teacher_weight:
        beside |= {
            "teacher": teacher, "teacher_dtype": teacher_dtype, "teacher_weight": teacher_weight,
        }  # fmt: skip
    if quantize is not None:
        beside |= {"quantization_aware": quantize, "quantization_start": 0.0}
    module = LowRankPretraining(
        init_from=str(small),
        recompute="low_rank",  # keeps the inputs and thin activations of each block alone
        learning_rate=learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        **beside,
    )
    longest = max_positions(module.laid_out().config)
    length = min(block_length, longest)
    # The run validates on nothing, and training documents are not to be held out for it.
    unread = folder / "unread.txt"
    write_whole(unread, " a" * (2 * length))
    data = TextBlocks(
        val_files=str(unread),
        mixture=_mixture(folder, sources, tokenizer, data_dir, longest),
        tokenizer=str(small),
        block_length=length,
        batch_size=batch_size,
        cache_dir=str(folder / "cache"),
        seed=seed,
    )
    every = max(1, steps // _SAVES)
    kept = ModelCheckpoint(folder, "last", every_n_train_steps=every, enable_version_counter=False)
    form = "" if quantize is None else f"rounded to {quantize}, "
    what = f"healing {form}on {batch_size * length:,} tokens per step"
    placed = torch.device(device)
    with shown_progress(what, steps, "steps") as show, _quiet():
        trainer = Trainer(
            accelerator=placed.type,
            devices=[placed.index or 0] if placed.type == "cuda" else 1,
            precision=precision,  # type: ignore[arg-type]
            max_steps=steps,
            max_epochs=-1,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[kept, _Progress(show)],
            plugins=[WholeCheckpoints()],  # Lightning's own hold a second copy of the weights
            default_root_dir=folder,
        )
        last = folder / "last.ckpt"
        resumed = {"ckpt_path": last, "weights_only": True} if last.is_file() else {}
        trainer.fit(module, datamodule=data, **resumed)  # type: ignore[arg-type]
    trainer.save_checkpoint(end, weights_only=True)  # nothing is trained on from it
    # They refer to each other: weights, optimizer and teacher would lie beside the next stage.
    del trainer, module, data, kept
    gc.collect()
    return end


def _mixture(
    folder: Path,
    sources: Sequence[CalibrationSource],
    tokenizer: PreTrainedTokenizerFast,
    data_dir: Path | None,
    longest: int,
) -> list[MixturePart]:
    parts: list[MixturePart] = []
    for number, (read, weight) in enumerate(sources):
        if isinstance(read, TextFiles):
            files = [str(path) for path in read.paths]
        else:
            files = [
                str(_rows_as_text(folder / f"{read}.jsonl", read, tokenizer, data_dir, longest))
            ]
        parts.append({"name": f"source {number + 1}", "files": files, "weight": weight})
    return parts


def _rows_as_text(
    file: Path,
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    data_dir: Path | None,
    longest: int,
) -> Path:
    """Prompts with their answers of a task's ``train`` split, a document each."""
    if not file.is_file():
        rows = read_rows(find_task(name), data_dir, "train")
        known = [example for example in rows.examples if example.gold is not None]
        kept = encode_rows(tokenizer, known, longest).kept
        texts = (tokenizer.decode(list(row.tokens), skip_special_tokens=True) for row in kept)
        write_whole(file, "".join(f"{to_json({'text': str(text)})}\n" for text in texts))
    return file


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it Lightning names no devices and gives no advice; warnings are shown."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # The folder is ours; what lies in it is resumed from.
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            # Of Lightning with torch 2.13, about its own code.
            warnings.filterwarnings("ignore", ".*treespec, LeafSpec\\)` is deprecated")
            yield
    finally:
        logger.setLevel(before)
