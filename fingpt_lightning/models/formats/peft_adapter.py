"""PEFT's adapter folders: which base they name, and whether they fit a network."""

from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from fingpt_lightning.low_rank.adapters import AdapterOptions
from fingpt_lightning.models.formats.weights import (
    files_sha256,
    read_json,
    refuse_pickled,
    stored_metadata,
    stored_shapes,
)
from fingpt_lightning.models.layout import features_of

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FOLDER = "adapter"
"""Of a run, and of an export that keeps the adapter beside its base."""
BEST_ADAPTER_FOLDER = "adapter_best"
"""Of a run: that of its best checkpoint."""
BASE_QUANTIZE = "base_quantize"
"""In the metadata of the weights, where PEFT looks for nothing: ``nf4`` or ``int8``."""
_WRAPPER = "base_model.model."  # what PEFT puts before the names of the base
PARTS, MAGNITUDE = ("lora_A", "lora_B"), "lora_magnitude_vector"
"""Of a layer's adapter, by PEFT's names."""
# Keys of PEFT's config that change the map, and the values under which ours is the same.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None,),
    "trainable_token_indices": (None,),
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    "target_parameters": (None, []),
}


class Base(NamedTuple):
    """The base that an adapter was trained on: a path or hub name, and its revision there."""

    path: str
    revision: str | None


def adapter_base(folder: Path) -> Base:
    """Where an adapter's base is; a relative path may start at the adapter's folder.

    Raises:
        ValueError: The config names none, or the adapter is no LoRA.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"{folder / ADAPTER_CONFIG}: peft_type {kind!r} is not LORA")
    name = config.get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{folder / ADAPTER_CONFIG} has no base_model_name_or_path")
    path = Path(name).expanduser()
    for there in (folder / path, path):
        if there.exists():
            return Base(str(there), None)
    return Base(str(name), config.get("revision"))


def trained_quantization(folder: Path) -> str | None:
    """In what the base was quantised when an adapter of ours was saved; None where none is told.

    Raises:
        FileNotFoundError: The adapter has no weights.
        ValueError: They are damaged.
    """
    return stored_metadata(_weights_file(folder)).get(BASE_QUANTIZE)


def adapter_digest(folder: Path) -> str:
    """The digest of an adapter's weights.

    Raises:
        FileNotFoundError: It has none.
    """
    return files_sha256((_weights_file(folder.expanduser()),))


def _weights_file(folder: Path) -> Path:
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        refuse_pickled(sorted(folder.glob("adapter_model.*")))
        raise FileNotFoundError(f"{folder} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}")
    return file


class StoredAdapter(NamedTuple):
    """An adapter as its folder has it: of each layer ``lora_A``, ``lora_B`` and, with DoRA, m."""

    options: AdapterOptions
    layers: dict[str, dict[str, Tensor]]


def read_adapter(folder: Path) -> StoredAdapter:
    """Reads an adapter in PEFT's format, without a network.

    Raises:
        FileNotFoundError: The folder has no config or no weights.
        ValueError: The adapter is none of linear layers, or needs what is not supported here.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"adapter {folder} has no {name}")
    adapter_base(folder)
    config = read_json(folder / ADAPTER_CONFIG)
    for key, allowed in _NEUTRAL.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{folder / ADAPTER_CONFIG}: {key} {config[key]!r} is not supported")
    options = AdapterOptions(
        int(config.get("r", 8)),
        float(config.get("lora_alpha", 8)),
        float(config.get("lora_dropout", 0.0)),
        bool(config.get("use_rslora", False)),
        bool(config.get("use_dora", False)),
    )
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / ADAPTER_WEIGHTS).items():
        name, _, part = key.removeprefix(_WRAPPER).removesuffix(".weight").rpartition(".")
        layers.setdefault(name, {})[part] = tensor
    wanted = {*PARTS, MAGNITUDE} if options.dora else {*PARTS}
    for name, parts in layers.items():
        if odd := sorted(wanted ^ parts.keys()):
            place = "has no" if odd[0] in wanted else "has an unknown"
            raise ValueError(f"{folder / ADAPTER_WEIGHTS} {place} {odd[0]} of layer {name}")
    if not layers:
        raise ValueError(f"{folder / ADAPTER_WEIGHTS} is empty")
    return StoredAdapter(options, layers)


def check_adapter(folder: Path, network: PreTrainedModel) -> None:
    """Raises unless each pair of an adapter fits a linear layer of the network.

    Args:
        folder: Of the adapter; only the header of its weights is read.
        network: Unquantised; the meta device will do.

    Raises:
        FileNotFoundError: The adapter has no weights.
        ValueError: A layer is missing, or its sizes are others.
    """
    file = _weights_file(folder)
    num_pairs = 0
    for name, shape in stored_shapes(file).items():
        layer_name, part, _ = name.removeprefix(_WRAPPER).partition(".lora_")
        if not part:
            continue
        try:
            layer = network.get_submodule(layer_name)
        except AttributeError:
            raise ValueError(f"{file}: the base has no layer {layer_name}") from None
        if name.endswith(".lora_A.weight"):
            num_pairs += 1
            _check_size(file, layer_name, "in", shape[1], features_of(layer)[0])
        elif name.endswith(".lora_B.weight"):
            _check_size(file, layer_name, "out", shape[0], features_of(layer)[1])
    if not num_pairs:
        raise ValueError(f"{file} holds no lora_A of a linear layer")


def _check_size(file: Path, layer: str, side: str, adapted: int, there: int) -> None:
    if adapted != there:
        raise ValueError(
            f"{file}: {layer} has {there} {side}_features in the base, the adapter's has {adapted}"
        )
