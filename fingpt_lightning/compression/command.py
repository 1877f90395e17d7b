"""``fingpt compress`` and the function `compress`: a dense model in, a small one out."""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig
from transformers.utils import logging

from fingpt_lightning.compression.card import figures_rows
from fingpt_lightning.compression.depth import check_depth
from fingpt_lightning.compression.options import (
    ALLOCATIONS,
    AUTO,
    FORMATS,
    LEARNING_RATE,
    PRECISIONS,
    REFINE_STEPS,
    STORED_DTYPES,
    TEACHER_DTYPES,
    TEACHER_WEIGHT,
    WARMUP,
    WEIGHT_DECAY,
    WHITENINGS,
    check_options,
    check_output,
)
from fingpt_lightning.compression.plan import StagePlan, plan_stages
from fingpt_lightning.compression.settings import Settings
from fingpt_lightning.compression.stages import (
    Compression,
    begun_settings,
    run_stages,
)
from fingpt_lightning.data.calibration_text import (
    CALIBRATION_TOKENS,
    calibration_sources,
    mixed_calibration,
    text_calibration,
)
from fingpt_lightning.data.text_files import TextFiles, find_text_files
from fingpt_lightning.decomposition.command import find_devices
from fingpt_lightning.decomposition.runner import check_embedding_rank
from fingpt_lightning.decomposition.source import Source, open_source
from fingpt_lightning.evaluation.runner import read_tasks
from fingpt_lightning.models.device import AUTO_DTYPE, device_name, find_dtype
from fingpt_lightning.models.loading import product_sizes
from fingpt_lightning.modules.ranges import check_above_0, check_from_0
from fingpt_lightning.tasks.library import find_scored_task
from fingpt_lightning.terminal.command_line import options_as_arguments
from fingpt_lightning.terminal.messages import check_choice
from fingpt_lightning.units import format_bytes, format_duration

_LOG_COLUMNS = 120


def compress(
    model: str | Path,
    output: str | Path,
    *,
    size: float,
    calibration: str | Path | Sequence[str | Path],
    format: str = "low_rank",
    dtype: str = AUTO,
    calibration_tokens: int | None = None,
    data_dir: str | Path | None = None,
    allocation: str = "loss",
    whitening: str = "input",
    drop_blocks: int = 0,
    embedding_rank: int | None = None,
    refine: int = REFINE_STEPS,
    heal: int = 0,
    heal_quantized: int = 0,
    batch_size: int = 4,
    block_length: int = 512,
    learning_rate: float = LEARNING_RATE,
    warmup: float = WARMUP,
    weight_decay: float = WEIGHT_DECAY,
    precision: str = AUTO,
    teacher_weight: float = TEACHER_WEIGHT,
    teacher_dtype: str = AUTO,
    texts: Sequence[str | Path] = (),
    text_tokens: int = 16384,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 1,
    device: str | None = None,
    tokenizer: str | Path | None = None,
    plan: bool = False,
    overwrite: bool = False,
) -> Compression | list[StagePlan]:
    """Makes a small model of a dense one, as ``fingpt compress`` does.

    Everything that can be checked is checked, and the plan is printed, before any weight is read.
    The folder appears whole or not at all; a run that was killed goes on where it was, in every
    stage.

    Args:
        model: Hugging Face folder or hub name, GGUF, checkpoint or run folder.
        output: Folder to make.
        size: Share of all parameters that is kept, in (0, 1).
        calibration: Text files, or a mixture of ``PATH=WEIGHT`` and ``task:NAME=WEIGHT``.
        format: ``low_rank``, ``int8`` or ``nf4``.
        dtype: Dtype of the weights that ``low_rank`` stores: ``bfloat16``, ``float16``,
            ``float32`` or ``auto``, that of the original's files.
        calibration_tokens: Tokens that are read; None is 32768.
        data_dir: Folder of the tasks' rows; None reads from the hub.
        allocation: ``uniform``, ``spectrum`` or ``loss``.
        whitening: ``input`` or ``both``.
        drop_blocks: Number of blocks left out before the rest is decomposed.
        embedding_rank: Rank of an embedding tied to the head; None keeps it dense.
        refine: Steps over the factors of each block.
        heal: Steps of training on the original's predictions.
        heal_quantized: Steps after them with the weights as ``format`` rounds them, which must be
            ``int8`` or ``nf4``.
        batch_size: Rows of a step of healing.
        block_length: Tokens per row of healing.
        learning_rate: Highest learning rate of healing.
        warmup: Share of the steps of healing in which the rate rises, in [0, 1].
        weight_decay: Weight decay of matrices in healing, from 0 on.
        precision: Precision of healing; ``auto`` is ``bf16-mixed`` where the device is clearly
            faster in it, else ``32-true``; a run that was killed keeps the one that it had.
        teacher_weight: Share w, in [0, 1], of the divergence from the original in the loss of
            healing, w KL + (1 - w) cross-entropy; 0 heals without the original.
        teacher_dtype: Dtype of the original in healing; ``auto`` is that of the precision's
            products.
        texts: Files whose perplexity is measured.
        text_tokens: Tokens of each of them.
        tasks: Tasks whose validation is scored.
        limit: Rows of each task; None takes all.
        seed: Seed of refinement, healing and the labels drawn for gradients.
        device: ``cpu``, ``cuda`` or ``cuda:1`` for all stages; with ``cuda`` the layers' spectra
            are taken on all of them. None is CUDA where there is one. A run that was killed may
            continue on another device.
        tokenizer: Folder of the tokenizer, where the model has none beside it.
        plan: Whether the plan alone is made.
        overwrite: Whether a compression in the folder is replaced, and begun anew.

    Returns:
        The record that lies beside the weights; with ``plan`` the stages.

    Raises:
        ValueError: The model or a setting is not as it must be.
        OSError: A path leads nowhere, or the output is there.
    """
    given = [calibration] if isinstance(calibration, str | Path) else list(calibration)
    words = [str(word) for word in given]
    with options_as_arguments():
        check_options(argparse.Namespace(**(locals() | {"calibration": words})))
    if not 0 < size < 1:
        raise ValueError(f"size {size} is outside (0, 1)")
    check_above_0(learning_rate=learning_rate)
    check_from_0(weight_decay=weight_decay)
    for name, steps in {"refine": refine, "heal": heal, "heal_quantized": heal_quantized}.items():
        if steps < 0:
            raise ValueError(f"{name} {steps} is below 0")
    for name, share in {"warmup": warmup, "teacher_weight": teacher_weight}.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} {share} is outside [0, 1]")
    check_choice("format", format, FORMATS)
    check_choice("dtype", dtype, (AUTO, *STORED_DTYPES))
    check_choice("allocation", allocation, ALLOCATIONS)
    check_choice("whitening", whitening, WHITENINGS)
    check_choice("precision", precision, (AUTO, *PRECISIONS))
    check_choice("teacher_dtype", teacher_dtype, (AUTO, *TEACHER_DTYPES))
    devices = find_devices(device)
    output = Path(output)
    check_output(output, overwrite)
    folder = None if data_dir is None else Path(data_dir)
    sources = calibration_sources(words)
    read = {name: files for text in texts for name, files in [_named(text)]}
    for name in tasks:
        find_scored_task(name)
    source = open_source(model, tokenizer)
    check_depth(source.network, drop_blocks, size)
    check_embedding_rank(source, embedding_rank)
    config = source.network.config
    number = CALIBRATION_TOKENS if calibration_tokens is None else calibration_tokens
    tokens = mixed_calibration(sources, folder, source.tokenizer, config, number)
    measured = {
        name: text_calibration(files, source.tokenizer, config, text_tokens).ids
        for name, files in read.items()
    }
    if tasks:
        read_tasks(tasks, folder, "validation", limit=limit)
    placed = torch.device(devices[0])
    begun = {} if overwrite else begun_settings(output)
    if precision == AUTO:
        precision = begun.get("precision", AUTO)
    if precision == AUTO and (heal or heal_quantized):
        precision = _precision(placed, config)
    if teacher_dtype == AUTO:
        of_products = "bfloat16" if precision == "bf16-mixed" else "float32"
        teacher_dtype = begun.get("teacher_dtype", of_products)
    settings = Settings(
        model=str(model), size=size, format=format,
        dtype=_stored_dtype(source) if dtype == AUTO else dtype, calibration=tuple(words),
        calibration_tokens=number, data_dir=None if folder is None else str(folder),
        allocation=allocation, whitening=whitening, drop_blocks=drop_blocks,
        embedding_rank=embedding_rank, refine=refine, heal=heal, heal_quantized=heal_quantized,
        batch_size=batch_size, block_length=block_length, learning_rate=learning_rate,
        warmup=warmup, weight_decay=weight_decay, precision=precision,
        teacher_weight=teacher_weight, teacher_dtype=teacher_dtype,
        texts={name: files.fingerprint() for name, files in read.items()},
        text_tokens=text_tokens, tasks=tuple(tasks), limit=limit, seed=seed,
        tokenizer=None if tokenizer is None else str(tokenizer),
    )  # fmt: skip
    stages = plan_stages(source, settings, tokens.ids.numel(), placed)
    _print_plan(stages, placed)
    if plan:
        return stages
    return run_stages(
        source, settings, sources, tokens, measured, output, devices=devices, overwrite=overwrite
    )


def run(options: argparse.Namespace) -> None:
    """Compresses a model as the options request, and prints the table original / small.

    Args:
        options: Result of `parse_options`.

    Raises:
        ValueError: The model or a setting is not as it must be.
        OSError: A path leads nowhere, or the output is there.
    """
    logging.disable_progress_bar()
    started = time.perf_counter()
    made = compress(**vars(options))
    if not isinstance(made, Compression):
        return
    console = _console()
    console.print(figures_table(made.original, made.small), soft_wrap=False)
    took = format_duration(time.perf_counter() - started)
    console.print(f"{options.output}: made in {took}", markup=False)


def figures_table(original: Mapping[str, Any], small: Mapping[str, Any]) -> Table:
    """One row per figure: original, small, small over original."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for title in ("original", "small", "small / original"):
        table.add_column(title, justify="right")
    for row in figures_rows(original, small):
        table.add_row(*row)
    return table


def _named(text: str | Path) -> tuple[str, TextFiles]:
    path = Path(text)
    name = "/".join(path.parts[-2:])
    return name, TextFiles(find_text_files(str(text), "texts"))


def _stored_dtype(source: Source) -> str:
    """That of the original's layers on disk, where a small model may be stored in it."""
    found = str(source.reader.read(source.layers[0].stored).dtype).removeprefix("torch.")
    return found if found in STORED_DTYPES else "float32"


def _precision(device: torch.device, config: PreTrainedConfig) -> str:
    """``bf16-mixed`` where the device is clearly faster in bfloat16, else ``32-true``."""
    dtype = find_dtype(AUTO_DTYPE, device, product_sizes(config))
    return "bf16-mixed" if dtype == "bfloat16" else "32-true"


def _print_plan(stages: Sequence[StagePlan], device: torch.device) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    table.add_column("", overflow="fold")
    for title in ("time", "memory"):
        table.add_column(title, justify="right")
    for stage in stages:
        taken = "not known" if stage.seconds is None else f"about {format_duration(stage.seconds)}"
        table.add_row(stage.name, stage.what, taken, format_bytes(stage.num_bytes))
    console = _console()
    console.print(table, soft_wrap=False)
    named = str(device) if device.type == "cpu" else f"{device} ({device_name(device)})"
    console.print(f"on {named}", markup=False)


def _console() -> Console:
    width = None if sys.stdout.isatty() else _LOG_COLUMNS
    return Console(soft_wrap=True, highlight=False, width=width)
