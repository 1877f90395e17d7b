"""Networks with what stands beside or instead of dense weights multiplied out."""

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.low_rank import Factors, LowRankEmbedding, LowRankHead, LowRankLinear
from fingpt_lightning.low_rank.adapters import AdaptedLinear
from fingpt_lightning.low_rank.embedding import OwnLowRankHead
from fingpt_lightning.models.adapting import (
    adapted_layers,
    dense_weight,
    ends_features,
    linear_names,
)
from fingpt_lightning.models.families import family_of, head_of
from fingpt_lightning.models.low_rank_config import forget_own_head
from fingpt_lightning.models.quantization.frozen_matrix import FrozenMatrix
from fingpt_lightning.models.quantization.layers import is_quantized_low_rank
from fingpt_lightning.models.quantization.quantized_embedding import (
    QuantizedEmbedding,
    QuantizedHead,
)
from fingpt_lightning.models.split_layers import join_split_layers
from fingpt_lightning.models.tied_head import tie_head


@torch.no_grad()
def dequantize(network: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
    """Puts in the place of quantized layers those that their codes stand for, low-rank or dense.

    At any time one layer is held twice.

    Args:
        network: Network with or without adapters, whose layers may be quantized; changed in place.
        dtype: Dtype of the new layers; None is that of the network.
    """
    dtype = dtype or network.dtype
    for name in linear_names(network):
        layer = network.get_submodule(name)
        if isinstance(layer, AdaptedLinear):
            name, layer = f"{name}.base_layer", layer.base_layer
        if is_quantized_low_rank(layer):
            down, up = network.get_submodule(f"{name}.down"), network.get_submodule(f"{name}.up")
            factors = Factors(_values(up, dtype), _values(down, dtype))
            bias = getattr(up, "bias", None)
            network.set_submodule(name, LowRankLinear.from_factors(factors, bias))
        elif isinstance(layer, FrozenMatrix):
            bias = getattr(layer, "bias", None)
            weight = _values(layer, dtype)
            network.set_submodule(name, _dense_layer(network, weight, bias, dtype))
    embedding = network.get_input_embeddings()
    if isinstance(embedding, QuantizedEmbedding):
        _dequantize_embedding(network, embedding, dtype)
    network.requires_grad_(False)


def _dequantize_embedding(
    network: PreTrainedModel, embedding: QuantizedEmbedding, dtype: torch.dtype
) -> None:
    table = _values(embedding.table, dtype)
    if embedding.up is None:
        _set_dense_embedding(network, table, dtype)
        return
    with torch.device("meta"):
        made = LowRankEmbedding(embedding.num_embeddings, embedding.embedding_dim, table.shape[1])
    made.table = nn.Parameter(table)
    made.up = nn.Parameter(_values(embedding.up, dtype))
    network.set_input_embeddings(made)
    head = head_of(network)
    if isinstance(head, QuantizedHead) and isinstance(head.up, nn.Parameter):
        with torch.device("meta"):
            own_head = OwnLowRankHead(made.embedding_dim, made.num_embeddings, made.rank)
        own_head.up = head.up
        network.set_submodule(family_of(network).head, own_head)
    tie_head(network)


def _values(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    return cast("FrozenMatrix", layer).values(dtype)


def _set_dense_embedding(network: PreTrainedModel, table: Tensor, dtype: torch.dtype) -> None:
    """Sets the embedding; a head that shared the parameters of the last shares those of the new."""
    vocabulary, width = table.shape
    with torch.device("meta"):
        embedding = nn.Embedding(vocabulary, width)
        head = nn.Linear(width, vocabulary, bias=False)
    embedding.weight = nn.Parameter(table.to(dtype), requires_grad=False)
    network.set_input_embeddings(embedding)
    there = head_of(network)
    if isinstance(there, OwnLowRankHead):
        head.weight = nn.Parameter(there.dense_weight().to(dtype), requires_grad=False)
        network.set_submodule(family_of(network).head, head)
        forget_own_head(network.config)
        network._tied_weights_keys = type(network)._tied_weights_keys
    elif isinstance(there, LowRankHead | QuantizedHead):
        network.set_submodule(family_of(network).head, head)
        network.config.tie_word_embeddings = True
        network._tied_weights_keys = type(network)._tied_weights_keys
        head.weight = embedding.weight


@torch.no_grad()
def merge_into_base(network: PreTrainedModel) -> None:
    """Merges each adapter into its layer; a low-rank layer stays one, wider by the adapter's rank.

    Unlike `merge_adapters` it keeps low-rank layers low-rank where that still saves memory. A
    quantized network is dequantized.

    Args:
        network: Network with adapters on dense, low-rank or quantized layers; changed in place.

    Raises:
        ValueError: A low-rank layer under an adapter has an activation between its factors.
    """
    dequantize(network)
    for name, layer in adapted_layers(network).items():
        pair = _widened(layer) if isinstance(layer.base_layer, LowRankLinear) else None
        if pair is None:
            weight = layer.merged_weight(dense_weight(layer.base_layer))
            network.set_submodule(name, _dense_layer(network, weight, layer.bias, network.dtype))
        else:
            network.set_submodule(name, pair)
    network.requires_grad_(False)


@torch.no_grad()
def expand(network: PreTrainedModel) -> None:
    """Makes every layer one of transformers' own: low-rank and quantized layers become dense.

    Products are multiplied out in float64, and rounded once to the network's dtype.

    Args:
        network: Network without adapters; changed in place.

    Raises:
        ValueError: A low-rank layer has an activation between its factors.
    """
    dequantize(network)
    own = family_of(network).dense_layer
    for name in linear_names(network):
        layer = network.get_submodule(name)
        if type(layer) is own:
            continue
        if isinstance(layer, LowRankLinear):
            weight = layer.product(torch.float64)
        else:
            weight = dense_weight(layer)
        bias = getattr(layer, "bias", None)
        network.set_submodule(name, _dense_layer(network, weight, bias, network.dtype))
    join_split_layers(network)
    embedding = network.get_input_embeddings()
    if isinstance(embedding, LowRankEmbedding):
        table = embedding.table.double() @ embedding.up.double().T
        _set_dense_embedding(network, table, network.dtype)


def _dense_layer(
    network: PreTrainedModel, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> nn.Module:
    out_features, in_features = weight.shape
    weight = weight.to(dtype)
    layer: nn.Module
    with torch.device("meta"):
        if family_of(network).dense_layer is Conv1D:
            layer, weight = Conv1D(out_features, in_features), weight.T
        else:
            layer = nn.Linear(in_features, out_features, bias is not None)
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


def _widened(layer: AdaptedLinear) -> LowRankLinear | None:
    """Layer and adapter as one low-rank layer; None where a dense layer is no larger."""
    base = layer.base_layer
    assert isinstance(base, LowRankLinear)
    if base.activation != "none":
        raise ValueError(
            f"an adapter beside a low-rank layer with {base.activation} between its factors cannot"
            " be merged"
        )
    in_features, out_features = ends_features(base)
    rank = base.rank + layer.options.rank
    if rank * (in_features + out_features) >= in_features * out_features:
        return None
    with torch.device("meta"):
        pair = LowRankLinear(in_features, out_features, rank, base.bias is not None)
    up = torch.cat([base.up, layer.options.scale * layer.lora_B.to(base.up)], 1)
    if layer.lora_magnitude_vector is not None:
        dtype = torch.promote_types(base.up.dtype, layer.lora_A.dtype)
        product = layer.options.scale * (layer.lora_B.to(dtype) @ layer.lora_A.to(dtype))
        lengths = (dense_weight(base).to(product) + product).norm(dim=1)
        up = up * (layer.lora_magnitude_vector / lengths).to(up)[:, None]
    down = torch.cat([base.down, layer.lora_A.to(base.down)])
    pair.up, pair.down = nn.Parameter(up), nn.Parameter(down)
    if base.bias is not None:
        pair.bias = nn.Parameter(base.bias.detach().clone())
    return pair
