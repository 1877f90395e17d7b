"""An optimizer for factors A and B and for all else: what Spectron and LoRA-Muon share.

Axes: N matrices of one size I x O, R rank, F features (in or out).
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from fingpt_lightning.low_rank.cpu_products import faster_products, is_exact
from fingpt_lightning.low_rank.embedding import LowRankEmbedding, OwnLowRankHead
from fingpt_lightning.low_rank.linear import LowRankLinear

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_NEWTON_SCHULZ_STEPS = 5
_NUMBERS_AT_A_TIME = 2**24
"""Numbers of stacked matrices: a bound on the memory beside weights, gradients and state."""


def low_rank_factors(network: nn.Module) -> list[nn.Parameter]:
    """The trained factors of all low-rank layers: down, up, down, up, in the order of the names."""
    layers = [m for m in network.modules() if isinstance(m, LowRankLinear)]
    return [p for m in layers if m.down.requires_grad for p in (m.down, m.up)]


def embedding_factors(network: nn.Module) -> list[nn.Parameter]:
    """The trained factors of low-rank embeddings and heads: table, up, ...

    Each is there once, but for a table that a head shares beside a map of its own.
    """
    layers = [m for m in network.modules() if isinstance(m, LowRankEmbedding | OwnLowRankHead)]
    return [p for m in layers if m.table.requires_grad for p in (m.table, m.up)]


def orthogonalized(
    matrices: Float[Tensor, "*N I O"], scales: Float[Tensor, "*N"] | None = None
) -> Float[Tensor, "*N I O"]:
    """About U V' of each matrix U S V': its singular values go to between 0.7 and 1.2.

    Five steps X <- p(X X') X from X = G / |G|, p(Y) = a I + b Y + c Y^2, with the a, b and c that
    raise small singular values fastest. Cost for R rows and F >= R columns, or the other way round:
    20 R^2 F + 10 R^3 floating-point operations per matrix; 4 R^2 F + 34 R^3 where
    `has_exact_grams`. Then the steps run on Y = X X' alone, Y <- p(Y) Y p(Y), and X is multiplied
    once by the product of all p(Y): the same function, as polynomials of one matrix commute, 2 to 7
    times as fast on a CPU.

    Args:
        matrices: Matrices.
        scales: Number by which each result is multiplied; None for 1.

    Source: https://arxiv.org/abs/2409.20325; the coefficients are those of
    https://arxiv.org/abs/2602.12429.
    """
    x: Tensor = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp_min(tiny(matrices))
    is_tall = x.shape[-2] > x.shape[-1]
    if has_exact_grams(x):
        # The product is symmetric: it stands on either side, and X is never transposed in memory.
        product = _product_of_polynomials(x.mT @ x if is_tall else x @ x.mT)
        if scales is not None:
            product *= scales[..., None, None]
        return x @ product if is_tall else product @ x
    x = x.mT if is_tall else x
    a, b, c = _COEFFICIENTS
    for _ in range(_NUM_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x  # a I + ... would lose digits in bfloat16
    x = x if scales is None else x * scales[..., None, None]
    return x.mT if is_tall else x


def has_exact_grams(matrices: Float[Tensor, "*N I O"]) -> bool:
    """Whether `orthogonalized` runs on Gram matrices: of long ones, if products are exact enough.

    An error of a Gram matrix grows up to 20,000 times: those of float32 come to 4e-4, but those of
    TF32 and bfloat16, which torch may multiply in where it is allowed to, would be all there is.
    """
    short, long = sorted(matrices.shape[-2:])
    has_exact_products = matrices.dtype == torch.float64 or (
        matrices.dtype == torch.float32 and is_exact(matrices.device)
    )
    return has_exact_products and 2 * long >= 3 * short


def _product_of_polynomials(gram: Float[Tensor, "*N R R"]) -> Float[Tensor, "*N R R"]:
    product = polynomial = _polynomial(gram)
    for _ in range(_NUM_NEWTON_SCHULZ_STEPS - 1):
        gram = polynomial @ gram @ polynomial
        polynomial = _polynomial(gram)
        product = polynomial @ product
    return product


def _polynomial(gram: Float[Tensor, "*N R R"]) -> Float[Tensor, "*N R R"]:
    a, b, c = _COEFFICIENTS
    if gram.ndim == 3:
        found = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    else:
        found = b * gram + c * (gram @ gram)
    found.diagonal(dim1=-2, dim2=-1).add_(a)
    return found


class FactorOptimizer(Optimizer):
    """Moves factors A and B as a subclass defines, dense matrices by Muon, all else by AdamW.

    Muon moves a dense matrix with the momentum M <- m M + G by ``-lr O(G + m M)``, where O is
    `orthogonalized`. Decay is decoupled, as in AdamW.

    Nothing is drawn and no rank needs another: equal gradients give equal steps. All state is a
    parameter's own, so that a checkpoint of some parameters is a part of a checkpoint of all.

    Where ``found_inf`` is set, as on torch's fused AdamW, a step at which it is 1 leaves all
    parameters as they are, whatever the gradients; but not the momenta.

    Args:
        groups: Parameter groups. One with ``is_low_rank`` True holds down, up, down, up, ... and
            may set ``momentum``, and ``expansion``, the alpha of `LowRankLinear`; with
            ``is_embedding`` True as well it holds table, up, table, up, ... One with ``is_dense``
            True holds dense matrices. The others are AdamW's, with ``betas`` and ``eps``.
        lr: Learning rate, where a group has none.
        momentum: m.
        betas: Decay rates of AdamW's averages.
        eps: The eps of AdamW.
        weight_decay: Decoupled weight decay, where a group has none.
        fused: Whether AdamW runs in one kernel.
        product_dtype: Dtype in which momenta are orthogonalized, but for long ones on a CPU; None
            for the parameters' own.

    Raises:
        ValueError: A group of factors has an odd number of parameters, or its neighbors are not
            factors of one layer.
        TypeError: A parameter is sharded: the products here need whole matrices.
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
            "is_embedding": False, "expansion": 0.0,
        }  # fmt: skip
        self.product_dtype = product_dtype
        self.found_inf: Tensor | None = None
        super().__init__(groups, defaults)
        for group in self.param_groups:
            self._check_group(group)

    def _check_group(self, group: dict[str, Any]) -> None:
        if any(isinstance(p, DTensor) for p in group["params"]):
            raise TypeError(f"{type(self).__name__} takes whole parameters, these are sharded")
        if group["is_low_rank"]:
            _check_factors(group["params"], group["is_embedding"])

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
        with faster_products():
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
        """One step of a group of factors."""
        raise NotImplementedError

    def _pairs(self, group: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Factors down and up of the layers of a group whose gradients are both there."""
        params = group["params"]
        pairs = zip(params[::2], params[1::2], strict=True)
        return [(down, up) for down, up in pairs if None not in (down.grad, up.grad)]

    def _step_dense(self, group: dict[str, Any]) -> None:
        moving = [p for p in group["params"] if p.grad is not None]
        steps = {p: torch.full((), group["lr"], dtype=p.dtype, device=p.device) for p in moving}
        self._step_along_momenta(moving, steps, group)

    def _step_along_momenta(
        self, moving: list[Tensor], steps: dict[Tensor, Tensor], group: dict[str, Any]
    ) -> None:
        if not moving:
            return
        self._add_gradients(moving, group["momentum"])
        torch._foreach_mul_(moving, self._unless_skipped(1 - group["lr"] * group["weight_decay"]))
        for some in batches(moving, lambda p: p.shape):
            self._move(some, torch.stack([steps[p] for p in some]), group["momentum"])

    def _unless_skipped(self, kept: float) -> Any:
        """A factor of weights that decay; 1 in a step that is skipped."""
        return kept if self.found_inf is None else torch.where(self.found_inf > 0, 1.0, kept)

    def _none_if_skipped_(self, moves: Tensor) -> Tensor:
        """Moves, set to 0 in place in a step that is skipped, whatever they are."""
        return moves if self.found_inf is None else moves.masked_fill_(self.found_inf > 0, 0)

    def _add_gradients(self, moving: list[Tensor], momentum: float) -> None:
        for p in moving:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in moving]
        torch._foreach_mul_(momenta, momentum)
        torch._foreach_add_(momenta, [p.grad for p in moving if p.grad is not None])

    def _nesterov(self, p: Tensor, momentum: float) -> Tensor:
        """G + m M of a parameter whose momentum has its gradient already."""
        assert p.grad is not None
        return p.grad.add(self.state[p]["momentum"], alpha=momentum)

    def _move(self, some: list[Tensor], steps_N: Float[Tensor, "N"], momentum: float) -> None:
        momenta = [self.state[p]["momentum"] for p in some]
        nesterov_NIO = torch.stack([p.grad for p in some if p.grad is not None])
        torch._foreach_add_(list(nesterov_NIO), momenta, alpha=momentum)
        moves_NIO = self._orthogonalized(nesterov_NIO, steps_N)
        torch._foreach_sub_(some, list(self._none_if_skipped_(moves_NIO)))

    def _orthogonalized(
        self, matrices_NIO: Float[Tensor, "N I O"], scales_N: Float[Tensor, "N"] | None = None
    ) -> Float[Tensor, "N I O"]:
        dtype = matrices_NIO.dtype
        if matrices_NIO.device.type == "cpu" and has_exact_grams(matrices_NIO):
            # Faster there than in bfloat16, and more exact.
            return orthogonalized(matrices_NIO, scales_N)
        found = orthogonalized(matrices_NIO.to(self.product_dtype or dtype)).to(dtype)
        return found if scales_N is None else found * scales_N[:, None, None]


def _check_factors(params: Sequence[Tensor], is_embedding: bool) -> None:
    if len(params) % 2:
        raise ValueError(f"a group of factors has {len(params)} parameters, which is odd")
    expected = "table (V, R) and up (D, R)" if is_embedding else "down (R, in) and up (out, R)"
    for index, (first, up) in enumerate(zip(params[::2], params[1::2], strict=True)):
        rank_axis = 1 if is_embedding else 0
        if first.ndim != 2 or up.ndim != 2 or first.shape[rank_axis] != up.shape[1]:
            raise ValueError(
                f"parameters {2 * index} and {2 * index + 1} of a group of factors are"
                f" {tuple(first.shape)} and {tuple(up.shape)}: not {expected}"
            )


def wide(matrices: Float[Tensor, "*N I O"]) -> Float[Tensor, "*N R F"]:
    """Matrices as they are or transposed, with no more rows than columns."""
    return matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT


def batches(params: Sequence[Tensor], kind: Callable[[Tensor], Hashable]) -> Iterator[list[Tensor]]:
    """Parameters of one kind, dtype and device, a bounded number of them at a time."""
    by_kind: dict[Any, list[Tensor]] = {}
    for p in params:
        by_kind.setdefault((kind(p), p.dtype, p.device), []).append(p)
    for alike in by_kind.values():
        at_a_time = max(1, _NUMBERS_AT_A_TIME // alike[0].numel())
        for first in range(0, len(alike), at_a_time):
            yield alike[first : first + at_a_time]


def tiny(like: Tensor) -> float:
    """The smallest normal number of a tensor's dtype."""
    return torch.finfo(like.dtype).tiny
