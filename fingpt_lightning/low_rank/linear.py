"""Linear layers that keep their weight as a product of two thin matrices.

Axes: I in_features, O out_features, R rank.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fingpt_lightning.low_rank.factorize import Factors, factorize
from fingpt_lightning.low_rank.initialization import Initialization, initial_factors

FACTOR_ACTIVATIONS = ("none", "silu")


class LowRankLinear(nn.Module):
    """The map x -> x D' U' + b, with R (I + O) weights in place of I O.

    With an ``expansion`` it is x -> z U' + c expand(z) + b, where z = x D', expand repeats the R
    numbers of z to O (the last time in part) and c = expansion / sqrt(ceil(O / R)): a way from x
    past U for the gradient. U + c [1; 1; ...] does the same alone: `fold` makes it so.

    With a guide W, a dense matrix that starts as the product, it is a x W' + (1 - a) x D' U' + b in
    training mode: as long as the share a falls from 1 to 0, W learns first and the factors with it
    what they can. In evaluation mode a guide does nothing: that is the layer it will leave.

    Args:
        in_features: I.
        out_features: O. A layer that makes query, key and value at once has O = 3 I and shares
            one ``down`` among the three.
        rank: R, in [1, min(I, O)].
        bias: Whether the layer has a bias b.
        activation: Function applied to z before U: ``none`` or ``silu``, with which the layer is
            not a linear map and no single matrix can stand for it.
        expansion: The alpha of the expansion; 0 for none.

    Raises:
        ValueError: ``rank`` is outside [1, min(I, O)], ``activation`` is unknown, or both it and
            ``expansion`` are requested.

    Source: https://arxiv.org/abs/2402.13533, section 3 (their A is ``down``, their B is ``up``);
    https://arxiv.org/abs/2502.10940 (``silu``); https://arxiv.org/abs/2606.28932 (``expansion``);
    https://arxiv.org/abs/2406.16450 (guide: their self-guided training).
    """

    guide: nn.Parameter | None
    guide_share: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        activation: str = "none",
        expansion: float = 0.0,
    ) -> None:
        super().__init__()
        if activation not in FACTOR_ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is none of {FACTOR_ACTIVATIONS}")
        if activation != "none" and expansion:
            raise ValueError(f"expansion {expansion} cannot be folded behind {activation}")
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank {rank} is outside [1, {min(in_features, out_features)}]")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.activation, self.expansion = activation, expansion
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.empty(out_features, rank))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.register_parameter("guide", None)
        self.register_buffer("guide_share", None, persistent=False)
        if self.down.device.type != "meta":
            self.reset_parameters(in_features**-0.5)

    @classmethod
    def from_dense(
        cls, weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None, rank: int
    ) -> "LowRankLinear":
        """The layer of the given rank nearest to a dense one.

        Args:
            weight: The dense weight.
            bias: Its bias, copied.
            rank: R, in [1, min(I, O)].
        """
        return cls.from_factors(factorize(weight.detach(), rank), bias)

    @classmethod
    def from_factors(cls, factors: Factors, bias: Float[Tensor, "O"] | None) -> "LowRankLinear":
        """The layer of these factors.

        Args:
            factors: Factors, used without a copy.
            bias: Bias of the layer, copied.
        """
        (out_features, rank), (_, in_features) = factors.up.shape, factors.down.shape
        with torch.device("meta"):
            layer = cls(in_features, out_features, rank, bias=bias is not None)
        layer.up, layer.down = nn.Parameter(factors.up), nn.Parameter(factors.down)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    @torch.no_grad()
    def reset_parameters(
        self,
        std: float,
        generator: torch.Generator | None = None,
        initialization: Initialization = Initialization.SVD,
    ) -> None:
        """Draws the factors anew; the bias becomes 0.

        Args:
            std: Standard deviation of the numbers of a dense weight in the layer's place.
            generator: Generator of the draws, on the layer's device.
            initialization: Method by which the factors follow from it.
        """
        factors = initial_factors(
            initialization, self.in_features, self.out_features, self.rank, std, generator,
            self.up.device,
        )  # fmt: skip
        self.up.copy_(factors.up)
        self.down.copy_(factors.down)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        """Cost: 2 R (I + O) floating-point operations per row; the dense layer takes 2 I O."""
        z = F.linear(x, self.down)
        if self.activation == "silu":
            z = F.silu(z)
        up = self._folded_up() if self.expansion else self.up
        if self.guide is None or self.guide_share is None or not self.training:
            return F.linear(z, up, self.bias)
        # A tensor of no axes takes the dtype of y, and compiled code does not change with it.
        y = self.guide_share * F.linear(x, self.guide) + (1 - self.guide_share) * F.linear(z, up)
        # Added once: torch 2.13 cannot take the backward pass apart (zero-bubble schedules) where
        # two products of one input read the same parameter.
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def add_guide(self) -> None:
        """Sets a trained dense matrix beside the factors: their product, with a share of 1.

        Memory: O I numbers and the optimizer's state for them, until `drop_guide`.

        Raises:
            ValueError: The factors have an activation between them, so that no matrix is their map.
        """
        self.guide = nn.Parameter(self.product())
        self.guide_share = torch.ones_like(self.up[0, 0], requires_grad=False)

    def drop_guide(self) -> None:
        """Leaves the factors alone, as a layer that was never guided."""
        self.guide = self.guide_share = None

    @torch.no_grad()
    def fold(self) -> None:
        """Takes the expansion into ``up``: the layer stays the same map, without it."""
        self.up.copy_(self._folded_up())
        self.expansion = 0.0

    def product(self, dtype: torch.dtype | None = None) -> Float[Tensor, "O I"]:
        """The weight of the dense layer that is the same map.

        Args:
            dtype: Dtype of product and result; None for the factors' own.

        Raises:
            ValueError: No such layer exists: the factors have an activation between them.
        """
        if self.activation != "none":
            raise ValueError(
                f"a low-rank layer with {self.activation} between its factors is not a linear map,"
                " so no dense layer can take its place"
            )
        return self._folded_up().detach().to(dtype) @ self.down.detach().to(dtype)

    def _folded_up(self) -> Tensor:
        return folded_up(self.up, self.expansion)

    def extra_repr(self) -> str:
        """The sizes, for ``print(network)``."""
        sizes = f"{self.in_features}, {self.out_features}, rank={self.rank}"
        activation = "" if self.activation == "none" else f", activation={self.activation}"
        return sizes + activation + (f", expansion={self.expansion}" if self.expansion else "")


def folded_up(up: Float[Tensor, "O R"], expansion: float) -> Float[Tensor, "O R"]:
    """``up`` with the expansion of a `LowRankLinear` taken into it."""
    if not expansion:
        return up
    out_features, rank = up.shape
    repeats = -(-out_features // rank)
    identity = torch.eye(rank, dtype=up.dtype, device=up.device)
    folded: Tensor = up + expansion / repeats**0.5 * identity.repeat(repeats, 1)[:out_features]
    return folded
