"""``fingpt export`` and the function `export`: a model as a folder that other programs read."""

import argparse
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from fingpt_lightning.data.calibration_text import calibration_sources, read_calibration
from fingpt_lightning.deploy import exporting
from fingpt_lightning.deploy.comparing import TEXTS
from fingpt_lightning.deploy.export_options import EMBEDDINGS, FORMATS, check_options
from fingpt_lightning.deploy.exporting import check_output, working_dtype
from fingpt_lightning.deploy.generate_command import read_prompts
from fingpt_lightning.deploy.model_card import Exported, read_record
from fingpt_lightning.files import to_json
from fingpt_lightning.hub.card import refuse_missing_results
from fingpt_lightning.hub.names import check_branch, check_hub_name
from fingpt_lightning.hub.pushing import push_to_hub, refuse_no_access
from fingpt_lightning.models.device import find_device
from fingpt_lightning.models.loading import DTYPES, build_model
from fingpt_lightning.models.sources import ModelSource, resolve_source
from fingpt_lightning.terminal.command_line import as_list, options_as_arguments
from fingpt_lightning.terminal.inputs import weighted_name
from fingpt_lightning.terminal.messages import check_choice
from fingpt_lightning.units import format_bytes, format_count

_OF_THE_FILES = (
    "format", "dtype", "quantize", "embeddings", "prompts", "tolerance", "calibration",
    "calibration_task", "calibration_tokens", "data_dir", "results",
)  # fmt: skip
"""The options that the files of an export depend on, beside the model."""


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
    results: str | Path | Sequence[str | Path] | None = None,
    push: str | None = None,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
) -> Exported:
    """Writes a model in another format, as ``fingpt export`` does, and uploads it if requested.

    The export is loaded again and compared with its source before the folder appears. Output
    folder and prompts are checked before the model is loaded. With ``push`` a folder that the same
    call has made before is uploaded as it is.

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
        results: Outputs of `evaluate` on the model, whose figures get into the card, beside those
            of a run's own evaluations.
        push: OWNER/NAME of a repository of the Hugging Face hub, as in `push_to_hub`.
        private: Whether only its owner sees the repository.
        revision: New branch for the files; None is ``main``.
        commit_message: Message of the commit.

    Returns:
        Sizes, the differences between the logits of source and export, and its address on the hub.

    Raises:
        ValueError: The model or a setting is not valid, or the export differs too much.
        OSError: A path does not exist, the output exists already, or it cannot be uploaded, and
            stays then.
    """
    given = dict(locals())
    with options_as_arguments():
        check_options(argparse.Namespace(**given))
    output = Path(output)
    if push is not None:
        check_hub_name(push)
        if revision is not None:
            check_branch(revision)
        refuse_no_access()
    if push is not None and output.exists() and not overwrite:
        exported = _made_before(given)
    else:
        exported = _made_now(given)
    if push is None:
        return exported
    pushed = push_to_hub(
        output, push, private=private, revision=revision, commit_message=commit_message
    )
    return exported._replace(pushed=pushed)


def _made_now(given: Mapping[str, Any]) -> Exported:
    output, form, dtype = Path(given["output"]), given["format"], given["dtype"]
    check_output(output, given["overwrite"])
    check_choice("format", form, FORMATS)
    check_choice("dtype", dtype, DTYPES)
    if given["embeddings"] is not None:
        check_choice("embeddings", given["embeddings"], EMBEDDINGS)
    tolerance, device, prompts = (given[name] for name in ("tolerance", "device", "prompts"))
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance {tolerance} is not above 0")
    if device is not None and find_device(device).type != "cpu":
        raise ValueError(f"device {device}: exports are made on the CPU")
    texts = [p.text for p in read_prompts(Path(prompts))] if prompts is not None else list(TEXTS)
    if given["calibration"] is not None:
        calibration_sources(given["calibration"])
    results = [Path(folder) for folder in as_list(given["results"])]
    refuse_missing_results(results)
    found = _found(given)
    source = build_model(found, dtype=working_dtype(dtype), quantize=given["quantize"])
    tokens = read_calibration(
        source.tokenizer,
        source.network.config,
        calibration=given["calibration"],
        calibration_task=given["calibration_task"],
        calibration_tokens=given["calibration_tokens"],
        data_dir=given["data_dir"],
    )
    return exporting.export(
        source,
        form,
        output,
        dtype,
        texts=texts,
        tolerance=tolerance,
        overwrite=given["overwrite"],
        embeddings=given["embeddings"],
        calibration=tokens,
        request=_request(found, given),
        results=results,
    )


def _made_before(given: Mapping[str, Any]) -> Exported:
    """What a folder is that the same options made of the same files, to be uploaded alone.

    Raises:
        FileExistsError: It is something else, or of files that have changed since.
        OSError, ValueError: The model cannot be found.
    """
    output = Path(given["output"])
    check_output(output, overwrite=True)
    request, exported = read_record(output)
    if exported is None or request != _request(_found(given), given):
        raise FileExistsError(
            f"output {output} is there already, made by other options or of files that have"
            " changed since; --overwrite replaces it"
        )
    return exported


def _found(given: Mapping[str, Any]) -> ModelSource:
    return resolve_source(given["model"], adapter=given["adapter"], tokenizer=given["tokenizer"])


def _request(source: ModelSource, given: Mapping[str, Any]) -> str:
    """A digest of what an export depends on: the options, and size and time of the files they name.

    Args:
        source: Parts of the model.
        given: The options by name.
    """
    parts: dict[str, Any] = {name: given[name] for name in _OF_THE_FILES}
    parts["commit"] = source.commit
    texts = [weighted_name(str(word))[0] for word in as_list(given["calibration"])]
    named = [source.weights, source.adapter, source.tokenizer]
    named += [Path(x) for x in (*as_list(given["prompts"]), *as_list(given["results"]), *texts)]
    parts["files"] = [None if place is None else _state(place.expanduser()) for place in named]
    return sha256(to_json(parts, default=str).encode()).hexdigest()[:32]


def _state(place: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of a file, or of those in a folder."""
    files = [place] if place.is_file() else sorted(place.iterdir()) if place.is_dir() else []
    stats = [(file, file.stat()) for file in files if file.is_file()]
    return [(str(file.resolve()), one.st_size, one.st_mtime_ns) for file, one in stats]


def run(options: argparse.Namespace) -> None:
    """Exports a model as the options request, prints how far the export differs, and uploads it.

    Args:
        options: Result of `parse_options`.

    Raises:
        ValueError: The model or a setting is not valid, or the export differs too much.
        OSError: A path does not exist, the output exists already, or it cannot be uploaded, and
            stays then.
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
    if exported.pushed is not None:
        url, is_new = exported.pushed
        console.print(f"{url}: {'pushed' if is_new else 'has these files already'}", markup=False)


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
