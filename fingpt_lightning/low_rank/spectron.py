"""An optimizer for factors A and B: orthogonalized momentum, steps bounded for the product.

Axes: N matrices of one size, R rank, F features (in or out).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import normalize
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from fingpt_lightning.low_rank.linear import LowRankLinear

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_NEWTON_SCHULZ_STEPS = 5
_NUM_FIRST_ITERATIONS = 16
_NUMBERS_AT_A_TIME = 2**24
"""Numbers of stacked matrices: a bound on the memory beside weights, gradients and state."""


def low_rank_factors(network: nn.Module) -> list[nn.Parameter]:
    """The trained factors of all low-rank layers: down, up, down, up, in the order of the names."""
    layers = [m for m in network.modules() if isinstance(m, LowRankLinear)]
    return [p for m in layers if m.down.requires_grad for p in (m.down, m.up)]


def orthogonalized(matrices: Float[Tensor, "*N R F"]) -> Float[Tensor, "*N R F"]:
    """About U V' of each matrix U S V': its singular values go to between 0.7 and 1.2.

    Five steps X <- a X + (b X X' + c (X X')^2) X from X = G / |G|, with the a, b and c that raise
    small singular values fastest. Cost: 20 R^2 F + 10 R^3 floating-point operations per matrix.

    Args:
        matrices: Matrices with R <= F.

    Source: https://arxiv.org/abs/2409.20325; the coefficients are those of
    https://arxiv.org/abs/2602.12429.
    """
    a, b, c = _COEFFICIENTS
    x: Tensor = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp_min(_tiny(matrices))
    for _ in range(_NUM_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


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
            norms[:, None] > 0, left / norms.clamp_min(_tiny(norms))[:, None], vectors
        )
    return norms, vectors


class Spectron(Optimizer):
    """Moves factors A and B along orthogonalized momentum, everything else by AdamW.

    With the momentum M <- m M + G of a factor, and O(G + m M) its `orthogonalized` Nesterov form,
    both factors of a layer move by ``-e O``, where

        e = lr / (s(up) + s(down) + 1),

    s being the largest singular value. So the product moves by at most 1.2^2 lr in the spectral
    norm, whatever the scales of its factors, and as far in all directions: plain AdamW moves
    products of badly scaled factors too far in few directions. Decay is decoupled, as in AdamW.
    A dense matrix can be moved alike, by ``-lr O``: then a dense baseline is trained as the factors
    are.

    State: one momentum per number of the factors (AdamW keeps two averages) and a vector of R
    numbers per factor, from which one step of power iteration estimates s. Both are the
    parameter's own, so that a checkpoint of some parameters is a part of a checkpoint of all.
    Nothing is drawn and no rank needs another: equal gradients give equal steps.

    Where ``found_inf`` is set, as on torch's fused AdamW, a step at which it is 1 leaves all
    parameters as they are, whatever the gradients; but not the momenta.

    Args:
        groups: Parameter groups. One with ``is_low_rank`` True holds down, up, down, up, ... and
            may set ``momentum``, and ``expansion``, which is added to s(up): the alpha of
            `LowRankLinear`. One with ``is_dense`` True holds dense matrices. The others are
            AdamW's, with ``betas`` and ``eps``.
        lr: Learning rate, where a group has none.
        momentum: m.
        betas: Decay rates of AdamW's averages.
        eps: The eps of AdamW.
        weight_decay: Decoupled weight decay, where a group has none.
        fused: Whether AdamW runs in one kernel.
        product_dtype: Dtype in which momenta are orthogonalized; None for the parameters' own.

    Raises:
        ValueError: A group of factors has an odd number of parameters, or its neighbors are not
            factors of one layer.
        TypeError: A parameter is sharded: the products here need whole matrices.

    Source: https://arxiv.org/abs/2602.12429 (Spectron: their A is ``up``, their B ``down``).
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 0.001,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fused: bool = False,
        product_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "betas": betas, "eps": eps,
            "weight_decay": weight_decay, "fused": fused, "is_low_rank": False, "is_dense": False,
            "expansion": 0.0,
        }  # fmt: skip
        self.product_dtype = product_dtype
        self.found_inf: Tensor | None = None
        super().__init__(groups, defaults)
        for group in self.param_groups:
            if any(isinstance(p, DTensor) for p in group["params"]):
                raise TypeError("Spectron takes whole parameters, these are sharded")
            if group["is_low_rank"]:
                _check_factors(group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all groups; parameters without a gradient stay.

        Args:
            closure: Function that makes the gradients and gives the loss, which is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["is_low_rank"]:
                self._step_factors(group)
            elif group["is_dense"]:
                self._step_dense(group)
            else:
                self._step_adamw(group)
        return loss

    def _step_adamw(self, group: dict[str, Any]) -> None:
        moving = [p for p in group["params"] if p.grad is not None]
        for p in moving:
            if not self.state[p]:
                # Only the fused kernel counts on the device; the other would read each count there.
                on = p.device if group["fused"] else "cpu"
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=on),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        if moving:
            states = [self.state[p] for p in moving]
            gradients = [p.grad for p in moving]
            beta1, beta2 = group["betas"]
            adamw(
                moving,
                gradients,
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=group["fused"],
                found_inf=self.found_inf if group["fused"] else None,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _step_factors(self, group: dict[str, Any]) -> None:
        params = group["params"]
        pairs = list(zip(params[::2], params[1::2], strict=True))
        pairs = [(down, up) for down, up in pairs if None not in (down.grad, up.grad)]
        moving = [p for pair in pairs for p in pair]
        if not moving:
            return
        for p in moving:
            if not self.state[p]:
                self.state[p] = {"momentum": torch.zeros_like(p), "left_vector": _first_vector(p)}
        norms = self._norms(moving)
        more = 1 + abs(group["expansion"])
        steps = {}
        for down, up in pairs:
            steps[down] = steps[up] = group["lr"] / (norms[down] + norms[up] + more)
        self._step_along_momenta(moving, steps, group)

    def _step_dense(self, group: dict[str, Any]) -> None:
        moving = [p for p in group["params"] if p.grad is not None]
        for p in moving:
            if not self.state[p]:
                self.state[p] = {"momentum": torch.zeros_like(p)}
        steps = {p: torch.full((), group["lr"], dtype=p.dtype, device=p.device) for p in moving}
        self._step_along_momenta(moving, steps, group)

    def _step_along_momenta(
        self, moving: list[Tensor], steps: dict[Tensor, Tensor], group: dict[str, Any]
    ) -> None:
        if not moving:
            return
        momentum = group["momentum"]
        self._add_gradients(moving, momentum)
        kept = 1 - group["lr"] * group["weight_decay"]
        if self.found_inf is None:
            torch._foreach_mul_(moving, kept)
        else:
            torch._foreach_mul_(moving, torch.where(self.found_inf > 0, 1.0, kept))
        for some in _batches(moving):
            self._move(some, torch.stack([steps[p] for p in some]), momentum)

    def _add_gradients(self, moving: list[Tensor], momentum: float) -> None:
        momenta = [self.state[p]["momentum"] for p in moving]
        torch._foreach_mul_(momenta, momentum)
        torch._foreach_add_(momenta, [p.grad for p in moving if p.grad is not None])

    def _norms(self, moving: list[Tensor]) -> dict[Tensor, Tensor]:
        found: dict[Tensor, Tensor] = {}
        for some in _batches(moving):
            kept = [self.state[p]["left_vector"] for p in some]
            norms_N, vectors_NR = spectral_norms(_stacked(some), torch.stack(kept))
            torch._foreach_copy_(kept, list(vectors_NR))
            found |= zip(some, norms_N, strict=True)
        return found

    def _move(self, some: list[Tensor], steps_N: Float[Tensor, "N"], momentum: float) -> None:
        momenta_NRF = _stacked([self.state[p]["momentum"] for p in some])
        gradients_NRF = _stacked([p.grad for p in some if p.grad is not None])
        nesterov_NRF = gradients_NRF.add_(momenta_NRF, alpha=momentum)
        product_dtype = self.product_dtype or nesterov_NRF.dtype
        moves_NRF = orthogonalized(nesterov_NRF.to(product_dtype)).to(nesterov_NRF.dtype)
        moves_NRF *= steps_N[:, None, None]
        if self.found_inf is not None:
            moves_NRF.masked_fill_(self.found_inf > 0, 0)
        moves = [
            move if p.shape == move.shape else move.T
            for p, move in zip(some, moves_NRF, strict=True)
        ]
        torch._foreach_sub_(some, moves)


def _check_factors(params: Sequence[Tensor]) -> None:
    if len(params) % 2:
        raise ValueError(f"a group of factors has {len(params)} parameters, which is odd")
    for index, (down, up) in enumerate(zip(params[::2], params[1::2], strict=True)):
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise ValueError(
                f"parameters {2 * index} and {2 * index + 1} of a group of factors are"
                f" {tuple(down.shape)} and {tuple(up.shape)}: not down (R, in) and up (out, R)"
            )


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _stacked(some: Sequence[Tensor]) -> Float[Tensor, "N R F"]:
    return torch.stack([_wide(matrix) for matrix in some])


def _batches(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The matrices of one size, lying or standing, a bounded number of them at a time."""
    by_kind: dict[Any, list[Tensor]] = {}
    for p in params:
        by_kind.setdefault((_wide(p).shape, p.dtype, p.device), []).append(p)
    for alike in by_kind.values():
        at_a_time = max(1, _NUMBERS_AT_A_TIME // alike[0].numel())
        for first in range(0, len(alike), at_a_time):
            yield alike[first : first + at_a_time]


def _first_vector(matrix: Tensor) -> Float[Tensor, "R"]:
    """Near the largest left singular vector; the same on all ranks, so it is not drawn freely."""
    wide = _wide(matrix.detach())
    stream = torch.Generator().manual_seed(0)
    drawn = torch.randn(wide.shape[0], generator=stream, dtype=torch.float64).to(wide)
    _, vectors = spectral_norms(wide[None], drawn[None], _NUM_FIRST_ITERATIONS)
    return vectors[0].clone()


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
