"""A token embedding and the head tied to it, kept as a product of two thin matrices.

Axes: V vocabulary, D width, R rank.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fingpt_lightning.low_rank.factorize import factorize


def _draw(table: Tensor, up: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Sets factors in place to those of a dense matrix drawn from N(0, std^2)."""
    dense = torch.empty(len(table), len(up), device=table.device)
    factors = factorize(dense.normal_(std=std, generator=generator), table.shape[1], torch.float32)
    table.copy_(factors.up)
    up.copy_(factors.down.T)


class LowRankEmbedding(nn.Module):
    """Row ``ids`` of ``table @ up'``: R (V + D) weights in place of V D.

    Args:
        num_embeddings: V.
        embedding_dim: D.
        rank: R, in [1, min(V, D)].

    Raises:
        ValueError: ``rank`` is outside [1, min(V, D)].

    Source: https://arxiv.org/abs/1909.11942, section 3.1 (factorized embedding).
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int) -> None:
        super().__init__()
        if not 1 <= rank <= min(num_embeddings, embedding_dim):
            raise ValueError(f"rank {rank} is outside [1, {min(num_embeddings, embedding_dim)}]")
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        self.table = nn.Parameter(torch.empty(num_embeddings, rank))
        self.up = nn.Parameter(torch.empty(embedding_dim, rank))
        if self.table.device.type != "meta":
            self.reset_parameters(0.02)

    @torch.no_grad()
    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Sets the factors to those of a dense V x D table drawn from N(0, std^2)."""
        _draw(self.table, self.up, std, generator)

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch D"]:
        """Cost: a gather of R numbers and 2 R D floating-point operations per token."""
        return F.linear(F.embedding(ids, self.table), self.up)

    def extra_repr(self) -> str:
        """The sizes, for ``print(network)``."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"


class HeadFactors(NamedTuple):
    """What a head multiplies: logits are ``features @ weight'``."""

    features: Float[Tensor, "*batch K"]
    weight: Float[Tensor, "V K"]


@runtime_checkable
class FactoredHead(Protocol):
    """A head that gives the two operands of its last product."""

    def factors(self, hidden: Float[Tensor, "*batch D"]) -> HeadFactors:
        """The last product of the head for these hidden states."""


class _ProductHead(nn.Module):
    """Logits ``h up table'``."""

    table: nn.Parameter
    up: nn.Parameter

    def forward(self, hidden: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """Cost: 2 R (D + V) floating-point operations per row; the dense head takes 2 D V."""
        return F.linear(hidden @ self.up, self.table)

    def factors(self, hidden: Float[Tensor, "*batch D"]) -> HeadFactors:
        """See `head_factors`."""
        return HeadFactors(hidden @ self.up, self.table)


class LowRankHead(_ProductHead):
    """Logits ``h up table'`` from the very parameters of a `LowRankEmbedding`."""

    def __init__(self, embedding: LowRankEmbedding) -> None:
        super().__init__()
        self.table, self.up = embedding.table, embedding.up


class OwnLowRankHead(_ProductHead):
    """Logits ``h up table'`` with factors of its own, beside an embedding that has others.

    Its table may be that of the embedding (`share_table`): only the map ``up`` is its own then.

    Args:
        in_features: D.
        out_features: V.
        rank: R, in [1, min(V, D)].

    Raises:
        ValueError: ``rank`` is outside [1, min(V, D)].
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank {rank} is outside [1, {min(in_features, out_features)}]")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.table = nn.Parameter(torch.empty(out_features, rank))
        self.up = nn.Parameter(torch.empty(in_features, rank))
        if self.table.device.type != "meta":
            self.reset_parameters(0.02)

    @torch.no_grad()
    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Sets the factors to those of a dense V x D head drawn from N(0, std^2)."""
        _draw(self.table, self.up, std, generator)

    def share_table(self, embedding: LowRankEmbedding) -> None:
        """Puts the embedding's table in the place of its own."""
        self.table = embedding.table

    def dense_weight(self) -> Float[Tensor, "V D"]:
        """The head's product, in float64."""
        return self.table.detach().double() @ self.up.detach().double().T

    def extra_repr(self) -> str:
        """The sizes, for ``print(network)``."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"


def head_factors(head: nn.Module, hidden: Float[Tensor, "*batch D"]) -> HeadFactors:
    """Takes a head up to its last, widest product, which a loss can then do in chunks.

    Args:
        head: A `FactoredHead` or a ``torch.nn.Linear`` without bias.
        hidden: The final hidden states.

    Raises:
        TypeError: The head is of another class or has a bias.
    """
    if isinstance(head, FactoredHead):
        return head.factors(hidden)
    if isinstance(head, nn.Linear) and head.bias is None:
        return HeadFactors(hidden, head.weight)
    raise TypeError(f"a head is a LowRankHead or a Linear without bias, not {head!r}")
