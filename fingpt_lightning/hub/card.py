"""The metadata of a model card: YAML before its text, as the hub reads it."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from fingpt_lightning.evaluation.run_evaluations import (
    RESULTS,
    check_results,
    read_run_evaluations,
)
from fingpt_lightning.hub.names import is_hub_name
from fingpt_lightning.metric_keys import EVAL_FIGURES
from fingpt_lightning.tasks.library import find_task

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CARD = "README.md"
EXPORT_MARK = "<!-- made by: fingpt export"
"""What the card of an export begins its record with."""
PACKAGE = "fingpt-lightning"
_INHERITED = ("license", "license_name", "license_link", "language")
"""What holds for whatever is made of a model too."""
_RUN_CONFIG, _DECOMPOSITION = "config.yaml", "decomposition.json"
_MOST_STEPS_BACK = 4
_HUB_TEXT = "hf://"
_F1 = ("macro_f1", "weighted_f1", "average_f1", "entity_f1", "token_f1")
_ROUGE = {"rouge1": "rouge", "rouge2": "rouge", "rouge_l": "rouge", "entity_precision": "precision"}
_METRIC_TYPES = {**dict.fromkeys(_F1, "f1"), **_ROUGE, "entity_recall": "recall"}
"""The hub's names of figures that are called otherwise here."""
_TASK_TYPES = {
    "labels": "text-classification",
    "choices": "multiple-choice",
    "partial": "multiple-choice",
    "numeric": "question-answering",
    "spans": "token-classification",
    "summary": "summarization",
}
"""The hub's name of a task, by kind; of all others it is text generation."""

NEEDS_US = """\
# pip install fingpt-lightning; without it transformers does not know the model type
"""
IMPORT_OURS = f"{NEEDS_US}import fingpt_lightning\n"
LOAD_BY_US = """import fingpt_lightning

network = fingpt_lightning.load_model("{name}").network"""
"""How a card loads what this package alone reads, by its name."""
LOAD_NETWORK = """from transformers import AutoModelForCausalLM, AutoTokenizer

network = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")"""
"""How a card loads a network, by its name; `IMPORT_OURS` before it where transformers needs us."""


class Origin(NamedTuple):
    """What is known of the model that another one is made of.

    Args:
        base_model: Its name on the hub; None where it is not from there.
        inherited: License and language, as its card has them.
        datasets: Names on the hub of what it was trained on here.
    """

    base_model: str | None = None
    inherited: Mapping[str, Any] = {}
    datasets: tuple[str, ...] = ()


def origin_of(name: str, folder: Path | None = None) -> Origin:
    """What the files of a model tell of its origin, through what it was made of here.

    Args:
        name: Path or hub name.
        folder: Folder in which the files of a hub name are.
    """
    return _origin(name, folder, _MOST_STEPS_BACK)


def _origin(name: str, folder: Path | None, steps_back: int) -> Origin:
    path = Path(name).expanduser()
    if not path.exists():
        card = read_metadata(_cached_card(name) if folder is None else folder / CARD)
        is_of_hub = folder is not None or is_hub_name(name)  # else a path that is gone
        return Origin(name if is_of_hub else None, _inherited(card))
    place = path if path.is_dir() else path.parent
    card = read_metadata(place / CARD)
    base = card.get("base_model")
    found = Origin(base if isinstance(base, str) else None, _inherited(card))
    before, datasets = _made_of(place)
    if before is not None and steps_back and found.base_model is None:
        earlier = _origin(before, None, steps_back - 1)
        found = Origin(earlier.base_model, {**earlier.inherited, **found.inherited})
        datasets += tuple(name for name in earlier.datasets if name not in datasets)
    return found._replace(datasets=datasets)


def _cached_card(name: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, CARD) if is_hub_name(name) else None
    return Path(found) if isinstance(found, str) else Path()


def _made_of(place: Path) -> tuple[str | None, tuple[str, ...]]:
    """The model that a decomposition or a run started from, and the data sets of the run."""
    if (place / _DECOMPOSITION).is_file():
        described = _text(_mapping(place / _DECOMPOSITION).get("source")) or ""
        return described.rpartition(" (")[0] or None, ()
    run = run_folder_of(place)
    if run is None:
        return None, ()
    config = _mapping(run / _RUN_CONFIG)
    model, data = (_within(_within(config, key), "init_args") for key in ("model", "data"))
    return _text(model.get("base") or model.get("init_from")), datasets_of(data)


def run_folder_of(place: Path) -> Path | None:
    """The folder of the run that a checkpoint or adapter belongs to, if any."""
    folders = (place, *place.absolute().parents[:2])
    return next((folder for folder in folders if (folder / _RUN_CONFIG).is_file()), None)


def datasets_of(data: Mapping[str, Any]) -> tuple[str, ...]:
    """The names on the hub of the data sets that settings of data name.

    Args:
        data: Settings with ``tasks`` or ``train_files``.
    """
    names = [dataset_of(str(name)) for name in _names(data.get("tasks"))]
    for text in _names(data.get("train_files")):
        if str(text).startswith(_HUB_TEXT):
            parts = str(text).removeprefix(_HUB_TEXT).split("/")[:2]
            names.append("/".join(parts).partition("@")[0].partition(":")[0])
    return tuple(dict.fromkeys(name for name in names if name is not None))


def dataset_of(task: str) -> str | None:
    """The name on the hub of a task's data set; None where it has none."""
    try:
        hub = find_task(task).hub
    except (ValueError, OSError):  # one of the user's own, which is no longer there
        return None
    return None if hub is None else hub.name


def has_mark(folder: Path, mark: str) -> bool:
    """Whether the card of a folder has a mark that tells what made it."""
    card = folder / CARD
    return card.is_file() and mark in card.read_text(encoding="utf-8", errors="replace")


def read_metadata(card: Path) -> dict[str, Any]:
    """The metadata of a card; empty where it has none that can be read."""
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n"):
        return {}
    try:
        found = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def metadata_block(
    name: str,
    origin: Origin,
    *,
    library: str,
    tags: Sequence[str],
    relation: str | None = None,
    datasets: Sequence[str] = (),
    results: "Sequence[EvalResult]" = (),
) -> str:
    """The block that a card begins with.

    Args:
        name: Name of the model.
        origin: Origin of the model.
        library: Library that loads it.
        tags: Tags beside that of this package.
        relation: Relation to the base as the hub names it: adapter, finetune or quantized.
        datasets: Data sets beside those of the origin.
        results: Figures of evaluations.
    """
    from huggingface_hub import ModelCardData

    all_datasets = list(dict.fromkeys((*origin.datasets, *datasets)))
    settings: dict[str, Any] = dict(origin.inherited)
    if origin.base_model is not None:
        settings |= {"base_model": origin.base_model}
        settings |= {} if relation is None else {"base_model_relation": relation}
    data = ModelCardData(
        library_name=library,
        pipeline_tag="text-generation",
        tags=[PACKAGE, *tags],
        datasets=all_datasets or None,
        model_name=name,
        eval_results=list(results) or None,
        **settings,
    )
    if not results:
        data.pop("model_name")  # it is for the results alone
    return f"---\n{data.to_yaml()}\n---\n"


def results_of_step(run: Path, step: int) -> Mapping[str, Any]:
    """The figures by task of a run's evaluation after a step; empty where there was none.

    Args:
        run: Folder of the run.
        step: Number of optimizer steps.
    """
    try:
        found = read_run_evaluations(run)
    except ValueError:  # damaged files of an evaluation do not stop an export
        return {}
    return next((one.results["tasks"] for one in found if one.step == step), {})


def refuse_missing_results(folders: Sequence[str | Path]) -> None:
    """Refuses outputs of evaluations that are none.

    Raises:
        FileNotFoundError: One of them holds no results.
    """
    for folder in folders:
        if not (Path(folder) / RESULTS).is_file():
            raise FileNotFoundError(f"results {folder}: no {RESULTS} in it")


def results_in(
    folder: Path,
    revision: str,
    adapter_sha256: str | None,
    quantization: str | None,
    quantization_by: Callable[[str], str | None],
) -> Mapping[str, Any]:
    """The figures by task of a folder of ``fingpt evaluate``.

    Args:
        folder: Output of the evaluation.
        revision: Revision of the model that they have to be of.
        adapter_sha256: Digest of its adapter; None where it has none.
        quantization: Quantization of the model as it is loaded; None where it is not quantized.
        quantization_by: Function from the setting ``quantize`` of an evaluation to the
            quantization that it gives the model.

    Raises:
        FileNotFoundError: It holds no results.
        ValueError: They are of another model, or of it in another quantization, or cannot be read.
    """
    refuse_missing_results([folder])
    file = folder / RESULTS
    found = _mapping(file)
    check_results(found, file)
    if (found.get("revision"), found.get("adapter_sha256")) != (revision, adapter_sha256):
        raise ValueError(
            f"results {folder} are of {found.get('model', 'a run')}, whose weights are not those of"
            " the model"
        )
    setting = _text(_within(found, "settings").get("quantize")) or "auto"
    if (measured := quantization_by(setting)) != quantization:
        resolved = f" ({measured or 'not quantized'})" if setting == "auto" else ""
        raise ValueError(
            f"results {folder} were measured with quantize {setting}{resolved}, and the model is"
            f" {quantization or 'not quantized'}; quantize {setting} exports what was measured"
        )
    tasks: dict[str, Any] = found["tasks"]
    return tasks


def evaluation_results(tasks: Mapping[str, Any]) -> "list[EvalResult]":
    """The figures of evaluations in the form of the hub, the main one of each task first.

    Args:
        tasks: Entries of ``results.json`` by task.
    """
    from huggingface_hub import EvalResult

    found = []
    for name, figures in tasks.items():
        try:
            task = find_task(name)
        except (ValueError, OSError):  # one of the user's own
            task = None
        hub = None if task is None else task.hub
        main = figures.get("main_metric")
        keys = sorted((key for key in EVAL_FIGURES if key in figures), key=lambda key: key != main)
        found += [
            EvalResult(
                task_type=_TASK_TYPES.get(str(figures.get("kind")), "text-generation"),
                task_name=name,
                dataset_type=name if hub is None else hub.name,
                dataset_name=name if task is None else task.title,
                dataset_config=None if hub is None else hub.config,
                dataset_split=figures.get("split"),
                dataset_args={"rows": figures["n"]} if "n" in figures else None,
                metric_type=_METRIC_TYPES.get(key, key),
                metric_name=EVAL_FIGURES[key],
                metric_value=round(float(figures[key]), 4),
            )
            for key in keys
        ]
    return found


def _inherited(card: Mapping[str, Any]) -> dict[str, Any]:
    return {key: card[key] for key in _INHERITED if card.get(key)}


def _within(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A group of settings; empty where there is none: the file may be of another program."""
    found = settings.get(key)
    return found if isinstance(found, dict) else {}


def _names(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple | dict) else [value] if value else []


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _mapping(file: Path) -> dict[str, Any]:
    """The object in a file of JSON or YAML; empty where it holds none."""
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
