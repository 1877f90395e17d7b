"""The one batch type of the project.

Axes: B batch, T tokens.
"""

from typing import NotRequired, Protocol, TypedDict, runtime_checkable

from jaxtyping import Int64
from torch import Tensor

from fingpt_lightning.models.packed_attention import PackedGroup
from fingpt_lightning.models.vocabulary_loss import IGNORED_LABEL

__all__ = ["IGNORED_LABEL", "KnowsBytes", "PreparesBatches", "TokenBatch"]


class TokenBatch(TypedDict):
    """Tokens and what each of them has to predict.

    ``labels[b, t]`` is the token after ``input_ids[b, t]``, or ``IGNORED_LABEL``: labels are
    aligned here, once, and never shifted again. With ``packing`` B is 1, and rows follow one
    another, after the prefix that they share.

    ``place`` numbers the rows of a split that is predicted for; -1 is a row that only fills up.
    ``supervised`` and ``compared`` are places in the flattened batch, prepared on the host: those
    with a label, and those where a network is compared with another.
    """

    input_ids: Int64[Tensor, "B T"]
    labels: Int64[Tensor, "B T"]
    position_ids: NotRequired[Int64[Tensor, "B T"]]
    place: NotRequired[Int64[Tensor, "B"]]
    packing: NotRequired[tuple[PackedGroup, ...]]
    supervised: NotRequired[Int64[Tensor, "N"]]
    compared: NotRequired[Int64[Tensor, "M"]]


@runtime_checkable
class KnowsBytes(Protocol):
    """A datamodule that knows how much text a token stands for."""

    def bytes_per_token(self, split: str) -> float | None:
        """UTF-8 bytes of a split's text over its tokens; None where they are not known."""


@runtime_checkable
class PreparesBatches(Protocol):
    """A module that adds to batches what its step would else have to ask the device for."""

    def prepared(self, batch: TokenBatch) -> TokenBatch:
        """The batch, still on the host, with what the step needs."""
