"""The ``README.md`` of an export: what it is, how it is loaded, how far it is from its source."""

import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fingpt_lightning.deploy.comparing import Difference
from fingpt_lightning.files import to_json
from fingpt_lightning.hub.card import (
    CARD,
    EXPORT_MARK,
    IMPORT_OURS,
    LOAD_BY_US,
    LOAD_NETWORK,
    PACKAGE,
    Origin,
    evaluation_results,
    metadata_block,
    origin_of,
    results_in,
    results_of_step,
    run_folder_of,
)
from fingpt_lightning.hub.pushing import Pushed
from fingpt_lightning.models.formats.checkpoint import CHECKPOINT, load_contents
from fingpt_lightning.models.formats.peft_adapter import adapter_digest
from fingpt_lightning.models.loading import AUTO, LoadedModel
from fingpt_lightning.models.quantization.frozen_matrix import quantization_of
from fingpt_lightning.units import format_bytes, format_count

_RECORD = re.compile(re.escape(EXPORT_MARK) + r"; (\{.*\}) -->$", re.MULTILINE)
_PACKAGES = ("fingpt-lightning", "torch", "transformers", "bitsandbytes", "gguf")
_BESIDE = """
network = PeftModel.from_pretrained(network, "{name}/adapter")"""
_PEFT = """from peft import AutoPeftModelForCausalLM

network = AutoPeftModelForCausalLM.from_pretrained("{name}")"""
_OUR_PEFT = f"""\
# pip install fingpt-lightning; PEFT does not know the layers of the base
{LOAD_BY_US}"""
_GGUF = """from llama_cpp import Llama

llama = Llama("{name}/model.gguf")"""


class Exported(NamedTuple):
    """Sizes of an export, its differences from its source, its calibration text and its upload."""

    format: str
    dtype: str
    num_bytes: int
    num_parameters: int
    tolerance: float
    differences: list[Difference]
    calibration: str | None = None
    pushed: Pushed | None = None


class Reading(NamedTuple):
    """What reads an export.

    Args:
        needs_us: Whether this package alone does.
        adapter_beside: Whether an adapter lies beside the network, for PEFT.
        trained_on: Quantization of the base that the adapter was trained on.
        is_low_rank: Whether low-rank layers are in it.
        keeps_codes: Whether it is quantized as its source was, whose figures hold for it.
    """

    needs_us: bool
    adapter_beside: bool
    trained_on: str | None
    is_low_rank: bool = False
    keeps_codes: bool = False


class Known(NamedTuple):
    """What a card tells of a model beside its files.

    Args:
        origin: Origin of the model.
        tasks: Figures of evaluations by task, as ``results.json`` has them.
    """

    origin: Origin = Origin()
    tasks: Mapping[str, Any] = {}


def known_of(source: LoadedModel, results: Sequence[Path] = ()) -> Known:
    """What the files beside a model, and results of `evaluate` on it, tell of it.

    Of a run's checkpoint that is what the run measured after the same step, unless the model is
    loaded in another quantization than that of the run.

    Args:
        source: Model before its export.
        results: Outputs of evaluations.

    Raises:
        FileNotFoundError: One of ``results`` holds none.
        ValueError: One of ``results`` is of another model, or of another quantization of it.
    """
    found, tasks = source.source, dict[str, Any]()
    quantization = quantization_of(source.network)
    base, folder = found.base.path, found.folder
    origin = origin_of(base, None if Path(base).expanduser().exists() else folder)
    place = found.weights if found.adapter is None else found.adapter
    run = run_folder_of(place if place.is_dir() else place.parent)
    if run is not None:
        if place.suffix == CHECKPOINT and quantization == source.quantization_by(AUTO):
            tasks |= results_of_step(run, load_contents(place).get("global_step", -1))
        of_run = origin_of(str(run))
        origin = origin._replace(
            datasets=tuple(dict.fromkeys((*of_run.datasets, *origin.datasets))),
            base_model=origin.base_model or of_run.base_model,
            inherited={**of_run.inherited, **origin.inherited},
        )
    adapter = None if found.adapter is None else adapter_digest(found.adapter)
    for output in results:
        tasks |= results_in(
            Path(output), source.revision, adapter, quantization, source.quantization_by
        )
    return Known(origin, tasks)


def read_record(folder: Path) -> tuple[str | None, Exported | None]:
    """The request that an export was made for, and its figures, as its card has them.

    Args:
        folder: Folder of an export; of one without a record both are None.
    """
    card = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    if (found := _RECORD.search(card)) is None:
        return None, None
    try:
        record = json.loads(found[1])
        request = record.pop("request")
        record["differences"] = [Difference(*one) for one in record["differences"]]
        return request, Exported(**record)
    except (KeyError, TypeError, ValueError):  # edited by hand
        return None, None


def _record_of(exported: Exported, request: str | None) -> str:
    record = {"request": request, **exported._asdict()}
    del record["pushed"]
    return to_json(record).replace("--", "-\\u002d")  # which would end the comment


def model_card(
    source: LoadedModel,
    exported: Exported,
    name: str,
    reading: Reading,
    request: str | None = None,
    known: Known = Known(),  # noqa: B008
) -> str:
    """The text of the card.

    Args:
        source: Description of what was exported.
        exported: Figures of the export.
        name: Name of the folder.
        reading: What reads it.
        request: Digest of what was requested.
        known: What is known of the source.
    """
    found = source.source.adapter
    adapter = f"\nAdapter: `{found}`  " if found is not None else ""
    if reading.trained_on is not None:
        adapter += f"\nTrained on: its base in {reading.trained_on}  "
    rows = [
        f"| {x.kind} | {x.num_positions:,} | {x.max_logit_difference:.3g} |"
        f" {x.relative_error:.3g} | {100 * x.equal_predictions:.2f} % |"
        for x in exported.differences
    ]
    stored = {"int8": "int8 by bitsandbytes", "nf4": "NF4 by bitsandbytes, scales quantized too"}
    kept = stored.get(exported.format, exported.dtype)
    if exported.calibration is not None:
        kept += f", rounded on {exported.calibration}"
    return _metadata(name, exported, reading, known) + "\n".join(
        [
            f"# {name}",
            "",
            f"{EXPORT_MARK}; {_record_of(exported, request)} -->",
            "",
            f"Source: {source.description}  ",
            f"Revision: `{source.revision}`  {adapter}",
            f"Format: {exported.format}, {kept}  ",
            f"Parameters: {format_count(exported.num_parameters)}  ",
            f"Files: {format_bytes(exported.num_bytes)}",
            "",
            "```python",
            _loading(exported.format, reading).format(name=name),
            "```",
            "",
            "Logits of this export, loaded again, beside those of its source:",
            "",
            "| prompts | positions | largest difference | relative error | equal predictions |",
            "| --- | --: | --: | --: | --: |",
            *rows,
            "",
            f"A relative error above {exported.tolerance:g} would have been refused.",
            "",
            *_figures_of_source(known),
            f"Made with {', '.join(_versions())}.",
            "",
        ]
    )


def _metadata(name: str, exported: Exported, reading: Reading, known: Known) -> str:
    form = exported.format
    is_quantized = form in ("int8", "nf4", "gguf")
    tags = [form] if form in ("int8", "nf4", "gguf") else []
    tags += ["low-rank"] if reading.is_low_rank else []
    tags += ["lora"] if form == "peft" or reading.adapter_beside else []
    library = {"peft": "peft", "gguf": "gguf"}.get(form, "transformers")
    relations = {"peft": "adapter", "merged": "finetune"}
    # Rounding changes answers: what was measured before does not hold for its result.
    holds = form not in ("int8", "nf4") or reading.keeps_codes
    return metadata_block(
        name,
        known.origin,
        library=PACKAGE if reading.needs_us else library,
        tags=tags,
        relation="quantized" if is_quantized else relations.get(form),
        results=evaluation_results(known.tasks) if holds else (),
    )


def _figures_of_source(known: Known) -> list[str]:
    if not known.tasks:
        return []
    rows = [
        f"| {x.task_name} | {x.dataset_split or ''} | {x.metric_name} | {x.metric_value:.3f} |"
        for x in evaluation_results(known.tasks)
    ]
    return [
        "Evaluation of the source, before this export:",
        "",
        "| task | split | figure | value |",
        "| --- | --- | --- | --: |",
        *rows,
        "",
    ]


def _loading(form: str, reading: Reading) -> str:
    if form == "gguf":
        return _GGUF
    if form == "peft":
        return _OUR_PEFT if reading.needs_us else _PEFT
    if reading.needs_us:
        return IMPORT_OURS + LOAD_NETWORK
    if reading.adapter_beside:  # transformers alone gives the base
        return f"from peft import PeftModel\n{LOAD_NETWORK}{_BESIDE}"
    return LOAD_NETWORK


def _versions() -> list[str]:
    found = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
