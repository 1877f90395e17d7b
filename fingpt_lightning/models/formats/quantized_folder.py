"""Quantized layers as bitsandbytes writes them into safetensors: found, read and written."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.low_rank import LowRankEmbedding, LowRankHead, LowRankLinear
from fingpt_lightning.low_rank.embedding import OwnLowRankHead
from fingpt_lightning.models.families import check_plain_embedding, family_of, head_of
from fingpt_lightning.models.input_moments import InputMoments
from fingpt_lightning.models.low_rank_config import has_own_head_map
from fingpt_lightning.models.quantization.frozen_matrix import FrozenMatrix
from fingpt_lightning.models.quantization.layers import (
    bare_layer,
    is_linear,
    is_quantized_low_rank,
    quantized_layer,
)
from fingpt_lightning.models.quantization.quantized_embedding import (
    QuantizedEmbedding,
    QuantizedHead,
)
from fingpt_lightning.terminal.messages import shortened

_MARKS = {"nf4": ".weight.quant_state.bitsandbytes__nf4", "int8": ".SCB"}
"""What the name of a tensor ends with that only a layer of this method has."""


class QuantizedLayers(NamedTuple):
    """Where the quantized layers of a folder are.

    Args:
        method: ``nf4`` or ``int8``.
        places: Files by layer: {part of it, such as ``weight.absmax``: the file that holds it}.
    """

    method: str
    places: Mapping[str, Mapping[str, Path]]

    def holds(self, stored: str) -> bool:
        """Whether a stored tensor belongs to one of the layers."""
        parts = stored.split(".")
        return any(".".join(parts[:end]) in self.places for end in range(1, len(parts)))

    @property
    def are_low_rank(self) -> bool:
        """Whether there are low-rank layers or a factorized embedding among them."""
        return any(name.endswith(".up") for name in self.places)


def find_quantized_layers(
    described: Mapping[str, Any], files: Mapping[str, Path], where: Path
) -> QuantizedLayers | None:
    """The quantized layers of a folder; None where there are none.

    Args:
        described: ``quantization_config`` of the folder's config.
        files: File of each stored tensor.
        where: File of the config, for messages.

    Raises:
        ValueError: The weights are stored in a way that is not read here.
    """
    if not described:
        return None
    kind = described.get("quant_method") or shortened(dict(described))
    is_nf4 = described.get("load_in_4bit") and described.get("bnb_4bit_quant_type") == "nf4"
    is_int8 = described.get("load_in_8bit")
    if kind != "bitsandbytes" or not (is_nf4 or is_int8):
        raise ValueError(
            f"{where}: weights stored as {kind} are not read, but for NF4 and int8 of"
            " bitsandbytes; give the unquantized folder, which quantize then makes small"
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
    """Puts stored layers into a network of `lay_out`.

    ``down`` and ``up`` become a low-rank layer, ``table`` with or without ``up`` the embedding, and
    the head where the config ties it.

    Args:
        network: Network on the meta device.
        layers: Layers of `find_quantized_layers`.
        dtype: Dtype of the products.
        device: Device of the layers.

    Raises:
        ValueError: The network does not have such a layer, or its sizes differ.
    """
    joined: dict[str, dict[str, nn.Module]] = {}
    for name, places in layers.places.items():
        parts = dict(_read(name, places))
        parent, _, end = name.rpartition(".")
        layer = _stored_layer(parts, layers.method, dtype, device)
        if end in ("down", "up", "table"):
            joined.setdefault(parent, {})[end] = layer
        else:
            _replace(network, name, layer, (layer.in_features, layer.out_features))
    for name, found in joined.items():
        if "table" in found:
            _place_embedding(
                network, name, QuantizedEmbedding(found["table"], found.get("up"), dtype)
            )
            continue
        if missing := {"down", "up"} - found.keys():
            raise ValueError(f"layer {name} has no {missing.pop()}")
        down, up = found["down"], found["up"]
        made = nn.Sequential()
        made.add_module("down", down)
        made.add_module("up", up)
        sizes = (int(down.in_features), int(up.out_features))  # type: ignore[arg-type]
        _replace(network, name, made, sizes)


def _place_embedding(network: PreTrainedModel, name: str, embedding: QuantizedEmbedding) -> None:
    there = network.get_input_embeddings()
    if network.get_submodule(name) is not there or not isinstance(there, nn.Embedding):
        raise ValueError(f"{name} is not the token embedding of the network")
    sizes = (embedding.num_embeddings, embedding.embedding_dim)
    wanted = (there.num_embeddings, there.embedding_dim)
    if sizes != wanted:
        raise ValueError("{} is {} x {}, the config asks for {} x {}".format(name, *sizes, *wanted))
    _set_embedding(network, name, embedding)


def _set_embedding(network: PreTrainedModel, name: str, embedding: QuantizedEmbedding) -> None:
    check_plain_embedding(family_of(network))
    head = head_of(network)
    is_tied = network.config.tie_word_embeddings or isinstance(head, LowRankHead)
    network.set_submodule(name, embedding)
    if embedding.up is not None and has_own_head_map(network.config):
        if isinstance(head, OwnLowRankHead):
            own_up = head.up
        else:  # one of a network that is laid out, whose map is filled later
            sizes = (embedding.embedding_dim, cast("FrozenMatrix", embedding.table).in_features)
            own_up = nn.Parameter(torch.empty(*sizes, device="meta"))
        network.set_submodule(family_of(network).head, QuantizedHead(embedding, own_up))
    elif is_tied:
        network.set_submodule(family_of(network).head, QuantizedHead(embedding))
    else:
        return
    network.config.tie_word_embeddings = False  # transformers' own tying knows no codes


def is_low_rank(network: PreTrainedModel) -> bool:
    """Whether it has low-rank layers or a factorized embedding, quantized or not."""
    return any(
        isinstance(module, LowRankLinear | LowRankEmbedding)
        or is_quantized_low_rank(module)
        or (isinstance(module, QuantizedEmbedding) and module.up is not None)
        for module in network.modules()
    )


def quantize_layers(
    network: PreTrainedModel,
    method: str,
    *,
    embeddings: bool = False,
    moments: Iterable[InputMoments] = (),
) -> None:
    """Quantizes the linear layers of the blocks, in place, but for those that are already.

    Args:
        network: Network, which stays on its device.
        method: ``nf4`` or ``int8``.
        embeddings: Whether to quantize the token embedding too, with the head tied to it, where it
            is not yet.
        moments: Moments of the network's `input_moments`, refreshed: each layer is rounded so that
            its outputs are kept, as soon as its moments come.
    """
    device, family = network.device, family_of(network)
    layers = {
        name: module
        for name, module in network.named_modules()
        if is_linear(module) and not isinstance(module, FrozenMatrix) and not family.is_head(name)
    }
    for found in moments:
        for name, group in found.groups.items():
            if (layer := layers.pop(name, None)) is not None:
                made = quantized_layer(layer, method, device, found.moments[group])
                network.set_submodule(name, made)
    for name, layer in layers.items():
        network.set_submodule(name, quantized_layer(layer, method, device))
    embedding = network.get_input_embeddings()
    if embeddings and not isinstance(embedding, QuantizedEmbedding):
        name = next(name for name, module in network.named_modules() if module is embedding)
        assert isinstance(embedding, nn.Embedding | LowRankEmbedding)
        _set_embedding(network, name, QuantizedEmbedding.of(embedding, method, device))


def quantized_state(
    network: PreTrainedModel,
    method: str,
    dtype: torch.dtype,
    *,
    embeddings: bool = False,
    moments: Iterable[InputMoments] = (),
) -> dict[str, Tensor]:
    """The tensors of a network whose layers are quantized, here where they are not yet, in place.

    Args:
        network: Network without adapters; its quantized layers are so by ``method``.
        method: ``nf4`` or ``int8``.
        dtype: Dtype of the weights that stay unquantized.
        embeddings: Whether to quantize the token embedding too, with the head tied to it.
        moments: Moments as in `quantize_layers`.
    """
    quantize_layers(network, method, embeddings=embeddings, moments=moments)
    is_own = {name for name, _ in network.named_parameters()}
    tied = {name for name, _ in network.named_parameters(remove_duplicate=False)} - is_own
    family, head_is_codes = family_of(network), isinstance(head_of(network), QuantizedHead)
    state = {
        name: tensor.detach().to("cpu")
        for name, tensor in network.state_dict().items()
        if name not in tied
        # Of its parts only a map of its own is a parameter that nothing else has.
        and not (head_is_codes and family.is_head(name) and name not in is_own)
    }
    # What goes with the codes, scales among them, stays as it is.
    quantised = [name for name, m in network.named_modules() if isinstance(m, FrozenMatrix)]
    beside = {f"{name}.bias" for name in quantised}
    for name, tensor in state.items():
        is_part = any(name.startswith(f"{layer}.") for layer in quantised) and name not in beside
        if not is_part:
            state[name] = tensor.to(dtype)
    return state


def quantization_config(method: str, dtype: torch.dtype) -> dict[str, Any]:
    """The entry of ``config.json`` by which transformers and `load_model` know the folder.

    Args:
        method: ``nf4`` or ``int8``.
        dtype: Dtype of the products.
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
    weight, bias = parts.pop("weight"), parts.pop("bias", None)
    if method == "int8":
        out_features, in_features = weight.shape
        layer = bare_layer(in_features, out_features, bias is not None, method, dtype)
        layer.fill(weight.to(device), parts["SCB"].to(device))
    else:
        import bitsandbytes  # takes a second

        bnb: Any = bitsandbytes.nn
        stats = {name.removeprefix("weight."): tensor for name, tensor in parts.items()}
        made = bnb.Params4bit.from_prequantized(weight, stats, device=device)
        made.quant_state.dtype = dtype
        out_features, in_features = made.quant_state.shape
        layer = bare_layer(in_features, out_features, bias is not None, method, dtype)
        layer.weight = made
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
        raise ValueError(f"{name} is not a linear layer in the network")
    wanted = _features(there)
    if sizes != wanted:
        raise ValueError("{} is {} x {}, the config asks for {} x {}".format(name, *sizes, *wanted))
    network.set_submodule(name, layer)


def _features(layer: Any) -> tuple[int, int]:
    if isinstance(layer, Conv1D):
        return int(layer.nx), int(layer.nf)
    assert isinstance(layer, nn.Linear | LowRankLinear)
    return layer.in_features, layer.out_features
