"""The one batch type of the project.

Axes: B batch, T tokens.
"""

from typing import NotRequired, TypedDict

from jaxtyping import Int64
from torch import Tensor

from fingpt_lightning.models.packed_attention import PackedGroup
from fingpt_lightning.models.vocabulary_loss import IGNORED_LABEL

__all__ = ["IGNORED_LABEL", "TokenBatch"]


class TokenBatch(TypedDict):
    """Tokens and what each of them has to predict.

    ``labels[b, t]`` is the token after ``input_ids[b, t]``, or ``IGNORED_LABEL``: labels are
    aligned here, once, and never shifted again. With ``packing`` B is 1, and rows follow one
    another, after the prefix that they share.
    """

    input_ids: Int64[Tensor, "B T"]
    labels: Int64[Tensor, "B T"]
    position_ids: NotRequired[Int64[Tensor, "B T"]]
    packing: NotRequired[tuple[PackedGroup, ...]]
