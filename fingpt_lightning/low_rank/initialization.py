"""How the two factors of a layer start.

Axes: I in_features, O out_features, R rank.
"""

from enum import StrEnum

import torch
from torch import Tensor

from fingpt_lightning.low_rank.factorize import Factors, factorize


class Initialization(StrEnum):
    """What ``up`` (O x R) and ``down`` (R x I) are drawn from."""

    SVD = "svd"
    """The truncated singular value decomposition of the dense draw, N(0, std^2): U sqrt(S) and
    sqrt(S) V'. Nearest to the dense baseline.

    Source: https://arxiv.org/abs/2602.12429."""
    COLA = "cola"
    """Both from N(0, s^2), s = R^(-1/4) (I + O)^(-1/4): the product's numbers have the variance
    1 / (I + O), whatever ``std`` is.

    Source: https://arxiv.org/abs/2502.10940."""
    ORTHOGONAL = "orthogonal"
    """Columns of ``up`` and rows of ``down`` are orthogonal and of length (std^2 O I / R)^(1/4):
    the product's numbers have the variance std^2 of the dense draw, spread evenly over R
    directions.

    Source: https://arxiv.org/abs/1312.6120 (orthogonal draws); the scale follows from
    |up down|^2 = length^4 R."""


def initial_factors(
    initialization: Initialization,
    in_features: int,
    out_features: int,
    rank: int,
    std: float,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Factors:
    """The float32 factors that a layer starts with.

    Args:
        initialization: Method of the draw.
        in_features: I.
        out_features: O.
        rank: R.
        std: Standard deviation of the numbers of the dense layer in its place.
        generator: Generator of the draws; None for torch's own.
        device: Device of the draws, that of the generator.
    """

    def drawn(rows: int, columns: int, std: float = 1.0) -> Tensor:
        return torch.empty(rows, columns, device=device).normal_(std=std, generator=generator)

    match initialization:
        case Initialization.SVD:
            return factorize(drawn(out_features, in_features, std), rank, torch.float32)
        case Initialization.COLA:
            scale = (rank * (in_features + out_features)) ** -0.25
            return Factors(drawn(out_features, rank, scale), drawn(rank, in_features, scale))
        case Initialization.ORTHOGONAL:
            length = (std**2 * out_features * in_features / rank) ** 0.25
            up = _orthonormal(drawn(out_features, rank))
            down = _orthonormal(drawn(in_features, rank)).T
            return Factors(length * up, (length * down).contiguous())


def _orthonormal(drawn: Tensor) -> Tensor:
    """Columns evenly distributed over all orthonormal ones."""
    columns, triangle = torch.linalg.qr(drawn)
    signed: Tensor = columns * triangle.diagonal().sign()
    return signed
