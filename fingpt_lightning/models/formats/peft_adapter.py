"""PEFT's adapter folders: config and weights, read by an allow list and written.

Reading and writing need no network; `check_adapter` holds an adapter against one. What is read may
also be a checkpoint of a finetuning, which holds the same.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from fingpt_lightning.files import files_sha256, read_json, write_json, written_whole
from fingpt_lightning.low_rank.adapters import AdapterOptions
from fingpt_lightning.models.formats.checkpoint import (
    CHECKPOINT,
    holds_adapters,
    read_adapter_checkpoint,
)
from fingpt_lightning.models.formats.safetensors_files import (
    refuse_pickled,
    stored_metadata,
    stored_shapes,
)
from fingpt_lightning.models.layout import features_of
from fingpt_lightning.terminal.messages import shortened

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FOLDER = "adapter"
"""Folder in a run folder, and in an export that keeps the adapter beside its base."""
BEST_ADAPTER_FOLDER = "adapter_best"
"""Folder in a run folder: the adapter of its best checkpoint."""
BASE_QUANTIZE = "base_quantize"
"""Key in the metadata of the weights, where PEFT looks for nothing: ``nf4`` or ``int8``."""
PARTS, MAGNITUDE = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}, "lora_magnitude_vector"
"""PEFT's names of a layer's adapter, by those of our parameters."""
_WRAPPER = "base_model.model."  # what PEFT puts before the names of the base
_CONVERTING = (
    "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), ADAPTER)"
    ".save_pretrained(NEW_FOLDER) of peft"
)

_OFF: tuple[Any, ...] = (None, False, "", [], {})
"""The values under which a key that is not known counts as switched off."""
_HONOURED = {
    "alpha_pattern", "base_model_name_or_path", "exclude_modules", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "peft_type", "r", "rank_pattern",
    "revision", "target_modules", "use_dora", "use_rslora",
}  # fmt: skip
_METADATA = {
    # PEFT sets fan_in_fan_out itself, by the kind of each layer.
    "auto_mapping", "fan_in_fan_out", "inference_mode", "megatron_core", "peft_version",
    "runtime_config", "task_type",
}  # fmt: skip
_STARTS = {
    # Settings of the first weights, which have no effect unless init_lora_weights requests them.
    "corda_config", "eva_config", "loftq_config", "lora_ga_config", "qalora_group_size",
}  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # The saved weights replace the first ones. Others than these change the base as well.
    "init_lora_weights": (True, False, "eva", "gaussian", "mica", "orthogonal"),
}
"""Values under which a key changes nothing, beside those of `_OFF`."""

# A pattern is a regular expression of a stranger; within these bounds none takes long.
_MAX_REPEATS, _MAX_PATTERN = 2, 500
_REPEAT = re.compile(r"(?<!\\)[*+{]")
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+{]")


class Base(NamedTuple):
    """The base that an adapter was trained on: a path or hub name, and its revision there."""

    path: str
    revision: str | None

    def absolute(self) -> "Base":
        """The same base, found from any folder."""
        path = Path(self.path).expanduser()
        return Base(str(path.resolve()), None) if path.exists() else self


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of ``adapter_config.json`` that determine what is computed.

    Args:
        file: File of the config, for messages.
        base: Base that the adapter was trained on.
        options: Kind of the adapters, with the rank and alpha that patterns do not change.
        ranks: Ranks by pattern of layer names.
        alphas: Alphas by pattern of layer names.
        target_modules: Ends of the names of adapted layers, or a pattern of whole names.
        exclude_modules: Names as ``target_modules``, of layers that are left out.
        layers_to_transform: Numbers of the blocks that are adapted; None for all.
        layers_pattern: Names of the lists of blocks that these numbers count in.
    """

    file: Path
    base: Base
    options: AdapterOptions
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    target_modules: str | tuple[str, ...] | None
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]

    def options_of(self, layer: str) -> AdapterOptions:
        """The options of one layer's adapter.

        Source: peft 0.21, ``get_pattern_key`` of utils/other.py.
        """
        rank = _by_pattern(self.ranks, layer, self.options.rank)
        alpha = _by_pattern(self.alphas, layer, self.options.alpha)
        return replace(self.options, rank=rank, alpha=alpha)

    def adapts(self, layer: str) -> bool:
        """Whether PEFT would put an adapter on a layer of that name.

        Source: peft 0.21, ``check_target_module_exists`` of tuners/tuners_utils.py.
        """
        if _matches(self.exclude_modules, layer):
            return False
        if self.target_modules in (None, "all-linear"):
            return True
        assert self.target_modules is not None
        if not _matches(self.target_modules, layer):
            return False
        by_name = isinstance(self.target_modules, tuple) and layer not in self.target_modules
        if not by_name or self.layers_to_transform is None:
            return True
        if not self.layers_pattern:
            found = re.match(r".*?\.[^.]*\.(?P<number>\d+)\.", layer)
        else:
            each = (
                re.match(rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\.", layer)
                for pattern in self.layers_pattern
            )
            found = next((match for match in each if match), None)
        return found is not None and int(found["number"]) in self.layers_to_transform


class StoredAdapter(NamedTuple):
    """An adapter as its folder has it: of each layer ``lora_A``, ``lora_B`` and, with DoRA, m."""

    config: AdapterConfig
    layers: dict[str, dict[str, Tensor]]


def holds_adapter(place: Path) -> bool:
    """Whether a folder or checkpoint is an adapter."""
    is_checkpoint = place.suffix == CHECKPOINT and place.is_file()
    return (place / ADAPTER_CONFIG).is_file() or (is_checkpoint and holds_adapters(place))


def read_adapter_config(place: Path) -> AdapterConfig:
    """Reads the config of an adapter; a relative path of its base may start at its folder.

    Args:
        place: Folder or checkpoint of the adapter.

    Raises:
        ValueError: It names no base, is not of a LoRA, or requests what is not supported here;
            the message names file, key and value.
    """
    if place.is_file():
        file, folder, config = place, place.parent, read_adapter_checkpoint(place).config
    else:
        file, folder = place / ADAPTER_CONFIG, place
        config = read_json(file)
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"{file}: peft_type {shortened(kind)} is not LORA")
    for key, value in config.items():
        if key not in _HONOURED | _METADATA | _STARTS and not _is_neutral(key, value):
            hint = "; merge_and_unload of peft makes one model of it and its base"
            raise ValueError(f"{file}: {key} {shortened(value)} is not supported{hint}")
    values = _Values(file, config)
    name = values.get("base_model_name_or_path", str, "")
    if not name:
        raise ValueError(f"{file} has no base_model_name_or_path")
    path, revision = Path(name).expanduser(), values.get("revision", str, None)
    there = next((place for place in (folder / path, path) if place.exists()), None)
    base = Base(name, revision) if there is None else Base(str(there), None)
    try:
        options = AdapterOptions(
            values.get("r", int, 8),
            float(values.get("lora_alpha", (int, float), 8)),
            float(values.get("lora_dropout", (int, float), 0.0)),
            values.get("use_rslora", bool, False),
            values.get("use_dora", bool, False),
        )
    except ValueError as error:
        raise error if str(file) in str(error) else ValueError(f"{file}: {error}") from None
    return AdapterConfig(
        file=file,
        base=base,
        options=options,
        ranks=values.by_pattern("rank_pattern", int),
        alphas={
            pattern: float(alpha)
            for pattern, alpha in values.by_pattern("alpha_pattern", (int, float)).items()
        },
        target_modules=values.names("target_modules") or None,
        exclude_modules=values.names("exclude_modules"),
        layers_to_transform=values.numbers("layers_to_transform"),
        layers_pattern=values.patterns("layers_pattern"),
    )


def trained_quantization(place: Path) -> str | None:
    """How the base was quantized when an adapter of ours was saved; None if not recorded.

    Args:
        place: Folder or checkpoint of the adapter.

    Raises:
        FileNotFoundError: The adapter has no weights.
        ValueError: They are damaged.
    """
    if place.is_file():
        return read_adapter_checkpoint(place).base_quantize
    return stored_metadata(weights_file(place)).get(BASE_QUANTIZE)


def adapter_digest(place: Path) -> str:
    """The digest of an adapter's weights; of a checkpoint that of the file.

    Args:
        place: Folder or checkpoint of the adapter.

    Raises:
        FileNotFoundError: It has none.
    """
    return files_sha256((weights_file(place.expanduser()),))


def read_adapter(place: Path) -> StoredAdapter:
    """Reads an adapter, without a network.

    Args:
        place: Folder or checkpoint of the adapter.

    Raises:
        FileNotFoundError: The folder has no config or no weights.
        ValueError: The adapter is not one of linear layers, or needs a feature that is not
            supported here.
    """
    if place.is_file():
        state = read_adapter_checkpoint(place).state
    else:
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (place / name).is_file():
                raise FileNotFoundError(f"adapter {place} has no {name}")
        state = {}
    config, file = read_adapter_config(place), weights_file(place)
    check_weights(config, file, _shapes_of(place))
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in (state or load_file(file)).items():
        name, part = _layer_and_part(key)
        layers.setdefault(name, {})[part] = tensor
    return StoredAdapter(config, layers)


def check_weights(config: AdapterConfig, file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises unless the weights of an adapter are those that its config describes.

    Args:
        config: Config of the adapter.
        file: File of the weights, for messages.
        shapes: Sizes by stored name.

    Raises:
        ValueError: A weight is missing, unknown, of another rank, or not of an adapter.
    """
    wanted = {*PARTS, MAGNITUDE} if config.options.dora else {*PARTS}
    by = "its config" if file == config.file else config.file.name
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        name, part = _layer_and_part(key)
        if part.startswith("lora_embedding_"):
            raise ValueError(f"{file}: the embedding {name} is adapted, which is not supported")
        if not part.startswith("lora_"):
            raise ValueError(
                f"{file} holds {key.removeprefix(_WRAPPER)} whole, as where an embedding or head is"
                " adapted or trained, or the vocabulary resized, which is not supported"
            )
        layers.setdefault(name, {})[part] = shape
    if not layers:
        raise ValueError(f"{file} is empty")
    for name, parts in layers.items():
        if odd := sorted(wanted ^ parts.keys()):
            place = "has no" if odd[0] in wanted else "has an unknown"
            raise ValueError(f"{file} {place} {odd[0]} of layer {name}")
        for part, size in parts.items():
            if len(size) != (1 if part == MAGNITUDE else 2):
                raise ValueError(f"{file}: {part} of layer {name} has {len(size)} axes")
        if not config.adapts(name):
            raise ValueError(f"{file} adapts {name}, which {by} leaves out")
        rank = config.options_of(name).rank
        for stored in (parts["lora_A"][0], parts["lora_B"][-1]):
            if stored != rank:
                raise ValueError(
                    f"{file}: the adapter of {name} is of rank {stored}, by {by} of rank {rank}"
                )


def check_adapter(place: Path, network: PreTrainedModel) -> None:
    """Raises unless each part of an adapter fits a linear layer of the network.

    Args:
        place: Folder or checkpoint of the adapter; only the sizes of its weights are read.
        network: Unquantized network; the meta device will do.

    Raises:
        FileNotFoundError: The adapter has no weights.
        ValueError: A layer is missing or its sizes are others, or the adapter needs a feature that
            is not supported here.
    """
    file, shapes = weights_file(place), _shapes_of(place)
    for name in dict.fromkeys(_layer_and_part(key)[0] for key in shapes if ".lora_" in key):
        check_place(name, network, file)
    check_weights(read_adapter_config(place), file, shapes)
    for key, shape in shapes.items():
        name, part = _layer_and_part(key)
        in_features, out_features = features_of(network.get_submodule(name))
        if part == "lora_A":
            _check_size(file, name, "in", shape[1], in_features)
        else:
            _check_size(file, name, "out", shape[0], out_features)


def check_place(name: str, network: PreTrainedModel, file: Path) -> None:
    """Raises unless a network has a layer that can be adapted under that name.

    Raises:
        ValueError: It has none, or it is the embedding or the head.
    """
    try:
        layer = network.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{file}: the base has no layer {name}") from None
    for kind, end in (
        ("embedding", network.get_input_embeddings()),
        ("head", network.get_output_embeddings()),
    ):
        if layer is end:
            raise ValueError(f"{file}: the {kind} {name} is adapted, which is not supported")
    try:
        features_of(layer)
    except ValueError as error:
        raise ValueError(f"{file}: {name}: {error}") from None


def adapter_config(
    layers: Collection[str],
    options: Mapping[str, AdapterOptions],
    base: Base,
    target_modules: Sequence[str],
    *,
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """The contents of ``adapter_config.json``.

    Args:
        layers: Names of the adapted layers.
        options: Options of each of these adapters, which differ in rank and alpha at most.
        base: Base, for whoever loads the adapter.
        target_modules: Names of the layers, as PEFT matches them.
        fan_in_fan_out: Whether the base has layers of transformers' `Conv1D`.
    """
    usual = Counter(options[name] for name in layers).most_common(1)[0][0]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.path,
        "revision": base.revision,
        "inference_mode": True,
        "r": usual.rank,
        "lora_alpha": _alpha(usual),
        "lora_dropout": usual.dropout,
        "use_rslora": usual.rslora,
        "use_dora": usual.dora,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": list(target_modules),
    }
    ranks = {name: options[name].rank for name in layers if options[name].rank != usual.rank}
    alphas = {
        name: _alpha(options[name]) for name in layers if _alpha(options[name]) != _alpha(usual)
    }
    config |= {"rank_pattern": ranks} if ranks else {}
    config |= {"alpha_pattern": alphas} if alphas else {}
    return config


def write_adapter(
    folder: Path,
    layers: Mapping[str, Mapping[str, Tensor]],
    config: Mapping[str, Any],
    base_quantize: str | None,
) -> None:
    """Writes an adapter's folder; each file aside and then renamed.

    Args:
        folder: Folder, which is made where it is missing.
        layers: Tensors of each layer's adapter by the names of our parameters, on the CPU.
        config: Contents of `adapter_config`.
        base_quantize: ``nf4`` or ``int8``, where the base was quantized.
    """
    metadata = {"format": "pt"} | ({BASE_QUANTIZE: base_quantize} if base_quantize else {})
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / ADAPTER_WEIGHTS) as aside:
        save_file(peft_state(layers), aside, metadata)
    write_json(folder / ADAPTER_CONFIG, dict(config), indent=2)


def peft_state(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weights of adapters under PEFT's names, from those by layer and our parameters."""
    return {
        f"{_WRAPPER}{name}.{PARTS.get(part, part)}": tensor.contiguous()
        for name, parts in layers.items()
        for part, tensor in parts.items()
    }


@dataclass(frozen=True)
class _Values:
    """The values of a config, each checked for its type."""

    file: Path
    config: Mapping[str, Any]

    def get(self, key: str, kind: Any, default: Any) -> Any:
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.wrong(key)
        if isinstance(value, float) and not math.isfinite(value):
            raise self.wrong(key)
        return value

    def is_number(self, value: Any, kind: Any) -> bool:
        return isinstance(value, kind) and not isinstance(value, bool)

    def wrong(self, key: str) -> ValueError:
        return ValueError(f"{self.file}: {key} {shortened(self.config[key])} is not supported")

    def names(self, key: str) -> str | tuple[str, ...]:
        value = self.get(key, (str, list), ())
        if isinstance(value, str):
            self.check_pattern(key, value)
            # Patterns as long as Unsloth's are not tried: the weights alone determine the adapted
            # layers.
            return value if _is_quick(value) else ()
        if not all(isinstance(name, str) for name in value):
            raise self.wrong(key)
        return tuple(value)

    def patterns(self, key: str) -> tuple[str, ...]:
        value = self.names(key)
        found = (value,) if isinstance(value, str) else value
        for pattern in found:
            self.check_pattern(key, pattern, quick=True)
        return tuple(pattern for pattern in found if pattern)

    def numbers(self, key: str) -> tuple[int, ...] | None:
        value = self.get(key, (int, list), [])
        found = value if isinstance(value, list) else [value]
        if not all(self.is_number(number, int) for number in found):
            raise self.wrong(key)
        return tuple(found) or None

    def by_pattern(self, key: str, kind: Any) -> dict[str, Any]:
        found = self.get(key, dict, {})
        for pattern, value in found.items():
            self.check_pattern(key, pattern, quick=True)
            if not self.is_number(value, kind) or not 0 < value < math.inf:
                raise ValueError(f"{self.file}: {key} {pattern!r}: {shortened(value)} is not > 0")
        return dict(found)

    def check_pattern(self, key: str, pattern: str, quick: bool = False) -> None:
        if quick and not _is_quick(pattern):
            raise ValueError(
                f"{self.file}: {key}: the pattern {shortened(pattern)} could take too long"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{self.file}: {key}: {shortened(pattern)} is not a pattern ({error})"
            ) from None


def _is_neutral(key: str, value: Any) -> bool:
    if key in _NEUTRAL:
        return value is None or any(value is x or value == x for x in _NEUTRAL[key])
    return any(value is off or (type(value) is type(off) and value == off) for off in _OFF)


def _is_quick(pattern: str) -> bool:
    is_short = len(pattern) <= _MAX_PATTERN and len(_REPEAT.findall(pattern)) <= _MAX_REPEATS
    return is_short and not _REPEATED_GROUP.search(pattern)


def _by_pattern(values: Mapping[str, Any], layer: str, usual: Any) -> Any:
    for pattern, value in values.items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return usual


def _matches(names: str | tuple[str, ...], layer: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, layer) is not None
    return any(layer == name or layer.endswith(f".{name}") for name in names)


def _alpha(options: AdapterOptions) -> float:
    return options.scale * (options.rank**0.5 if options.rslora else options.rank)


def _layer_and_part(key: str) -> tuple[str, str]:
    """Layer and part of a stored name; of a weight that is not an adapter's its last part."""
    name, _, part = key.removeprefix(_WRAPPER).removesuffix(".weight").rpartition(".")
    return name, part


def weights_file(place: Path) -> Path:
    """The file of an adapter's weights.

    Args:
        place: Folder or checkpoint of the adapter.

    Raises:
        FileNotFoundError: There is none.
        ValueError: There is one that only unpickling could read.
    """
    if place.is_file():
        return place
    file = place / ADAPTER_WEIGHTS
    if not file.is_file():
        refuse_pickled(sorted(place.glob("adapter_model.*")), _CONVERTING)
        raise FileNotFoundError(f"{place} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}")
    return file


def _shapes_of(place: Path) -> dict[str, tuple[int, ...]]:
    """The sizes of an adapter's weights by stored name."""
    if not place.is_file():
        return stored_shapes(weights_file(place))
    state = read_adapter_checkpoint(place).state
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _check_size(file: Path, layer: str, side: str, adapted: int, there: int) -> None:
    if adapted != there:
        raise ValueError(
            f"{file}: {layer} has {there} {side}_features in the base, the adapter's has {adapted}"
        )
