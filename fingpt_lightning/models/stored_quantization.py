"""Quantised layers as bitsandbytes writes them into safetensors: found, read and written."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.models.quantization import bare_layer, is_linear, quantized_layer

_MARKS = {"nf4": ".weight.quant_state.bitsandbytes__nf4", "int8": ".SCB"}
"""What the name of a tensor ends with that only a layer of this method has."""


class QuantizedLayers(NamedTuple):
    """Where the quantised layers of a folder are.

    Args:
        method: ``nf4`` or ``int8``.
        places: Layer to {part of it, such as ``weight.absmax``: the file that holds it}.
    """

    method: str
    places: Mapping[str, Mapping[str, Path]]

    def holds(self, stored: str) -> bool:
        """Whether a stored tensor belongs to one of the layers."""
        parts = stored.split(".")
        return any(".".join(parts[:end]) in self.places for end in range(1, len(parts)))


def find_quantized_layers(
    described: Mapping[str, Any], files: Mapping[str, Path], where: Path
) -> QuantizedLayers | None:
    """What is quantised in a folder; None where nothing is.

    Args:
        described: ``quantization_config`` of the folder's config.
        files: The file of each stored tensor.
        where: The config, for messages.

    Raises:
        ValueError: The weights are stored in a way that is not read here.
    """
    if not (kind := described.get("quant_method")):
        return None
    is_nf4 = described.get("load_in_4bit") and described.get("bnb_4bit_quant_type") == "nf4"
    is_int8 = described.get("load_in_8bit")
    if kind != "bitsandbytes" or not (is_nf4 or is_int8):
        raise ValueError(
            f"{where}: weights stored as {kind} are not read, but for NF4 and int8 of"
            " bitsandbytes; give the unquantised folder, which quantize then makes small"
        )
    method = "nf4" if is_nf4 else "int8"
    mark = _MARKS[method]
    layers = [name.removesuffix(mark) for name in files if name.endswith(mark)]
    places = {
        layer: {
            name.removeprefix(f"{layer}."): file
            for name, file in files.items()
            if name.startswith(f"{layer}.")
        }
        for layer in layers
    }
    if not places:
        raise ValueError(f"{where} says {method}, and no layer is stored as such")
    return QuantizedLayers(method, places)


@torch.no_grad()
def place_quantized_layers(
    network: PreTrainedModel, layers: QuantizedLayers, dtype: torch.dtype, device: torch.device
) -> None:
    """Puts stored layers into a network of `lay_out`; ``down`` and ``up`` become a pair.

    Args:
        network: On the meta device.
        layers: Of `find_quantized_layers`.
        dtype: Of the products.
        device: Where the layers go.

    Raises:
        ValueError: The network has no such layer, or one of other sizes.
    """
    pairs: dict[str, dict[str, nn.Module]] = {}
    for name, places in layers.places.items():
        parts = dict(_read(name, places))
        layer = _stored_layer(parts, layers.method, dtype, device)
        parent, _, end = name.rpartition(".")
        if end in ("down", "up"):
            pairs.setdefault(parent, {})[end] = layer
        else:
            _replace(network, name, layer, (layer.in_features, layer.out_features))
    for name, pair in pairs.items():
        if missing := {"down", "up"} - pair.keys():
            raise ValueError(f"layer {name} has no {missing.pop()}")
        down, up = pair["down"], pair["up"]
        made = nn.Sequential()
        made.add_module("down", down)
        made.add_module("up", up)
        sizes = (int(down.in_features), int(up.out_features))  # type: ignore[arg-type]
        _replace(network, name, made, sizes)


def quantize_layers(network: PreTrainedModel, method: str) -> None:
    """Quantises the linear layers of the blocks, in place, one after the other.

    Args:
        network: Unquantised, on the CPU.
        method: ``nf4`` or ``int8``.
    """
    for name, layer in list(network.named_modules()):
        if is_linear(layer) and name != "lm_head":
            network.set_submodule(name, quantized_layer(layer, method, torch.device("cpu")))


def quantization_config(method: str, dtype: torch.dtype) -> dict[str, Any]:
    """The entry of ``config.json`` by which transformers and `load_model` know the folder.

    Args:
        method: ``nf4`` or ``int8``.
        dtype: Of the products.
    """
    from transformers import BitsAndBytesConfig

    if method == "nf4":
        made = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        made = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    return dict(made.to_dict())


def _read(layer: str, places: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    for part, file in places.items():
        with safe_open(file, "pt") as opened:
            yield part, opened.get_tensor(f"{layer}.{part}")


def _stored_layer(
    parts: dict[str, Tensor], method: str, dtype: torch.dtype, device: torch.device
) -> Any:
    import bitsandbytes  # takes a second

    bnb: Any = bitsandbytes.nn
    weight, bias = parts.pop("weight"), parts.pop("bias", None)
    if method == "nf4":
        stats = {name.removeprefix("weight."): tensor for name, tensor in parts.items()}
        made = bnb.Params4bit.from_prequantized(weight, stats, device=device)
        made.quant_state.dtype = dtype
        out_features, in_features = made.quant_state.shape
    else:
        out_features, in_features = weight.shape
        codes = weight.to(device)
        made = bnb.Int8Params(codes, requires_grad=False, CB=codes, SCB=parts["SCB"].to(device))
    layer: Any = bare_layer(in_features, out_features, bias is not None, method, dtype)
    layer.weight = made
    if method == "nf4":
        made.module, layer.quant_state = layer, made.quant_state
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(device, dtype))
    return layer


def _replace(network: PreTrainedModel, name: str, layer: nn.Module, sizes: tuple[int, int]) -> None:
    try:
        there = network.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the network has no layer {name}") from None
    if not is_linear(there):
        raise ValueError(f"{name} is no linear layer in the network")
    wanted = _features(there)
    if sizes != wanted:
        raise ValueError("{} is {} x {}, the config asks for {} x {}".format(name, *sizes, *wanted))
    network.set_submodule(name, layer)


def _features(layer: Any) -> tuple[int, int]:
    if isinstance(layer, Conv1D):
        return int(layer.nx), int(layer.nf)
    assert isinstance(layer, nn.Linear | LowRankLinear)
    return layer.in_features, layer.out_features
