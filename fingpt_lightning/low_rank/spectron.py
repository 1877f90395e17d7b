"""Spectron: factors A and B along orthogonalized momentum, by a step bounded for the product.

Axes: N matrices of one size, R rank, F features (in or out).
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from typing_extensions import override

from fingpt_lightning.low_rank.factor_optimizer import FactorOptimizer, batches, tiny, wide

_NUM_FIRST_ITERATIONS = 16


def spectral_norms(
    matrices: Float[Tensor, "N R F"], vectors: Float[Tensor, "N R"], num_iterations: int = 1
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N R"]]:
    """The largest singular values, from below, and the left vectors that go on towards them.

    Args:
        matrices: Matrices whose norms are computed.
        vectors: Start of the iteration, best the vectors of an earlier call.
        num_iterations: Number of power iterations; each costs 4 R F operations per matrix.
    """
    norms = vectors.new_zeros(len(vectors))
    for _ in range(num_iterations):
        right = normalize((matrices.mT @ vectors[..., None]).squeeze(-1), dim=-1)
        left = (matrices @ right[..., None]).squeeze(-1)
        norms = left.norm(dim=-1)
        # A factor that is zero now may not stay so: its vector must not become zero.
        vectors = torch.where(
            norms[:, None] > 0, left / norms.clamp_min(tiny(norms))[:, None], vectors
        )
    return norms, vectors


class Spectron(FactorOptimizer):
    """Moves factors A and B along orthogonalized momentum, everything else by AdamW.

    With the momentum M <- m M + G of a factor, and O(G + m M) its `orthogonalized` Nesterov form,
    both factors of a layer move by ``-e O``, where

        e = lr / (s(up) + s(down) + 1),

    s being the largest singular value; ``expansion`` is added to s(up). So the product moves by at
    most 1.2^2 lr in the spectral norm, whatever the scales of its factors, and as far in all
    directions: plain AdamW moves products of badly scaled factors too far in few directions. A
    dense matrix can be moved alike, by ``-lr O``: then a dense baseline is trained as the factors
    are.

    A group of factors with ``adjust_lr`` "original" multiplies the step of each by
    sqrt(max(1, rows / columns)), as the authors' code does under that name and their formula does
    not: ``up`` moves further by sqrt(out / R), and so may the product.

    State: one momentum per number of the factors (AdamW keeps two averages) and a vector of R
    numbers per factor, from which one step of power iteration estimates s. Arguments and errors are
    those of `FactorOptimizer`.

    Source: https://arxiv.org/abs/2602.12429 (Spectron: their A is ``up``, their B ``down``);
    https://github.com/da462/spectron at 05d4e19 (``adjust_muon_lr: original``).
    """

    @override
    def _step_factors(self, group: dict[str, Any]) -> None:
        pairs = self._pairs(group)
        moving = [p for pair in pairs for p in pair]
        if not moving:
            return
        for p in moving:
            if not self.state[p]:
                self.state[p]["left_vector"] = _first_vector(p)
        norms = self._norms(moving)
        more = 1 + abs(group["expansion"])
        steps = {}
        for down, up in pairs:
            bound = group["lr"] / (norms[down] + norms[up] + more)
            for p in (down, up):
                # A checkpoint of an earlier version has no such setting.
                adjusts = group.get("adjust_lr") == "original"
                steps[p] = bound * adjustment(p) if adjusts else bound
        self._step_along_momenta(moving, steps, group)

    def _norms(self, moving: list[Tensor]) -> dict[Tensor, Tensor]:
        found: dict[Tensor, Tensor] = {}
        for some in batches(moving, lambda p: p.shape):
            kept = [self.state[p]["left_vector"] for p in some]
            norms_N, vectors_NR = spectral_norms(wide(torch.stack(some)), torch.stack(kept))
            torch._foreach_copy_(kept, list(vectors_NR))
            found |= zip(some, norms_N, strict=True)
        return found


def adjustment(matrix: Tensor) -> float:
    """The factor on the step of a matrix that the first Muon had: sqrt(max(1, rows / columns))."""
    rows, columns = matrix.shape
    return math.sqrt(max(1.0, rows / columns))


def _first_vector(matrix: Tensor) -> Float[Tensor, "R"]:
    """Near the largest left singular vector; the same on all ranks, so it is not drawn freely."""
    lying = wide(matrix.detach())
    stream = torch.Generator().manual_seed(0)
    drawn = torch.randn(lying.shape[0], generator=stream, dtype=torch.float64).to(lying)
    _, vectors = spectral_norms(lying[None], drawn[None], _NUM_FIRST_ITERATIONS)
    return vectors[0].clone()
