"""``fingpt decompose``: a dense model in, a folder of low-rank layers out."""

import argparse
import statistics
import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from fingpt_lightning.data.calibration_text import read_calibration
from fingpt_lightning.decomposition.runner import (
    DecomposedLayer,
    Request,
    check_output,
    decompose_model,
)
from fingpt_lightning.decomposition.source import open_source
from fingpt_lightning.low_rank.budget import name_within_block
from fingpt_lightning.low_rank.decomposition import Method
from fingpt_lightning.models.device import find_device
from fingpt_lightning.units import format_count

_LOG_COLUMNS = 140


def run(options: argparse.Namespace) -> None:
    """Decomposes a model; what can be checked is checked before any weight is read.

    Args:
        options: Of `parse_options`.

    Raises:
        ValueError: The model or a setting is not as it must be.
        OSError: A path leads nowhere, or the output is there.
    """
    check_output(options.output, options.overwrite)
    devices = find_devices(options.device)
    if options.workers > 1 and devices != ["cpu"]:
        raise ValueError(f"workers {options.workers}: processes share the layers on the CPU alone")
    logging.disable_progress_bar()
    source = open_source(options.model, options.tokenizer)
    calibration = read_calibration(options, source.tokenizer, source.network.config)
    request = Request(
        options.rank_ratio,
        options.compression,
        options.energy,
        options.allocation or "spectrum",
        options.embedding_rank,
        Method(options.method),
        1 if options.seed is None else options.seed,
        options.dtype,
        options.damping,
        options.sequential,
    )
    made = decompose_model(
        source,
        request,
        options.output,
        calibration,
        workers=options.workers,
        devices=devices,
        overwrite=options.overwrite,
    )
    # A log is wider than the 80 columns that rich gives what is no terminal.
    width = None if sys.stdout.isatty() else _LOG_COLUMNS
    console = Console(soft_wrap=True, highlight=False, width=width)
    for table in (layer_table(made.layers), kind_table(made.layers)):
        console.print(table, soft_wrap=False)
        console.print()
    if source.tokenizer is None:
        console.print("no tokenizer that fits is with the model, so none is written; --tokenizer")
    if calibration is not None:
        widest = max(layer.in_features for layer in source.layers)
        if calibration.ids.numel() < widest:
            console.print(
                f"calibration: {calibration.ids.numel():,} tokens are fewer than the {widest:,}"
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

    Raises:
        ValueError: There is none of that name.
    """
    device = find_device(name)
    if device.type == "cuda" and device.index is None:
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [str(device)]


def layer_table(layers: Sequence[DecomposedLayer]) -> Table:
    """A row a block, a column a kind of layer: its rank, and its error in percent."""
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
    """A row a kind of layer: size, ranks, parameters and median errors over all blocks."""
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
