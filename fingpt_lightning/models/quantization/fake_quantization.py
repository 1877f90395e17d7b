"""Training with the weights that a quantized folder will have."""

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.low_rank import LowRankEmbedding, LowRankHead, LowRankLinear
from fingpt_lightning.models.families import family_of
from fingpt_lightning.models.quantization.rounding import rounded


class _Matrix(NamedTuple):
    parameter: nn.Parameter
    is_transposed: bool


class RoundedWeights:
    """Applies rounded values to a network's matrices for passes forward and back.

    Gradients taken meanwhile are those of the rounded weights, and an optimizer that steps after
    `restore` applies them to the weights themselves: the straight-through estimator, without a
    layer or a name changed. The rounded matrices and their values are exactly those that an export
    with quantized embeddings stores.

    Memory: one copy of the matrices. Cost: each is rounded at every `apply`.

    Args:
        network: Network, low-rank or dense, unquantized, or the part of one that a process holds.
        method: ``nf4`` or ``int8``.

    Source: https://arxiv.org/abs/1308.3432, section 3.
    """

    def __init__(self, network: PreTrainedModel, method: str) -> None:
        self._method = method
        self._matrices = list(_matrices(network))
        self._kept: list[Tensor] = []
        self.are_applied = False

    @property
    def kept_bytes(self) -> int:
        """Bytes of the weights themselves beside the rounded ones."""
        return sum(matrix.parameter.nbytes for matrix in self._matrices)

    @torch.no_grad()
    def apply(self) -> None:
        """Rounds the matrices in place; without effect where they are rounded already."""
        if self.are_applied:
            return
        if not self._kept:
            self._kept = [torch.empty_like(matrix.parameter) for matrix in self._matrices]
        for (parameter, is_transposed), kept in zip(self._matrices, self._kept, strict=True):
            kept.copy_(parameter)
            if is_transposed:
                parameter.copy_(rounded(parameter.T, self._method).T)
            else:
                parameter.copy_(rounded(parameter, self._method))
        self.are_applied = True

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the weights themselves back; without effect where they are there."""
        if not self.are_applied:
            return
        for matrix, kept in zip(self._matrices, self._kept, strict=True):
            matrix.parameter.copy_(kept)
        self.are_applied = False


def _matrices(network: PreTrainedModel) -> Iterator[_Matrix]:
    """What `quantize_layers` would quantize, embeddings included, each parameter once."""
    family, embedding = family_of(network), network.get_input_embeddings()
    seen = set[nn.Parameter]()
    for name, module in network.named_modules():
        found: list[_Matrix] = []
        match module:
            case LowRankLinear():
                found = [_Matrix(module.down, False), _Matrix(module.up, False)]
            case LowRankEmbedding() | LowRankHead():
                found = [_Matrix(module.table, False), _Matrix(module.up, False)]
            case Conv1D():
                found = [_Matrix(module.weight, True)]
            case nn.Linear() if not family.is_head(name) or network.config.tie_word_embeddings:
                found = [_Matrix(cast("nn.Parameter", module.weight), False)]
            case nn.Embedding() if module is embedding:
                found = [_Matrix(cast("nn.Parameter", module.weight), False)]
        # The last stage of a pipeline has a head of its own, tied to the first one's embedding.
        yield from (matrix for matrix in found if matrix.parameter not in seen)
        seen.update(matrix.parameter for matrix in found)
