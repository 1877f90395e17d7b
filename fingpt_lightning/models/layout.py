"""Networks laid out without memory, then filled tensor by tensor, quantized as they fill."""

import ctypes
import sys
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.low_rank import LowRankEmbedding, LowRankHead, LowRankLinear
from fingpt_lightning.low_rank.embedding import OwnLowRankHead
from fingpt_lightning.models.families import (
    check_plain_embedding,
    family_named,
    family_of,
    head_of,
)
from fingpt_lightning.models.finite import check_stored
from fingpt_lightning.models.low_rank_config import (
    has_own_head,
    has_own_head_map,
    is_split,
    noted_activation,
)
from fingpt_lightning.models.quantization.layers import is_linear, quantized_layer
from fingpt_lightning.models.split_layers import split_fused_layers
from fingpt_lightning.models.tied_head import tie_head


def lay_out(config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> PreTrainedModel:
    """The network of a config on the meta device, low-rank where the stored weights are.

    Args:
        config: Config of a family in `FAMILIES`.
        shapes: Sizes of the stored weights, by name: ``LAYER.down`` beside ``LAYER.up`` makes a
            low-rank layer, ``EMBEDDING.table`` a factorized embedding and the head tied to it.

    Raises:
        ValueError: The family is not supported, or a low-rank layer's name or rank does not fit
            the network.
    """
    family = family_named(config.model_type)
    config.use_cache = True  # pretraining saves it switched off
    with torch.device("meta"):
        network = family.network_class(config)
        if is_split(config):
            split_fused_layers(network)
        for stored, shape in shapes.items():
            name = full_name(network, stored)
            layer_name, _, part = name.rpartition(".")
            if part == "down":
                layer = _stored_layer(network, layer_name)
                in_features, out_features = features_of(layer)
                has_bias = getattr(layer, "bias", None) is not None
                pair = LowRankLinear(
                    in_features, out_features, shape[0], has_bias, noted_activation(config)
                )
                network.set_submodule(layer_name, pair)
            elif part == "table" and not family.is_head(layer_name):
                table = _stored_layer(network, layer_name)
                if not isinstance(table, nn.Embedding):
                    raise ValueError(f"{name}: {layer_name} is not an embedding")
                check_plain_embedding(family)
                embedding = LowRankEmbedding(table.num_embeddings, table.embedding_dim, shape[1])
                network.set_submodule(layer_name, embedding)
                if has_own_head_map(config):
                    sizes = (table.embedding_dim, table.num_embeddings, shape[1])
                    network.set_submodule(family.head, OwnLowRankHead(*sizes))
                config.tie_word_embeddings = False  # transformers' own tying is for full tables
            elif part == "table" and has_own_head(config) and not has_own_head_map(config):
                head = _stored_layer(network, layer_name)
                head_features = features_of(head)
                network.set_submodule(layer_name, OwnLowRankHead(*head_features, shape[1]))
    tie_head(network)
    return network


def cut(
    network: PreTrainedModel, keep_part: Callable[[PreTrainedModel], None] | None
) -> frozenset[str]:
    """Leaves a network of `lay_out` the part that this process is to fill.

    Args:
        network: Whole network; changed in place.
        keep_part: Function that takes modules out of the network; None leaves it whole.

    Returns:
        The names of the parameters that were taken out.
    """
    if keep_part is None:
        return frozenset()
    whole = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    keep_part(network)
    return frozenset(whole - {n for n, _ in network.named_parameters(remove_duplicate=False)})


def full_name(network: PreTrainedModel, stored: str) -> str:
    """The parameter that a stored name means: files of a bare body leave its prefix out."""
    family = family_of(network)
    if stored.startswith(f"{family.body}.") or family.is_head(stored):
        return stored
    return f"{family.body}.{stored}"


def features_of(layer: nn.Module) -> tuple[int, int]:
    """In and out features of a linear layer.

    Raises:
        ValueError: It is none.
    """
    match layer:
        case Conv1D():
            return int(layer.nx), int(layer.nf)
        case nn.Linear() | LowRankLinear():
            return layer.in_features, layer.out_features
    raise ValueError(f"{type(layer).__name__} is not a linear layer")


@torch.no_grad()
def fill(
    network: PreTrainedModel,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None = None,
    elsewhere: Collection[str] = (),
) -> None:
    """Gives a network of `lay_out` its weights, without an initialization before.

    At any time one layer is held unquantized beside what has been filled.

    Args:
        network: Network on the meta device; filled in place and set to evaluation.
        tensors: All weights, by stored name, in any order; each is copied.
        dtype: Dtype of the weights, and of the products where weights are quantized.
        device: Device of the weights.
        quantize: ``nf4`` or ``int8`` for the linear layers of the blocks; head, embeddings and
            norms stay as they are.
        elsewhere: Names of parameters that `cut` took out; their tensors are not read.

    Raises:
        ValueError: A weight is missing, unknown, of another size than the network's, or not
            stored as floating-point numbers.
    """
    family, head = family_of(network), head_of(network)
    head_is_tied = isinstance(head, LowRankHead) or network.config.tie_word_embeddings
    # Beside a table that it shares, a head may have a map of its own.
    tied = {f"{family.head}.table"} if has_own_head_map(network.config) else set[str]()
    parameters = dict(network.named_parameters())
    unknown: list[str] = []
    stored_head: list[tuple[str, Tensor]] = []
    for stored, tensor in tensors:
        name = full_name(network, stored)
        if name in elsewhere:
            continue
        if name in tied or (not tied and head_is_tied and family.is_head(name)):
            check_stored(stored, tensor)
            stored_head.append((name, tensor))
            continue
        if name not in parameters:
            if not name.endswith(family.computed):
                unknown.append(stored)
            continue
        if tensor.shape != parameters[name].shape:
            sizes = (" x ".join(map(str, t.shape)) for t in (tensor, parameters[name]))
            raise ValueError("{} is {}, the config asks for {}".format(stored, *sizes))
        check_stored(stored, tensor)
        layer_name, _, part = name.rpartition(".")
        layer = network.get_submodule(layer_name)
        method = quantize if is_linear(layer) and not family.is_head(layer_name) else None
        weight = torch.empty(tensor.shape, dtype=dtype, device="cpu" if method else device)
        setattr(layer, part, nn.Parameter(weight.copy_(tensor)))
        if method and not any(parameter.is_meta for parameter in layer.parameters()):
            network.set_submodule(layer_name, quantized_layer(layer, method, device))
            del layer, weight
            _return_freed_memory()
    if unknown:
        raise ValueError(f"{len(unknown)} weights have no place in the network: {unknown[0]}, ...")
    tie_head(network)
    missing = [name for name, parameter in network.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(f"{len(missing)} weights are missing: {missing[0]}, ...")
    for name, tensor in stored_head:
        if not torch.equal(network.get_parameter(name), tensor.to(device, dtype)):
            raise ValueError(f"{name} differs from the embedding, to which the config ties it")
    compute_buffers(network)
    network.config.dtype = dtype
    network.eval()


def _return_freed_memory() -> None:
    """Hands glibc's free pages back: it keeps those of small dense layers among quantized ones."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)  # musl has none
        trim(0)


def compute_buffers(network: PreTrainedModel) -> None:
    """Makes what buffers hold, as the config decides: rotary frequencies, an embedding's scale.

    Args:
        network: Network, each of whose modules has its parameters in memory; changed in place.
    """
    device = next(p.device for p in network.parameters() if not p.is_meta)
    for name, module in list(network.named_modules()):
        if not list(module.buffers(recurse=False)):
            continue
        if isinstance(module, nn.Embedding) and hasattr(module, "scalar_embed_scale"):
            scale = torch.tensor(
                module.scalar_embed_scale, dtype=module.weight.dtype, device=device
            )
            module.register_buffer("embed_scale", scale, persistent=False)
        elif "RotaryEmbedding" in type(module).__name__:
            with torch.device(device):
                made = type(module)(network.config)
            network.set_submodule(name, made)


def _stored_layer(network: PreTrainedModel, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the network has no layer {name}") from None
