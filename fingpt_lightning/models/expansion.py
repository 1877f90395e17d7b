"""Networks with what stands beside or instead of dense weights multiplied out."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.low_rank import LowRankEmbedding, LowRankLinear
from fingpt_lightning.low_rank.adapters import AdaptedLinear
from fingpt_lightning.models.adapting import (
    adapted_layers,
    dense_weight,
    ends_features,
    linear_names,
)
from fingpt_lightning.models.families import family_of
from fingpt_lightning.models.quantization.quantized_embedding import QuantizedEmbedding


@torch.no_grad()
def merge_into_base(network: PreTrainedModel) -> None:
    """Merges each adapter into its layer; a low-rank layer stays one, wider by the adapter's rank.

    Unlike `merge_adapters` it keeps low-rank layers low-rank where that still saves memory.

    Args:
        network: Network with adapters on dense, low-rank or quantized layers; changed in place.

    Raises:
        ValueError: A low-rank layer under an adapter has an activation between its factors.
    """
    for name, layer in adapted_layers(network).items():
        pair = _widened(layer) if isinstance(layer.base_layer, LowRankLinear) else None
        if pair is None:
            weight = layer.merged_weight(dense_weight(layer.base_layer))
            network.set_submodule(name, _dense_layer(network, weight, layer.bias))
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
    own = family_of(network).dense_layer
    for name in linear_names(network):
        layer = network.get_submodule(name)
        if type(layer) is own:
            continue
        last = layer[-1] if isinstance(layer, nn.Sequential) else layer
        weight = (
            layer.product(torch.float64)
            if isinstance(layer, LowRankLinear)
            else dense_weight(layer)
        )
        network.set_submodule(name, _dense_layer(network, weight, getattr(last, "bias", None)))
    embedding = network.get_input_embeddings()
    if isinstance(embedding, LowRankEmbedding | QuantizedEmbedding):
        table = (
            embedding.dense_table()
            if isinstance(embedding, QuantizedEmbedding)
            else embedding.table.double() @ embedding.up.double().T
        )
        with torch.device("meta"):
            dense = nn.Embedding(embedding.num_embeddings, embedding.embedding_dim)
            head = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False)
        dense.weight = nn.Parameter(table.to(network.dtype), requires_grad=False)
        network.set_input_embeddings(dense)
        network.set_submodule(family_of(network).head, head)
        network.config.tie_word_embeddings = True
        network._tied_weights_keys = type(network)._tied_weights_keys
        head.weight = dense.weight


def _dense_layer(network: PreTrainedModel, weight: Tensor, bias: Tensor | None) -> nn.Module:
    out_features, in_features = weight.shape
    weight = weight.to(network.dtype)
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
        product = layer.options.scale * (layer.lora_B @ layer.lora_A)
        lengths = (dense_weight(base).to(product) + product).norm(dim=1)
        up = up * (layer.lora_magnitude_vector / lengths).to(up)[:, None]
    down = torch.cat([base.down, layer.lora_A.to(base.down)])
    pair.up, pair.down = nn.Parameter(up), nn.Parameter(down)
    if base.bias is not None:
        pair.bias = nn.Parameter(base.bias.detach().clone())
    return pair
