"""``fingpt export`` and the function `export`: a model as a folder that other programs read."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from fingpt_lightning.data.calibration_text import calibration_sources, read_calibration
from fingpt_lightning.deploy import exporting
from fingpt_lightning.deploy.comparing import TEXTS
from fingpt_lightning.deploy.export_options import EMBEDDINGS, FORMATS, check_options
from fingpt_lightning.deploy.exporting import check_output, working_dtype
from fingpt_lightning.deploy.generate_command import read_prompts
from fingpt_lightning.deploy.model_card import Exported
from fingpt_lightning.models.device import find_device
from fingpt_lightning.models.loading import DTYPES, load_model
from fingpt_lightning.terminal.command_line import options_as_arguments
from fingpt_lightning.terminal.messages import check_choice
from fingpt_lightning.units import format_bytes, format_count


def export(
    model: str | Path,
    format: str,
    output: str | Path,
    *,
    adapter: str | Path | None = None,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    quantize: str = "auto",
    device: str | None = None,
    overwrite: bool = False,
    embeddings: str | None = None,
    prompts: str | Path | None = None,
    tolerance: float | None = None,
    calibration: str | Path | Sequence[str | Path] | None = None,
    calibration_task: str | None = None,
    calibration_tokens: int | None = None,
    data_dir: str | Path | None = None,
) -> Exported:
    """Writes a model in another format, as ``fingpt export`` does.

    The export is loaded again and compared with its source before the folder appears. Output
    folder and prompts are checked before the model is loaded.

    Args:
        model: Hugging Face folder or hub name, GGUF, adapter, checkpoint or run folder.
        format: ``hf`` (dense, for plain transformers), ``low_rank``, ``peft`` (the adapter alone),
            ``merged``, ``int8``, ``nf4`` or ``gguf``.
        output: Folder that is made.
        adapter: LoRA adapter for the model: folder, or a finetuning's run folder or checkpoint.
        tokenizer: Folder of the tokenizer, where the model has none beside it.
        dtype: Type of the stored weights that are not quantized.
        quantize: ``nf4`` or ``int8`` for the source as it is loaded, ``none``, or ``auto`` for
            what the adapter was trained on.
        device: None or ``cpu``: exports are made there.
        overwrite: Whether an export in the folder is replaced.
        embeddings: ``quantized`` or ``kept``, for int8 and nf4; None quantizes those of low-rank
            models.
        prompts: File of real prompts to compare on: ``.txt``, one per line, or ``.jsonl``.
        tolerance: Largest relative error of the logits; None takes that of the format.
        calibration: Text files, or a mixture of ``PATH=WEIGHT`` and ``task:NAME=WEIGHT``; rounding
            to int8 or nf4 keeps the layers' outputs on them.
        calibration_task: Name of a task whose prompts and answers replace the files.
        calibration_tokens: Largest number of tokens that are read; None is 32768.
        data_dir: Folder that holds ``TASK/train.jsonl``; None reads from the Hugging Face hub.

    Returns:
        Sizes, and the differences between the logits of source and export.

    Raises:
        ValueError: The model or a setting is not valid, or the export differs too much.
        OSError: A path does not exist, or the output exists already.
    """
    with options_as_arguments():
        check_options(argparse.Namespace(**locals()))
    output = Path(output)
    check_output(output, overwrite)
    check_choice("format", format, FORMATS)
    check_choice("dtype", dtype, DTYPES)
    if embeddings is not None:
        check_choice("embeddings", embeddings, EMBEDDINGS)
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance {tolerance} is not above 0")
    if device is not None and find_device(device).type != "cpu":
        raise ValueError(f"device {device}: exports are made on the CPU")
    texts = [p.text for p in read_prompts(Path(prompts))] if prompts is not None else list(TEXTS)
    if calibration is not None:
        calibration_sources(calibration)
    source = load_model(
        model, dtype=working_dtype(dtype), quantize=quantize, adapter=adapter, tokenizer=tokenizer
    )
    tokens = read_calibration(
        source.tokenizer,
        source.network.config,
        calibration=calibration,
        calibration_task=calibration_task,
        calibration_tokens=calibration_tokens,
        data_dir=data_dir,
    )
    return exporting.export(
        source,
        format,
        output,
        dtype,
        texts=texts,
        tolerance=tolerance,
        overwrite=overwrite,
        embeddings=embeddings,
        calibration=tokens,
    )


def run(options: argparse.Namespace) -> None:
    """Exports a model as the options request, and prints how far the export differs.

    Args:
        options: Result of `parse_options`.

    Raises:
        ValueError: The model or a setting is not valid, or the export differs too much.
        OSError: A path does not exist, or the output exists already.
    """
    logging.disable_progress_bar()
    exported = export(**vars(options))
    console = Console(soft_wrap=True, highlight=False)
    console.print(difference_table(exported), soft_wrap=False)
    console.print(
        f"{options.output}: {exported.format}, {format_count(exported.num_parameters)} parameters,"
        f" {format_bytes(exported.num_bytes)}, relative error within {exported.tolerance:g}",
        markup=False,
    )


def difference_table(exported: Exported) -> Table:
    """One line per set of prompts."""
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
