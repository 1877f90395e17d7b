"""Parameters of any module, as stored and as they would be with its low-rank layers dense."""

import math
from typing import NamedTuple

from torch import nn

from fingpt_lightning.low_rank.embedding import LowRankEmbedding, OwnLowRankHead
from fingpt_lightning.low_rank.linear import LowRankLinear


class ParameterCounts(NamedTuple):
    """Numbers that a module stores, shared ones once, and that its dense baseline would."""

    stored: int
    dense: int


def parameter_counts(module: nn.Module) -> ParameterCounts:
    """Counts the parameters of a module; weights that bitsandbytes packed count unpacked.

    >>> parameter_counts(nn.Sequential(LowRankLinear(8, 6, rank=2), nn.Linear(6, 3)))
    ParameterCounts(stored=55, dense=75)
    """
    stored = sum(map(unpacked_size, module.parameters()))
    dense = stored
    tables = {m.table for m in module.modules() if isinstance(m, LowRankEmbedding)}
    for layer in module.modules():
        factors: tuple[nn.Parameter, ...]
        if isinstance(layer, LowRankLinear):
            factors, matrix = (layer.down, layer.up), layer.in_features * layer.out_features
        elif isinstance(layer, LowRankEmbedding):
            factors, matrix = (layer.table, layer.up), layer.num_embeddings * layer.embedding_dim
        elif isinstance(layer, OwnLowRankHead):
            is_shared = layer.table in tables
            factors = (layer.up,) if is_shared else (layer.table, layer.up)
            matrix = 0 if is_shared else layer.in_features * layer.out_features
        else:
            continue
        dense += matrix - sum(map(unpacked_size, factors))
    return ParameterCounts(stored, dense)


def unpacked_size(parameter: nn.Parameter) -> int:
    """The numbers that a parameter stands for, of one that bitsandbytes packed too."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)
