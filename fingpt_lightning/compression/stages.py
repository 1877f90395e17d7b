"""The stages of a compression, each kept when it is finished."""

import gc
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from fingpt_lightning.compression.card import compression_card
from fingpt_lightning.compression.depth import write_shorter
from fingpt_lightning.compression.figures import measure
from fingpt_lightning.compression.healing import heal
from fingpt_lightning.compression.options import RECORD, check_output
from fingpt_lightning.compression.settings import Settings
from fingpt_lightning.data.calibration_text import Calibration, CalibrationSource
from fingpt_lightning.decomposition.options import RECORD as DECOMPOSITION
from fingpt_lightning.decomposition.runner import Request, decompose_model
from fingpt_lightning.decomposition.source import Source, open_source
from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.files import (
    SETTINGS,
    WHOLE,
    clear_finished,
    clear_owned,
    files_sha256,
    is_unused,
    mark_finished,
    owned,
    parts_of,
    put_in_place,
    to_json,
    write_json,
    write_whole,
)
from fingpt_lightning.hub.card import CARD
from fingpt_lightning.models.device import device_name
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.profiling import keep_freed_memory


@dataclass(frozen=True)
class Compression:
    """The record that lies beside the weights.

    Args:
        settings: Settings of the compression.
        original: Figures of the original.
        small: Figures of the small model.
    """

    settings: Mapping[str, Any]
    original: Mapping[str, Any]
    small: Mapping[str, Any]


def run_stages(
    source: Source,
    settings: Settings,
    sources: Sequence[CalibrationSource],
    calibration: Calibration,
    texts: Mapping[str, Int[Tensor, "N T"]],
    output: Path,
    *,
    devices: Sequence[str] = ("cpu",),
    overwrite: bool = False,
) -> Compression:
    """Makes the small model; stages that an earlier run finished in ``OUTPUT.partial`` are kept.

    Args:
        source: Opened model.
        settings: Settings of the compression.
        sources: Parts of the calibration, to train on.
        calibration: Tokens of the calibration.
        texts: Tokens whose perplexity is measured, by name.
        output: Folder to make.
        devices: Devices of the computation: spectra are taken on all, the rest on the first. What
            is finished was perhaps made on others.
        overwrite: Whether to replace a compression that is there, and begin anew.

    Raises:
        FileExistsError: The output is refused by `check_output`.
        InUseError: Another process makes this output.
        ValueError: A stage is refused, or the folder of an unfinished run is of another.
    """
    check_output(output, overwrite)
    revision = files_sha256(source.weights.files)
    with owned(parts_of(output)) as folder:
        try:
            _begin(folder, asdict(settings) | {"revision": revision}, overwrite)
            if not (folder / WHOLE / RECORD).is_file():
                made = _stored(folder, source, settings, sources, calibration, devices)
                _finish(folder, made, source, settings, texts, output.name, devices[0])
            record = json.loads((folder / WHOLE / RECORD).read_text(encoding="utf-8"))
            check_output(output, overwrite)  # another process may have been quicker
            mark_finished(folder)
            put_in_place(folder / WHOLE, output)
            clear_owned(folder)
        finally:
            if is_unused(folder, SETTINGS):
                clear_owned(folder)
    return Compression(**record)


def begun_settings(output: Path) -> dict[str, Any]:
    """The settings of the run that was killed while it made this output; none where none was."""
    file = parts_of(output) / SETTINGS
    if not file.is_file():
        return {}
    return cast("dict[str, Any]", json.loads(file.read_text(encoding="utf-8")))


def _begin(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Checks that what an earlier run finished may be used; where it finished nothing, begins."""
    clear_finished(folder)
    if overwrite or is_unused(folder, SETTINGS):
        clear_owned(folder)
    file, now = folder / SETTINGS, json.loads(to_json(settings))
    if not file.is_file():
        write_json(file, now)
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(
                f"{folder} is of an unfinished run with {name} {before.get(name)!r}, now"
                f" {value!r}; remove it or --overwrite"
            )


def _stored(
    folder: Path,
    source: Source,
    settings: Settings,
    sources: Sequence[CalibrationSource],
    calibration: Calibration,
    devices: Sequence[str],
) -> Path:
    """The folder of the small model, all stages but the last done."""
    made = folder / "decomposed"
    if not (made / DECOMPOSITION).is_file():
        kept = settings.size * source.network.num_parameters()
        if settings.drop_blocks:
            shorter = folder / "shorter"
            if not shorter.exists():
                write_shorter(
                    settings.model, settings.tokenizer, settings.drop_blocks, calibration, shorter,
                    device=devices[0],
                )  # fmt: skip
            source = open_source(shorter)
        request = Request(
            compression=source.network.num_parameters() / kept,
            allocation=settings.allocation,
            whitening=settings.whitening,
            embedding_rank=settings.embedding_rank,
            sequential=True,
            refine=settings.refine,
            seed=settings.seed,
        )
        decompose_model(source, request, made, calibration, devices=devices)
    for steps, name, quantize in (
        (settings.heal, "", None),
        (settings.heal_quantized, "_quantized", settings.format),
    ):
        if not steps:
            continue
        healed = folder / f"healed{name}"
        if not healed.exists():
            assert source.tokenizer is not None  # the calibration has read text
            checkpoint = heal(
                folder / f"healing{name}", made, settings.model, sources, source.tokenizer,
                steps=steps, batch_size=settings.batch_size,
                block_length=settings.block_length, learning_rate=settings.learning_rate,
                warmup=settings.warmup, weight_decay=settings.weight_decay,
                precision=settings.precision, teacher_weight=settings.teacher_weight,
                teacher_dtype=settings.teacher_dtype,  # type: ignore[arg-type]
                data_dir=None if settings.data_dir is None else Path(settings.data_dir),
                seed=settings.seed, quantize=quantize, device=devices[0],
            )  # fmt: skip
            # No network stays on the device for the next stage.
            export(load_model(checkpoint, tokenizer=made, device=devices[0]), "low_rank", healed)
            gc.collect()  # a network refers to itself
        made = healed
    if (settings.format, settings.dtype) != ("low_rank", "float32"):
        rounded = folder / "rounded"
        if not rounded.exists():
            is_calibrated = settings.format != "low_rank" and not settings.heal_quantized
            export(
                load_model(made, device=devices[0]), settings.format, rounded,
                dtype=settings.dtype if settings.format == "low_rank" else "float32",
                # Weights that were trained rounded to their nearest are rounded so again.
                calibration=calibration if is_calibrated else None,
            )  # fmt: skip
            gc.collect()
        made = rounded
    return made


def _finish(
    folder: Path,
    made: Path,
    source: Source,
    settings: Settings,
    texts: Mapping[str, Int[Tensor, "N T"]],
    name: str,
    device: str,
) -> None:
    """Measures both models, and makes ``WHOLE`` of the small one with its card and record."""
    keep_freed_memory()  # as where a model is used; the stages before it hold more at a time

    def figures(which: str, model: str | Path, parameters: int, tokenizer: str | None) -> Any:
        def measured() -> dict[str, Any]:
            found = measure(
                model, texts, settings.tasks,
                data_dir=None if settings.data_dir is None else Path(settings.data_dir),
                limit=settings.limit, tokenizer=tokenizer, device=device,
            )  # fmt: skip
            return {"parameters": parameters} | found

        return _kept(folder / "figures" / f"{which}.json", torch.device(device), measured)

    dense = source.network.num_parameters()
    record = json.loads((folder / "decomposed" / DECOMPOSITION).read_text(encoding="utf-8"))
    original = figures("original", settings.model, dense, settings.tokenizer)
    small = figures("small", made, record["parameters"], None)
    described = json.loads(to_json(asdict(settings)))
    shutil.rmtree(folder / WHOLE, ignore_errors=True)
    shutil.copytree(made, folder / WHOLE)
    write_json(folder / WHOLE / DECOMPOSITION, record)
    card = compression_card(name, described, original, small)
    write_whole(folder / WHOLE / CARD, card)
    write_json(
        folder / WHOLE / RECORD, {"settings": described, "original": original, "small": small}
    )


def _kept(file: Path, device: torch.device, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures that a file holds; made where there are none, or they are of another device.

    Speeds of two devices are not to be compared.
    """
    if file.is_file():
        found = cast("dict[str, Any]", json.loads(file.read_text(encoding="utf-8")))
        if found.get("device") == device_name(device):
            return found
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, make())
    return cast("dict[str, Any]", json.loads(file.read_text(encoding="utf-8")))
