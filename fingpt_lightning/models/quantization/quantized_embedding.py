"""A token embedding and the head tied to it, kept in 4 or 8 bits.

Axes: V vocabulary, D width, R rank, K columns of the table (R where it is factorized, else D).
"""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fingpt_lightning.low_rank import LowRankEmbedding
from fingpt_lightning.low_rank.embedding import HeadFactors
from fingpt_lightning.models.quantization.frozen_matrix import FrozenMatrix, row_chunks
from fingpt_lightning.models.quantization.layers import quantized_matrix


class QuantizedEmbedding(nn.Module):
    """Row ``ids`` of a quantized table, times up' where it is factorized.

    Only the requested rows are dequantized.

    Args:
        table: Layer from K to V features without bias, a `FrozenMatrix`.
        up: Layer from R to D features without bias, a `FrozenMatrix`; None for a full table.
        dtype: Dtype of the result.
    """

    def __init__(self, table: nn.Module, up: nn.Module | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.table, self.up, self.dtype = table, up, dtype
        last = cast("FrozenMatrix", table if up is None else up)
        self.num_embeddings = cast("FrozenMatrix", table).out_features
        self.embedding_dim = last.in_features if up is None else last.out_features

    @classmethod
    def of(
        cls, embedding: nn.Embedding | LowRankEmbedding, quantize: str, device: torch.device
    ) -> "QuantizedEmbedding":
        """The quantized form of an embedding.

        Args:
            embedding: Embedding, whose dtype becomes that of the products.
            quantize: ``nf4`` or ``int8``.
            device: Device of the quantized embedding.
        """
        if isinstance(embedding, LowRankEmbedding):
            table = quantized_matrix(embedding.table, quantize, device)
            up = quantized_matrix(embedding.up, quantize, device)
            return cls(table, up, embedding.table.dtype)
        table = quantized_matrix(embedding.weight, quantize, device)
        return cls(table, None, embedding.weight.dtype)

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch D"]:
        """Cost: a gather of K numbers per token, and 2 R D operations where it is factorized."""
        rows = cast("FrozenMatrix", self.table).rows(ids.reshape(-1), self.dtype)
        rows = rows.reshape(*ids.shape, -1)
        return rows if self.up is None else cast("Tensor", self.up(rows))

    @torch.no_grad()
    def dense_table(self) -> Float[Tensor, "V D"]:
        """The table of the plain embedding that does the same, multiplied out in float64."""
        table = cast("FrozenMatrix", self.table).values(torch.float64)
        if self.up is None:
            return table
        return table @ cast("FrozenMatrix", self.up).values(torch.float64).T


class QuantizedHead(nn.Module):
    """Logits from the very table of a `QuantizedEmbedding`.

    The table is dequantized a few rows at a time, so that it never takes more than 4 or 8 bits per
    number and is multiplied while a core's cache holds it.

    Args:
        embedding: Embedding whose table it shares.
        own_up: Map (D, R) in place of the embedding's, which is not quantized.
    """

    def __init__(self, embedding: QuantizedEmbedding, own_up: nn.Parameter | None = None) -> None:
        super().__init__()
        self.table = embedding.table
        self.up = embedding.up if own_up is None else own_up

    def features(self, hidden: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch K"]:
        """The features that are multiplied with the table."""
        if self.up is None:
            return hidden
        if isinstance(self.up, nn.Parameter):
            return hidden @ self.up
        return hidden @ cast("FrozenMatrix", self.up).values(hidden.dtype)

    def forward(self, hidden: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """Cost: that of the head it was made of, and the table dequantized once."""
        features, table = self.features(hidden), cast("FrozenMatrix", self.table)
        if features.requires_grad and torch.is_grad_enabled():
            return F.linear(features, table.values(features.dtype))
        rows_NK = features.reshape(-1, features.shape[-1])
        logits_NV = rows_NK.new_empty(len(rows_NK), table.out_features)
        for first, values in row_chunks(table, rows_NK.dtype, rows_NK.device):
            torch.matmul(rows_NK, values.T, out=logits_NV[:, first : first + len(values)])
        return logits_NV.reshape(*hidden.shape[:-1], -1)

    def factors(self, hidden: Float[Tensor, "*batch D"]) -> HeadFactors:
        """See `head_factors`; the table is dequantized whole."""
        features = self.features(hidden)
        return HeadFactors(features, cast("FrozenMatrix", self.table).values(features.dtype))
