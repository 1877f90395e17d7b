"""Low-rank layers of several sizes and their groups, for tests of the optimizers of factors."""

from typing import Any

import torch
from torch import nn

from fingpt_lightning.low_rank import LowRankEmbedding, LowRankLinear, low_rank_factors
from fingpt_lightning.low_rank.embedding import OwnLowRankHead

SIZES = [(11, 13, 5), (11, 13, 5), (13, 11, 5), (7, 11, 7), (11, 7, 7), (13, 7, 3)]
"""Two of one size, one whose factors lie the other way round, two of full rank, one alone."""


def factor_network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Low-rank layers with norms between them, and an embedding."""
    torch.manual_seed(1)
    layers = [nn.Sequential(LowRankLinear(*size), nn.LayerNorm(size[1])) for size in SIZES]
    return nn.Sequential(*layers, nn.Embedding(5, 7)).to(dtype)


def embedding_network() -> nn.ModuleList:
    """A low-rank embedding whose width is below the vocabulary, one above it, and a head."""
    torch.manual_seed(1)
    sizes = [(23, 11, 5), (7, 13, 5)]
    layers: list[nn.Module] = [LowRankEmbedding(*size) for size in sizes]
    return nn.ModuleList([*layers, OwnLowRankHead(11, 23, 5)]).double()


def factor_groups_of(network: nn.Module, **of_factors: Any) -> list[dict[str, Any]]:
    """A group of all that are not factors, and one of the factors."""
    factors = low_rank_factors(network)
    taken = {id(p) for p in factors}
    rest = [p for p in network.parameters() if id(p) not in taken]
    return [
        {"params": rest, "weight_decay": 0.1},
        {"params": factors, "is_low_rank": True, "lr": 0.05, "weight_decay": 0.3, **of_factors},
    ]


def set_gradients(network: nn.Module, step: int) -> None:
    """Gives each parameter the random gradient of a step."""
    stream = torch.Generator().manual_seed(step)
    for p in network.parameters():
        p.grad = torch.randn(p.shape, generator=stream, dtype=torch.float64).to(p)
