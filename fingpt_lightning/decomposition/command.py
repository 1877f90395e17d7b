"""``fingpt decompose`` and the function `decompose`: a dense model in, low-rank layers out."""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from fingpt_lightning.data.calibration_text import read_calibration
from fingpt_lightning.decomposition.options import check_options, check_output
from fingpt_lightning.decomposition.runner import (
    DecomposedLayer,
    Decomposition,
    Request,
    decompose_model,
)
from fingpt_lightning.decomposition.source import open_source
from fingpt_lightning.low_rank.budget import name_within_block
from fingpt_lightning.low_rank.decomposition import Method
from fingpt_lightning.models.device import find_device
from fingpt_lightning.models.formats.tokenizer import holds_tokenizer
from fingpt_lightning.models.loading import DTYPES
from fingpt_lightning.terminal.command_line import options_as_arguments
from fingpt_lightning.terminal.messages import check_choice
from fingpt_lightning.units import format_count

_LOG_COLUMNS = 140


def decompose(
    model: str | Path,
    output: str | Path,
    *,
    rank_ratio: float | None = None,
    compression: float | None = None,
    energy: float | None = None,
    allocation: str | None = None,
    embedding_rank: int | float | None = None,
    calibration: str | Path | Sequence[str | Path] | None = None,
    calibration_task: str | None = None,
    calibration_tokens: int | None = None,
    data_dir: str | Path | None = None,
    damping: float | None = None,
    sequential: bool = False,
    refine: int = 0,
    whitening: str | None = None,
    method: str = "exact",
    seed: int | None = None,
    workers: int = 1,
    device: str | None = None,
    dtype: str = "float32",
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
) -> Decomposition:
    """Writes a dense model with low-rank layers in place of its linear ones.

    As ``fingpt decompose`` does: what can be checked is checked before any weight is read, the
    folder appears whole or not at all, and a run that was killed goes on where it was.

    Args:
        model: Hugging Face folder or hub name, GGUF, checkpoint or run folder.
        output: Folder to make.
        rank_ratio: Share r / min(in, out) of each layer, to 1; give one of these three.
        compression: Parameters of the dense model over those stored, above 1.
        energy: Share of the squared singular values that each layer keeps.
        allocation: ``uniform`` (None), ``spectrum`` or ``loss``, which takes a calibration: how
            ``compression`` is shared out.
        embedding_rank: Rank, or share of the width, of an embedding tied to the head; None keeps
            it dense.
        calibration: Text files, or a mixture of ``PATH=WEIGHT`` and ``task:NAME=WEIGHT``; the
            layers' outputs on them are kept.
        calibration_task: Name of a task to take prompts and answers of, in place of files.
        calibration_tokens: Most tokens that are read; None is 32768.
        data_dir: Folder that holds ``TASK/train.jsonl``; None reads from the Hugging Face hub.
        damping: Weight of the weights' own error beside that of the outputs; None is 0, or
            0.01 with ``sequential`` or ``whitening`` of both sides.
        sequential: Whether each layer is fitted to what reaches it through those before it.
        refine: Adam steps over the factors of each block on the difference of block outputs; with
            a calibration.
        whitening: ``input`` (None), or ``both`` for factors that are the nearest by the loss's
            curvature at the outputs too; with a calibration.
        method: ``exact`` or ``randomized``.
        seed: Seed of the randomized method, ``allocation`` by loss and ``whitening`` of both
            sides; None is 1.
        workers: Processes of one thread that share the layers, on the CPU.
        device: ``cpu``, ``cuda`` for all of them, or ``cuda:1``; None is CUDA where there is one.
        dtype: Type of the stored weights.
        tokenizer: Folder of the tokenizer, where the model has none beside it.
        overwrite: Whether a decomposition in the folder is replaced, and begun anew.

    Returns:
        The record that lies beside the weights: sizes, ranks and errors of all layers.

    Raises:
        ValueError: The model or a setting is not as it must be.
        OSError: A path leads nowhere, or the output is there.
    """
    with options_as_arguments():
        check_options(argparse.Namespace(**locals()))
    output = Path(output)
    check_output(output, overwrite)
    check_choice("dtype", dtype, DTYPES)
    check_choice("method", method, list(Method))
    request = Request(
        rank_ratio=rank_ratio,
        compression=compression,
        energy=energy,
        allocation="uniform" if allocation is None else allocation,
        embedding_rank=embedding_rank,
        method=Method(method),
        seed=1 if seed is None else seed,
        dtype=dtype,
        damping=damping,
        sequential=sequential,
        refine=refine,
        whitening="input" if whitening is None else whitening,
    )
    devices = find_devices(device)
    if workers < 1:
        raise ValueError(f"workers {workers} is below 1")
    if workers > 1 and devices != ["cpu"]:
        raise ValueError(f"workers {workers}: processes share the layers on the CPU alone")
    source = open_source(model, tokenizer)
    tokens = read_calibration(
        source.tokenizer,
        source.network.config,
        calibration=calibration,
        calibration_task=calibration_task,
        calibration_tokens=calibration_tokens,
        data_dir=data_dir,
    )
    return decompose_model(
        source, request, output, tokens, workers=workers, devices=devices, overwrite=overwrite
    )


def run(options: argparse.Namespace) -> None:
    """Decomposes a model as the options request, and prints ranks, sizes and errors.

    Args:
        options: Result of `parse_options`.

    Raises:
        ValueError: The model or a setting is not as it must be.
        OSError: A path leads nowhere, or the output is there.
    """
    logging.disable_progress_bar()
    made = decompose(**vars(options))
    # A log is wider than the 80 columns that rich gives an output that is not a terminal.
    width = None if sys.stdout.isatty() else _LOG_COLUMNS
    console = Console(soft_wrap=True, highlight=False, width=width)
    for table in (layer_table(made.layers), kind_table(made.layers)):
        console.print(table, soft_wrap=False)
        console.print()
    if made.blocks:
        before, after = (
            statistics.median(getattr(block, name) for block in made.blocks)
            for name in ("before", "after")
        )
        console.print(
            f"refined: median error of a block's outputs {100 * before:.2f} % before,"
            f" {100 * after:.2f} % after"
        )
    if not holds_tokenizer(options.output):
        console.print("no tokenizer that fits is with the model, so none is written; --tokenizer")
    if made.calibration is not None:
        widest = max(layer.in_features for layer in made.layers if _block(layer.name))
        if (num_tokens := made.calibration["tokens"]) < widest:
            console.print(
                f"calibration: {num_tokens:,} tokens are fewer than the {widest:,}"
                " inputs of the widest layer; more text will do better"
            )
    console.print(
        f"{options.output}: {format_count(made.parameters)} of"
        f" {format_count(made.dense_parameters)} parameters,"
        f" {made.total_compression_ratio:.2f}x smaller in total,"
        f" {made.layer_compression_ratio:.2f}x in these layers",
        markup=False,
    )


def find_devices(name: str | None) -> list[str]:
    """The devices that share the layers: ``cuda`` is all of them.

    Args:
        name: Name of a device; None is CUDA where there is one, else the CPU.

    Raises:
        ValueError: There is none of that name, or it is of another kind.
    """
    device = find_device(name)
    if device.type not in ("cpu", "cuda"):  # most others have no float64
        raise ValueError(f"device {name!r}: layers are decomposed on cpu, cuda or cuda:1 alone")
    if device.type == "cuda" and device.index is None:
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [str(device)]


def layer_table(layers: Sequence[DecomposedLayer]) -> Table:
    """One row per block, one column per kind of layer: its rank, and its error in percent."""
    has_outputs = any(layer.output_error is not None for layer in layers)
    what = "outputs on the calibration text" if has_outputs else "weights"
    table = Table(box=None, pad_edge=False, title=f"rank, and relative error of the {what} (%)")
    kinds = list(dict.fromkeys(name_within_block(layer.name) for layer in layers))
    table.add_column("block")
    for kind in kinds:
        table.add_column(kind.rpartition(".")[2], justify="right")
    rows: dict[str, dict[str, DecomposedLayer]] = {}
    for layer in layers:
        rows.setdefault(_block(layer.name), {})[name_within_block(layer.name)] = layer
    for block, found in rows.items():
        table.add_row(block, *(_cell(found.get(kind)) for kind in kinds))
    return table


def kind_table(layers: Sequence[DecomposedLayer]) -> Table:
    """One row per kind of layer: size, ranks, parameters and median errors over all blocks."""
    table = Table(box=None, pad_edge=False)
    table.add_column("layers")
    for title in ("number", "in x out", "rank", "r / min", "parameters", "dense / stored",
                  "weights %", "outputs %"):  # fmt: skip
        table.add_column(title, justify="right")
    kinds: dict[str, list[DecomposedLayer]] = {}
    for layer in layers:
        kinds.setdefault(name_within_block(layer.name), []).append(layer)
    for kind, found in kinds.items():
        size = found[0].in_features, found[0].out_features
        ranks = sorted(layer.rank for layer in found if layer.rank is not None)
        num_dense = len(found) - len(ranks)
        own = sum(layer.parameters for layer in found)
        dense = sum(layer.dense_parameters for layer in found)
        outputs = [x.output_error for x in found if x.output_error is not None]
        table.add_row(
            kind.rpartition(".")[2],
            str(len(found)) + (f", {num_dense} dense" if num_dense else ""),
            f"{size[0]} x {size[1]}",
            _range([str(rank) for rank in ranks]),
            _range([f"{rank / min(size):.3f}" for rank in ranks]),
            format_count(own),
            f"{dense / own:.2f}",
            f"{100 * statistics.median(layer.weight_error for layer in found):.1f}",
            f"{100 * statistics.median(outputs):.1f}" if outputs else "",
        )
    return table


def _block(name: str) -> str:
    return next((part for part in name.split(".") if part.isdecimal()), "")


def _cell(layer: DecomposedLayer | None) -> str:
    if layer is None:
        return ""
    if layer.rank is None:
        return "dense"
    error = layer.weight_error if layer.output_error is None else layer.output_error
    return f"{layer.rank} {100 * error:.1f}"


def _range(values: Sequence[str]) -> str:
    if not values:
        return ""
    first, last = values[0], values[-1]
    return first if first == last else f"{first} - {last}"
