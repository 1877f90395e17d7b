"""Linear layers that keep their weight as a product of two thin matrices.

Axes: I in_features, O out_features, R rank.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fingpt_lightning.low_rank.factorize import factorize


class LowRankLinear(nn.Module):
    """The map x -> x D' U' + b, with R (I + O) weights in place of I O.

    Args:
        in_features: I.
        out_features: O. A layer that makes query, key and value at once has O = 3 I and shares
            one ``down`` among the three.
        rank: R, in [1, min(I, O)].
        bias: Whether b is there.

    Raises:
        ValueError: ``rank`` is outside [1, min(I, O)].

    Source: https://arxiv.org/abs/2402.13533, section 3 (their A is ``down``, their B is ``up``).
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank {rank} is outside [1, {min(in_features, out_features)}]")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.empty(out_features, rank))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
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
        out_features, in_features = weight.shape
        with torch.device("meta"):
            layer = cls(in_features, out_features, rank, bias=bias is not None)
        factors = factorize(weight.detach(), rank)
        layer.up, layer.down = nn.Parameter(factors.up), nn.Parameter(factors.down)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    @torch.no_grad()
    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Sets the factors to those of a dense weight drawn from N(0, std^2), the bias to 0."""
        dense = torch.empty(self.out_features, self.in_features, device=self.up.device)
        factors = factorize(dense.normal_(std=std, generator=generator), self.rank, torch.float32)
        self.up.copy_(factors.up)
        self.down.copy_(factors.down)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        """Cost: 2 R (I + O) floating-point operations a row; the dense layer takes 2 I O."""
        return F.linear(F.linear(x, self.down), self.up, self.bias)

    def extra_repr(self) -> str:
        """The sizes, for ``print(network)``."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"
