"""Rows into batches: padded, packed without padding, or packed after their shared beginnings.

Axes: B rows, T tokens of the longest row, N tokens of all.
"""

from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fingpt_lightning.data.batch import IGNORED_LABEL, TokenBatch
from fingpt_lightning.models.packed_attention import packed_group


class Batching(StrEnum):
    """Layout of the rows of a batch; losses and gradients are equal, time and memory are not."""

    PADDED = "padded"
    """One below the other, B x T, padded on the right: the plain way."""
    PACKED = "packed"
    """One after the other, 1 x N, without padding."""
    SHARED_PREFIX = "shared_prefix"
    """Packed, and the beginning that the rows of a task share appears once."""


class Collate:
    """Makes a batch of rows.

    Args:
        batching: Layout of the rows.
        eos_token_id: Token id that pads rows.
        device_type: Type of the device that the batches are for.
    """

    def __init__(self, batching: Batching, eos_token_id: int, device_type: str = "cpu") -> None:
        self.batching = batching
        self.device_type = device_type
        self.eos_token_id = eos_token_id

    def __call__(self, rows: Sequence[dict[str, Tensor]]) -> TokenBatch:
        """The batch of rows with ``input_ids``, ``labels`` and ``task``."""
        if self.batching is Batching.PADDED:
            ids = pad_sequence([row["input_ids"] for row in rows], True, self.eos_token_id)
            labels = pad_sequence([row["labels"] for row in rows], True, IGNORED_LABEL)
            return {"input_ids": ids, "labels": labels}
        return _packed(rows, self.batching is Batching.SHARED_PREFIX, self.device_type)


def _packed(rows: Sequence[dict[str, Tensor]], shares_prefix: bool, device_type: str) -> TokenBatch:
    groups: dict[int, list[dict[str, Tensor]]] = {}
    for row in rows:
        groups.setdefault(int(row["task"]), []).append(row)
    ids: list[Tensor] = []
    labels: list[Tensor] = []
    positions: list[Tensor] = []
    packing = []
    first = 0
    for group in groups.values():
        # So that attention pads little; sums over a batch do not depend on the order.
        group.sort(key=lambda row: len(row["input_ids"]))
        num_shared = _num_shared(group) if shares_prefix else 0
        ids += [
            group[0]["input_ids"][:num_shared],
            *(row["input_ids"][num_shared:] for row in group),
        ]
        labels += [group[0]["labels"][:num_shared], *(row["labels"][num_shared:] for row in group)]
        lengths = [len(row["input_ids"]) for row in group]
        positions += [torch.arange(num_shared), *(torch.arange(num_shared, n) for n in lengths)]
        own = [length - num_shared for length in lengths]
        packing.append(packed_group(first, num_shared, own, device_type))
        first += num_shared + sum(own)
    return {
        "input_ids": torch.cat(ids)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat(positions)[None],
        "packing": tuple(packing),
    }


def _num_shared(rows: Sequence[dict[str, Tensor]]) -> int:
    """Tokens that all rows begin with, before any of them has a label."""
    if len(rows) == 1:
        return 0
    shortest = min(_num_unlabeled(row["labels"]) for row in rows)
    ids = torch.stack([row["input_ids"][:shortest] for row in rows])
    return int((ids == ids[0]).all(0).long().cumprod(0).sum())


def _num_unlabeled(labels: Tensor) -> int:
    """Tokens before the first label, except the last token."""
    labeled = (labels != IGNORED_LABEL).nonzero()
    return int(labeled[0]) if len(labeled) else len(labels) - 1
