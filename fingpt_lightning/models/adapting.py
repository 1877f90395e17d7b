"""Adapters on a network's linear layers: put on, switched off, merged, saved and loaded.

Folders are PEFT's: what is written here loads there, and what PEFT writes loads here.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.low_rank.adapters import AdaptedLinear, AdapterOptions, SharedDown
from fingpt_lightning.models.adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_base,
    check_adapter,
)
from fingpt_lightning.models.layout import features_of
from fingpt_lightning.models.quantization import is_linear
from fingpt_lightning.models.weights import read_json

ALL_LINEAR = "all-linear"
_WRAPPER = "base_model.model."  # what PEFT puts before the names of the base
_PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
_MAGNITUDE = "lora_magnitude_vector"
# Layers of one parent that read the same tensor.
_SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
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


def linear_names(network: PreTrainedModel) -> list[str]:
    """The layers that can be adapted or are: all linear ones but the head; a pair is one."""
    names: list[str] = []
    for name, module in network.named_modules():
        is_inside = bool(names) and name.startswith(f"{names[-1]}.")
        if name.split(".")[0] == "lm_head" or is_inside:
            continue
        if is_linear(module) or _is_pair(module) or isinstance(module, AdaptedLinear):
            names.append(name)
    return names


def adapt(
    network: PreTrainedModel,
    options: AdapterOptions,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    seed: int | None = None,
) -> list[str]:
    """Freezes a network and puts an adapter beside each layer that is named.

    Args:
        network: Changed in place; its layers may be quantised.
        options: Of all adapters.
        target_modules: ``all-linear``, or names such as ``q_proj`` or ends of full names.
        seed: Of the adapters' first weights; None draws from the global generator.

    Returns:
        The full names of the adapted layers.

    Raises:
        ValueError: A name matches no linear layer; the message lists those there are. Or the
            network has adapters already.
    """
    if adapted_layers(network):
        raise ValueError("the network has adapters already; merge them or load it anew")
    names = _matching(linear_names(network), target_modules)
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        for name in names:
            network.set_submodule(name, _adapted(network.get_submodule(name), options))
    _share_inputs(network, names)
    return names


def adapted_layers(network: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers by name."""
    return {n: part for n, part in network.named_modules() if isinstance(part, AdaptedLinear)}


@contextmanager
def without_adapters(network: nn.Module) -> Iterator[None]:
    """Within it the network computes as its base does."""
    layers = adapted_layers(network).values()
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def merge_adapters(network: PreTrainedModel) -> None:
    """Replaces each adapted layer by the one dense layer that does the same, in its dtype."""
    dtype = network.dtype
    for name, layer in adapted_layers(network).items():
        weight, bias = layer.merged_weight(dense_weight(layer.base_layer)).to(dtype), layer.bias
        merged: nn.Module
        with torch.device("meta"):
            if isinstance(layer.base_layer, Conv1D):  # as its family's classes expect it
                merged, weight = (
                    Conv1D(layer.out_features, layer.in_features),
                    weight.T.contiguous(),
                )
            else:
                merged = nn.Linear(layer.in_features, layer.out_features, bias is not None)
        merged.weight = nn.Parameter(weight)
        if bias is not None:
            merged.bias = nn.Parameter(bias.detach().clone())
        network.set_submodule(name, merged)


def dense_weight(layer: nn.Module) -> Tensor:
    """What a linear layer multiplies with, ``out_features x in_features``, dequantised.

    Raises:
        ValueError: It is no linear layer.
    """
    match layer:
        case nn.Sequential():
            return dense_weight(layer[1]) @ dense_weight(layer[0])
        case LowRankLinear():
            return (layer.up @ layer.down).detach()
        case Conv1D():
            return layer.weight.detach().T
        case nn.Linear():
            return _dequantized(layer).detach()
    raise ValueError(f"{type(layer).__name__} is no linear layer")


def adapter_state(network: nn.Module) -> dict[str, Tensor]:
    """The adapters' weights under PEFT's names, on the CPU."""
    state: dict[str, Tensor] = {}
    for name, layer in adapted_layers(network).items():
        for part, tensor in _parts(layer).items():
            state[f"{_WRAPPER}{name}.{part}"] = tensor.detach().cpu().contiguous()
    return state


def save_adapter(
    network: PreTrainedModel, folder: Path, base: str, revision: str | None = None
) -> None:
    """Writes a network's adapters as a PEFT folder; each file aside and then renamed.

    Args:
        network: With adapters.
        folder: Is made where it is missing.
        base: Path or hub name of the base, for whoever loads the folder.
        revision: Of a hub name.
    """
    layers = adapted_layers(network)
    options = next(iter(layers.values())).options
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": options.rank,
        "lora_alpha": options.scale * (options.rank**0.5 if options.rslora else options.rank),
        "lora_dropout": options.dropout,
        "use_rslora": options.rslora,
        "use_dora": options.dora,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(x.base_layer, Conv1D) for x in layers.values()),
        "target_modules": _shortest_names(list(layers), linear_names(network)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{ADAPTER_WEIGHTS}.partial"
    save_file(adapter_state(network), aside, {"format": "pt"})
    aside.replace(folder / ADAPTER_WEIGHTS)
    aside = folder / f"{ADAPTER_CONFIG}.partial"
    aside.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    aside.replace(folder / ADAPTER_CONFIG)


def load_adapter(folder: Path, network: PreTrainedModel) -> list[str]:
    """Puts a saved adapter on its base.

    Args:
        folder: In PEFT's format, written here or by PEFT.
        network: The base, quantised or not.

    Returns:
        The full names of the adapted layers.

    Raises:
        FileNotFoundError: The folder has no weights.
        ValueError: It does not fit the network, or needs what is not supported here.
    """
    adapter_base(folder)
    config = read_json(folder / ADAPTER_CONFIG)
    for key, allowed in _NEUTRAL.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{folder / ADAPTER_CONFIG}: {key} {config[key]!r} is not supported")
    if not any(isinstance(part, nn.Sequential) for part in network.modules()):
        check_adapter(folder, network)
    state = load_file(folder / ADAPTER_WEIGHTS)
    options = AdapterOptions(
        int(config.get("r", 8)),
        float(config.get("lora_alpha", 8)),
        float(config.get("lora_dropout", 0.0)),
        bool(config.get("use_rslora", False)),
        bool(config.get("use_dora", False)),
    )
    suffix = ".lora_A.weight"
    stored = [key.removeprefix(_WRAPPER).removesuffix(suffix) for key in state if suffix in key]
    names = adapt(network, options, stored)
    fill_adapters(network, state, str(folder / ADAPTER_WEIGHTS))
    return names


@torch.no_grad()
def fill_adapters(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copies weights under PEFT's names into a network's adapters.

    Args:
        network: With adapters.
        state: Of all of them and nothing else.
        source: For messages.

    Raises:
        ValueError: A weight is missing, left over, or of another size.
    """
    wanted = {
        f"{_WRAPPER}{name}.{part}": tensor
        for name, layer in adapted_layers(network).items()
        for part, tensor in _parts(layer).items()
    }
    if odd := sorted(wanted.keys() ^ state.keys()):
        place = "has no" if odd[0] in wanted else "has, and the network has not,"
        raise ValueError(f"{source} {place} {odd[0]}")
    for key, tensor in wanted.items():
        if tensor.shape != state[key].shape:
            sizes = (" x ".join(map(str, t.shape)) for t in (state[key], tensor))
            raise ValueError("{}: {} is {}, the network's {}".format(source, key, *sizes))
        tensor.copy_(state[key])


def _adapted(layer: nn.Module, options: AdapterOptions) -> AdaptedLinear:
    ends = (layer[0], layer[-1]) if isinstance(layer, nn.Sequential) else (layer, layer)
    in_features, out_features = features_of(ends[0])[0], features_of(ends[1])[1]
    weight = next(layer.parameters())
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    adapted = AdaptedLinear(layer, in_features, out_features, options, dtype, weight.device)
    if options.dora:
        adapted.start_dora(dense_weight(layer))
    return adapted.train(layer.training)


def _share_inputs(network: nn.Module, names: Sequence[str]) -> None:
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in names):
        for group in _SHARING:
            layers = [f"{parent}.{child}" for child in group if f"{parent}.{child}" in names]
            found = [network.get_submodule(name) for name in layers]
            if len(found) > 1:
                SharedDown([layer for layer in found if isinstance(layer, AdaptedLinear)])


def _matching(there: Sequence[str], targets: str | Sequence[str]) -> list[str]:
    if targets == ALL_LINEAR:
        return list(there)
    wanted = [targets] if isinstance(targets, str) else list(targets)
    matched: dict[str, None] = {}
    for target in wanted:
        found = [name for name in there if name == target or name.endswith(f".{target}")]
        if not found:
            short = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in there))
            raise ValueError(
                f"target_modules {target!r} matches no linear layer; there are {short}, or all of"
                f" them as {ALL_LINEAR}"
            )
        matched |= dict.fromkeys(found)
    return [name for name in there if name in matched]


def _shortest_names(adapted: list[str], there: list[str]) -> list[str]:
    """Last parts of names, where those mean the same layers, else full names."""
    last = sorted({name.rpartition(".")[2] for name in adapted})
    meant = [name for name in there if name.rpartition(".")[2] in last]
    return last if meant == adapted else adapted


def _parts(layer: AdaptedLinear) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {stored: getattr(layer, own) for own, stored in _PARTS.items()}
    if layer.lora_magnitude_vector is not None:
        parts[_MAGNITUDE] = layer.lora_magnitude_vector
    return parts


def _is_pair(module: nn.Module) -> bool:
    """Whether it is what `quantized_layer` makes of a `LowRankLinear`."""
    is_sequence = isinstance(module, nn.Sequential)
    return is_sequence and [name for name, _ in module.named_children()] == ["down", "up"]


def _dequantized(layer: Any) -> Tensor:
    weight = layer.weight
    dense: Tensor
    if (state := getattr(weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        dense = dequantize_4bit(weight.data, state)
    elif weight.dtype == torch.int8:
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        dense = int8_vectorwise_dequant(weight.data, scales)
    else:
        dense = layer.weight
    return dense
    return layer.weight
