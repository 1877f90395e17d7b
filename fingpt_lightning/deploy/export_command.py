"""``fingpt export``: a model in, a folder out that others read."""

import argparse

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from fingpt_lightning.data.calibration_text import read_calibration
from fingpt_lightning.data.text_files import find_text_files
from fingpt_lightning.deploy.comparing import TEXTS
from fingpt_lightning.deploy.exporting import check_output, export, working_dtype
from fingpt_lightning.deploy.generate_command import read_prompts
from fingpt_lightning.deploy.model_card import Exported
from fingpt_lightning.models.device import find_device
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.units import format_bytes, format_count


def run(options: argparse.Namespace) -> None:
    """Exports a model; the output folder and the prompts are checked before it is loaded.

    Args:
        options: Of `parse_options`.

    Raises:
        ValueError: The model or a setting is not as it must be, or the export differs too much.
        OSError: A path leads nowhere, or the output is there.
    """
    check_output(options.output, options.overwrite)
    if options.tolerance is not None and not options.tolerance > 0:
        raise ValueError(f"tolerance {options.tolerance} is not above 0")
    if options.device is not None and find_device(options.device).type != "cpu":
        raise ValueError(f"device {options.device}: exports are made on the CPU")
    texts = [p.text for p in read_prompts(options.prompts)] if options.prompts else list(TEXTS)
    if options.calibration:
        find_text_files(options.calibration, "calibration")
    logging.disable_progress_bar()
    source = load_model(
        options.model,
        dtype=working_dtype(options.dtype),
        quantize=options.quantize,
        adapter=options.adapter,
        tokenizer=options.tokenizer,
    )
    calibration = read_calibration(options, source.tokenizer, source.network.config)
    exported = export(
        source,
        options.format,
        options.output,
        options.dtype,
        # Of an adapter's folder the base is the one that it names.
        base=options.model if options.adapter else None,
        texts=texts,
        tolerance=options.tolerance,
        overwrite=options.overwrite,
        embeddings=options.embeddings,
        calibration=calibration,
    )
    console = Console(soft_wrap=True, highlight=False)
    console.print(difference_table(exported), soft_wrap=False)
    console.print(
        f"{options.output}: {exported.format}, {format_count(exported.num_parameters)} parameters,"
        f" {format_bytes(exported.num_bytes)}, relative error within {exported.tolerance:g}",
        markup=False,
    )


def difference_table(exported: Exported) -> Table:
    """A line a set of prompts."""
    table = Table(box=None, pad_edge=False)
    table.add_column("prompts")
    for title in ("positions", "largest difference", "relative error", "equal predictions"):
        table.add_column(title, justify="right")
    for found in exported.differences:
        table.add_row(
            found.kind,
            f"{found.num_positions:,}",
            f"{found.max_logit_difference:.3g}",
            f"{found.relative_error:.3g}",
            f"{100 * found.equal_predictions:.2f} %",
        )
    return table
