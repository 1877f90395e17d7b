"""Adapters on a network's linear layers: put on, switched off, merged, saved and loaded.

Folders are PEFT's: adapters written here load there, and adapters that PEFT writes load here.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.low_rank.adapters import AdaptedLinear, AdapterOptions, SharedDown
from fingpt_lightning.models.families import family_of
from fingpt_lightning.models.finite import check_finite
from fingpt_lightning.models.formats.peft_adapter import (
    MAGNITUDE,
    PARTS,
    Base,
    adapter_config,
    check_adapter,
    read_adapter,
    weights_file,
    write_adapter,
)
from fingpt_lightning.models.layout import features_of
from fingpt_lightning.models.quantization.frozen_matrix import Int8Linear, quantization_of
from fingpt_lightning.models.quantization.layers import is_linear, is_quantized_low_rank
from fingpt_lightning.models.quantization.rounding import NF4Matrix, nf4_values

ALL_LINEAR = "all-linear"


def linear_names(network: PreTrainedModel) -> list[str]:
    """The adaptable or adapted layers: all linear ones but the head, low-rank layers included."""
    names: list[str] = []
    family, embedding = family_of(network), network.get_input_embeddings()
    in_embedding = set(embedding.modules())  # a quantized table is a linear layer
    for name, module in network.named_modules():
        is_inside = bool(names) and name.startswith(f"{names[-1]}.")
        if family.is_head(name) or is_inside or module in in_embedding:
            continue
        if is_linear(module) or is_quantized_low_rank(module) or isinstance(module, AdaptedLinear):
            names.append(name)
    return names


def adapt(
    network: PreTrainedModel,
    options: AdapterOptions | Mapping[str, AdapterOptions],
    target_modules: str | Sequence[str] = ALL_LINEAR,
    seed: int | None = None,
) -> list[str]:
    """Freezes a network and puts an adapter beside each layer that is named.

    Args:
        network: Network, changed in place; its layers may be quantized.
        options: Options of all adapters, or of each by the full name of its layer.
        target_modules: ``all-linear``, or names such as ``q_proj`` or ends of full names.
        seed: Seed of the adapters' first weights, which depend on it and the layer's name alone;
            None draws from the global generator.

    Returns:
        The full names of the adapted layers.

    Raises:
        ValueError: A name matches no linear layer; the message lists those there are. Or the
            network has adapters already.
    """
    if adapted_layers(network):
        raise ValueError("the network has adapters already; merge them or load it anew")
    names = matching_names(linear_names(network), target_modules)
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        for name in names:
            if seed is not None:
                digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                torch.manual_seed(int.from_bytes(digest[:7], "big"))
            own = options if isinstance(options, AdapterOptions) else options[name]
            network.set_submodule(name, _adapted(network.get_submodule(name), own))
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


def remove_adapters(network: PreTrainedModel) -> None:
    """Puts each adapted layer's base back in its place."""
    for name, layer in adapted_layers(network).items():
        network.set_submodule(name, layer.base_layer)


def dense_weight(layer: nn.Module) -> Tensor:
    """What a linear layer multiplies with, ``out_features x in_features``, dequantized.

    Raises:
        ValueError: It is not a linear layer, or a low-rank layer with an activation between its
            factors.
    """
    match layer:
        case nn.Sequential():
            # Exact for factors in float32: DoRA's lengths are of it, in a network in float64 too.
            return dense_weight(layer[1]).double() @ dense_weight(layer[0]).double()
        case LowRankLinear():
            return layer.product()
        case Conv1D():
            return layer.weight.detach().T
        case nn.Linear():
            return _dequantized(layer).detach()
    raise ValueError(f"{type(layer).__name__} is not a linear layer")


def base_quantization(network: nn.Module) -> str | None:
    """The method by which the layers under adapters are quantized; None where they are not."""
    found = (quantization_of(layer) for layer in adapted_layers(network).values())
    return next((method for method in found if method is not None), None)


def adapter_state(network: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The adapters' weights by layer and part, on the CPU."""
    return {
        name: {part: tensor.detach().cpu() for part, tensor in _parts(layer).items()}
        for name, layer in adapted_layers(network).items()
    }


class WholeAdapters(NamedTuple):
    """The adapters of a network of which this process may hold a part.

    ``options`` are those of each adapted layer by its name, ``state`` their weights by our names;
    ``linear`` names the layers that have an adapter or could; ``base_quantize`` is the method by
    which these are quantized.
    """

    options: Mapping[str, AdapterOptions]
    state: Mapping[str, Tensor]
    linear: Sequence[str]
    base_quantize: str | None

    def by_layer(self) -> dict[str, dict[str, Tensor]]:
        """The weights by layer and part."""
        layers: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.state.items():
            layer, _, part = name.rpartition(".")
            layers.setdefault(layer, {})[part] = tensor
        return layers


def own_adapters(network: PreTrainedModel) -> WholeAdapters:
    """The adapters of a network that this process holds whole."""
    return WholeAdapters(
        {name: layer.options for name, layer in adapted_layers(network).items()},
        {
            f"{name}.{part}": tensor
            for name, parts in adapter_state(network).items()
            for part, tensor in parts.items()
        },
        linear_names(network),
        base_quantization(network),
    )


def save_adapter(
    network: PreTrainedModel,
    folder: Path,
    base: str,
    revision: str | None = None,
    whole: WholeAdapters | None = None,
    *,
    trained_on: str | None = None,
) -> None:
    """Writes a network's adapters as a PEFT folder; each file aside and then renamed.

    Args:
        network: Network with adapters.
        folder: Folder, which is made where it is missing.
        base: Path or hub name of the base, for whoever loads the folder.
        revision: Revision of a hub name.
        whole: Adapters of the whole network, where ``network`` is a part of it.
        trained_on: Quantization of the base that the adapters were trained on, where that is known;
            None takes that of the network.
    """
    whole = whole or own_adapters(network)
    write_adapter(
        folder,
        whole.by_layer(),
        described_adapters(network, whole, Base(base, revision)),
        trained_on or whole.base_quantize,
    )


def described_adapters(
    network: PreTrainedModel, whole: WholeAdapters, base: Base
) -> dict[str, Any]:
    """The contents of ``adapter_config.json`` for a network's adapters.

    Args:
        network: Network with adapters, or a part of it.
        whole: Adapters of the whole network.
        base: Base, for whoever loads the adapter.
    """
    layers, there = whole.by_layer(), list(whole.linear)
    return adapter_config(
        layers,
        whole.options,
        base,
        _shortest_names([name for name in there if name in layers], there),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in network.modules()),
    )


def load_adapter(
    place: Path, network: PreTrainedModel, elsewhere: Collection[str] = ()
) -> list[str]:
    """Puts a saved adapter on its base.

    Args:
        place: Folder in PEFT's format, written here or by PEFT, or a checkpoint of adapters.
        network: Base, quantized or not.
        elsewhere: Parameters of the base that other processes hold; the adapters of their layers
            are left out.

    Returns:
        The full names of the adapted layers.

    Raises:
        FileNotFoundError: The adapter has no weights.
        ValueError: It does not fit the network, or needs a feature that is not supported here.
    """
    has_quantised_factors = any(isinstance(part, nn.Sequential) for part in network.modules())
    if not (has_quantised_factors or elsewhere):
        check_adapter(place, network)
    config, stored = read_adapter(place)
    layers = {
        name: parts
        for name, parts in stored.items()
        if not any(other.startswith(f"{name}.") for other in elsewhere)
    }
    names = adapt(network, {name: config.options_of(name) for name in layers}, list(layers))
    fill_adapters(network, layers, str(weights_file(place)))
    return names


@torch.no_grad()
def fill_adapters(
    network: nn.Module, state: Mapping[str, Mapping[str, Tensor]], source: str
) -> None:
    """Copies weights into a network's adapters.

    Args:
        network: Network with adapters.
        state: Weights of all adapters and nothing else, by layer and part.
        source: Origin of the weights, for messages.

    Raises:
        ValueError: A weight is missing, left over, of another size, or not stored as
            floating-point numbers.
        FloatingPointError: A weight is NaN or infinite.
    """
    wanted = {
        f"{name}.{part}": tensor
        for name, layer in adapted_layers(network).items()
        for part, tensor in _parts(layer).items()
    }
    found = {f"{name}.{part}": t for name, parts in state.items() for part, t in parts.items()}
    if odd := sorted(wanted.keys() ^ found.keys()):
        place = "has no" if odd[0] in wanted else "has, and the network has not,"
        raise ValueError(f"{source} {place} {odd[0]}")
    for key, tensor in wanted.items():
        if tensor.shape != found[key].shape:
            sizes = (" x ".join(map(str, t.shape)) for t in (found[key], tensor))
            raise ValueError("{}: {} is {}, the network's {}".format(source, key, *sizes))
        try:
            check_finite(key, found[key])
        except (ValueError, FloatingPointError) as error:
            raise type(error)(f"{source}: {error}") from None
        tensor.copy_(found[key])


def ends_features(layer: nn.Module) -> tuple[int, int]:
    """In and out features of a linear layer, also of a quantized low-rank layer."""
    ends = (layer[0], layer[-1]) if isinstance(layer, nn.Sequential) else (layer, layer)
    return features_of(ends[0])[0], features_of(ends[1])[1]


def _adapted(layer: nn.Module, options: AdapterOptions) -> AdaptedLinear:
    in_features, out_features = ends_features(layer)
    weight = next(layer.parameters())
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    adapted = AdaptedLinear(layer, in_features, out_features, options, dtype, weight.device)
    if options.dora:
        adapted.start_dora(dense_weight(layer))
    return adapted.train(layer.training)


def _share_inputs(network: PreTrainedModel, names: Sequence[str]) -> None:
    family, adapted = family_of(network), set(names)
    blocks = network.get_submodule(family.blocks)
    for block, _ in blocks.named_children():
        for group in family.shared_inputs:
            full = [family.layer_name(int(block), layer) for layer in group]
            found = [network.get_submodule(name) for name in full if name in adapted]
            if len(found) > 1:
                SharedDown([layer for layer in found if isinstance(layer, AdaptedLinear)])


def matching_names(there: Sequence[str], targets: str | Sequence[str]) -> list[str]:
    """The names among some layers that ``target_modules`` means.

    Raises:
        ValueError: A name matches none of them.
    """
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
    parts: dict[str, Tensor] = {own: getattr(layer, own) for own in PARTS}
    if layer.lora_magnitude_vector is not None:
        parts[MAGNITUDE] = layer.lora_magnitude_vector
    return parts


def _dequantized(layer: Any) -> Tensor:
    weight = layer.weight
    dense: Tensor
    if (state := getattr(weight, "quant_state", None)) is not None:
        dense = nf4_values(NF4Matrix(weight.data, state), state.dtype)
    elif isinstance(layer, Int8Linear):
        dense = layer.values(torch.float32)
    elif weight.dtype == torch.int8:
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        dense = int8_vectorwise_dequant(weight.data, scales)
    else:
        dense = layer.weight
    return dense
