"""LoRA-Muon: factors A and B by the step that Muon would take of their product.

Axes: N factors of one size, R rank, F features (in or out).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import cholesky_ex, solve_triangular
from typing_extensions import override

from fingpt_lightning.low_rank.factor_optimizer import FactorOptimizer, batches, tiny
from fingpt_lightning.low_rank.linear import folded_up

_DAMPING = 1e-5
"""Of a Gram matrix's Frobenius norm: what its eigenvalues are raised by before they are inverted.

It bounds the step of a factor whose partner has hardly any weight in some direction, and is above
what rounding in float32 makes of an eigenvalue that is zero.
"""


class LoRAMuon(FactorOptimizer):
    """Moves factors by the steepest descent of their product in the spectral norm.

    With A the factor ``up`` (out x R), B the transposed ``down`` (in x R), W = A B' their product,
    M <- m M + G the momentum of a factor, N = G + m M its Nesterov form, O(N) about U V' of
    N = U S V' (`orthogonalized`), and the R x R matrices P = (A' A + d I)^(-1/2) and
    Q = (B' B + d I)^(-1/2),

        A <- s A - lr / (2 s) O(N_A Q) Q        B <- s B - lr / (2 s) O(N_B P) P,

    s = sqrt(1 - lr weight_decay). Each term moves W by lr / 2 in all the directions that it can
    reach, so that W moves by at most about lr in the spectral norm and decays by lr weight_decay:
    lr is Muon's of a dense W, whatever the rank, and the step of W does not change where A c and
    B / c stand for A and B, as Spectron's does. d is 1e-5 of the Frobenius norm of the matrix that
    it is added to. ``expansion`` is taken into A for P, as it is a part of W.

    Any matrix T with T T' = Q Q' gives the same step, O(N T) T': T here is the inverse of a
    Cholesky factor, L^(-T) of B' B + d I = L L'. So the products by T are solutions of triangular
    systems, exact, without an iteration, and nothing waits for the device.

    State: one momentum per number of the factors. Cost: 20 R^2 F + 10 R^3 floating-point
    operations to orthogonalize a factor, and 3 R^2 F + R^3 / 3 beside it. A dense matrix moves by
    ``-lr O(N)``. Arguments and errors are those of `FactorOptimizer`.

    Raises:
        ValueError: ``lr`` times ``weight_decay`` of a group of factors is not below 1.

    Source: https://arxiv.org/abs/2606.12921, algorithm 1 (their momentum is the plain average;
    Nesterov's form is that of the Muon of the dense matrices here).
    """

    @override
    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["is_low_rank"] and not group["lr"] * group["weight_decay"] < 1:
            raise ValueError(
                f"lr {group['lr']} times weight_decay {group['weight_decay']} of a group of factors"
                " is not below 1"
            )

    @override
    def _step_factors(self, group: dict[str, Any]) -> None:
        pairs = self._pairs(group)
        moving = [p for pair in pairs for p in pair]
        if not moving:
            return
        self._add_gradients(moving, group["momentum"])
        # A table of an embedding stands as its ``up`` does: W = table up'.
        standing = set(moving) if group["is_embedding"] else {up for _, up in pairs}
        # Before the first factor moves: each step depends on where the other factor was.
        roots = self._cholesky_factors(moving, standing, group["expansion"])
        partner = dict(pairs) | {up: down for down, up in pairs}
        kept = (1 - group["lr"] * group["weight_decay"]) ** 0.5
        for some in batches(moving, lambda p: _lying(p, p in standing).shape):
            momenta_NRF = torch.stack(
                [_lying(self._nesterov(p, group["momentum"]), p in standing) for p in some]
            )
            roots_NRR = torch.stack([roots[partner[p]] for p in some])
            moves_NRF = self._none_if_skipped_(self._moves(momenta_NRF, roots_NRR))
            moves = [_lying(move, p in standing) for p, move in zip(some, moves_NRF, strict=True)]
            torch._foreach_mul_(some, self._unless_skipped(kept))
            torch._foreach_sub_(some, torch._foreach_mul(moves, group["lr"] / 2 / kept))

    def _cholesky_factors(
        self, moving: list[Tensor], standing: set[Tensor], expansion: float
    ) -> dict[Tensor, Tensor]:
        """L of each factor's damped Gram matrix L L', in float32 at least."""
        found: dict[Tensor, Tensor] = {}
        for some in batches(moving, lambda p: (_lying(p, p in standing).shape, p in standing)):
            factors = [folded_up(p, expansion) if p in standing else p for p in some]
            factors_NRF = torch.stack(
                [_lying(x, p in standing) for p, x in zip(some, factors, strict=True)]
            )
            factors_NRF = factors_NRF.to(torch.promote_types(factors_NRF.dtype, torch.float32))
            grams_NRR = factors_NRF @ factors_NRF.mT
            damping_N = grams_NRR.norm(dim=(-2, -1)).mul_(_DAMPING).clamp_min_(tiny(grams_NRR))
            grams_NRR.diagonal(dim1=-2, dim2=-1).add_(damping_N[:, None])
            found |= zip(some, cholesky_ex(grams_NRR).L, strict=True)
        return found

    def _moves(
        self, momenta_NRF: Float[Tensor, "N R F"], roots_NRR: Float[Tensor, "N R R"]
    ) -> Float[Tensor, "N R F"]:
        """T O(N T)' of each momentum N, lying, where T' is the inverse of the other's root."""
        dtype = momenta_NRF.dtype
        whitened_NRF = solve_triangular(roots_NRR, momenta_NRF.to(roots_NRR.dtype), upper=False)
        signs_NRF = self._orthogonalized(whitened_NRF)
        moves_NRF: Tensor = solve_triangular(roots_NRR.mT, signs_NRF, upper=True)
        return moves_NRF.to(dtype)


def _lying(matrix: Tensor, is_standing: bool) -> Float[Tensor, "R F"]:
    return matrix.T if is_standing else matrix
