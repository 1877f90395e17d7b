"""Attention over rows that lie one behind the other, without padding, behind a shared beginning.

A packed sequence is made of groups: a beginning, and rows that all go on from it. A row attends to
its group's beginning and to itself; rows do not see each other. So the beginning, such as the
instruction of a task, passes through the network once, with gradients, and all but attention
computes on no padding. Position ids continue from the beginning in every row.

Axes: B batch, H heads, D features of a head, N packed tokens, R rows, T tokens of the longest row,
P tokens of the beginning.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "fingpt_packed"
"""The name under which transformers finds `packed_or_sdpa_attention`."""


class PackedGroup(NamedTuple):
    """Where a group lies in a packed sequence.

    Args:
        first: Its first token.
        num_shared: P; 0 where the rows share nothing.
        num_rows: R.
        row_length: T.
        slots: For each token of the rows, its place among ``R x T`` padded ones.
    """

    first: int
    num_shared: int
    num_rows: int
    row_length: int
    slots: Int64[Tensor, "n"]


def packed_group(first: int, num_shared: int, row_lengths: Sequence[int]) -> PackedGroup:
    """The group of rows of these lengths, the beginning not counted.

    Raises:
        ValueError: There is no row, or an empty one.

    >>> packed_group(0, num_shared=4, row_lengths=[1, 3]).slots.tolist()
    [0, 3, 4, 5]
    """
    if not row_lengths or min(row_lengths) < 1:
        raise ValueError(f"a group needs rows of a token or more, not {list(row_lengths)}")
    longest = max(row_lengths)
    slots = [row * longest + t for row, length in enumerate(row_lengths) for t in range(length)]
    return PackedGroup(first, num_shared, len(row_lengths), longest, torch.tensor(slots))


def use_packed_attention(network: PreTrainedModel) -> None:
    """Lets a network take ``packing``; without it the network computes as it did.

    Raises:
        ValueError: The network's attention is not torch's own or that of this module.
    """
    kind = network.config._attn_implementation
    if kind not in ("sdpa", "eager", IMPLEMENTATION):
        raise ValueError(f"attn_implementation {kind!r} takes no packed rows; load with 'sdpa'")
    network.set_attn_implementation(IMPLEMENTATION)


def run_packed(
    network: PreTrainedModel,
    input_ids: Int64[Tensor, "1 N"],
    position_ids: Int64[Tensor, "1 N"],
    packing: Sequence[PackedGroup],
) -> Float[Tensor, "1 N W"]:
    """The final hidden states of a packed sequence.

    Args:
        network: After `use_packed_attention`.
        input_ids: Of all groups.
        position_ids: Of all tokens in their own rows.
        packing: The groups, one behind the other, without a gap.
    """
    # A mask of four axes keeps transformers from making one; attention does not read it.
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    output = network.base_model(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=no_mask,
        use_cache=False,
        packing=tuple(packing),
    )
    return cast("Tensor", output.last_hidden_state)


def packed_or_sdpa_attention(
    module: nn.Module,
    query: Float[Tensor, "B H N D"],
    key: Float[Tensor, "B H_kv S D"],
    value: Float[Tensor, "B H_kv S D"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: tuple[PackedGroup, ...] | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B N H D"], None]:
    """An attention function for transformers: that of a packed sequence where ``packing`` is given.

    Raises:
        ValueError: Attention has dropout, which would differ between the rows of a beginning.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(f"attention dropout {dropout} is not supported over packed rows; set it 0")
    packed = [x[0].transpose(0, 1) for x in (query, key, value)]
    results = []
    for group in packing:
        begin = group.first + group.num_shared
        end = begin + len(group.slots)
        shared = [x_NHD[group.first : begin] for x_NHD in packed]
        rows = [_padded(x_NHD[begin:end], group) for x_NHD in packed]
        if group.num_shared:
            alone = [x[None] for x in shared]
            results.append(_attend(alone[0], alone[1], alone[2], None, scaling)[0])
            for i in (1, 2):
                before = shared[i].expand(group.num_rows, *shared[i].shape)
                rows[i] = torch.cat([before, rows[i]], 1)
        mask = _mask(group, query.device)
        out_RTHD = _attend(rows[0], rows[1], rows[2], mask, scaling)
        results.append(out_RTHD.flatten(0, 1).index_select(0, group.slots))
    return torch.cat(results)[None], None


def _padded(x_nHD: Tensor, group: PackedGroup) -> Tensor:
    empty = x_nHD.new_zeros(group.num_rows * group.row_length, *x_nHD.shape[1:])
    padded = empty.index_copy(0, group.slots, x_nHD)
    return padded.view(group.num_rows, group.row_length, *x_nHD.shape[1:])


def _mask(group: PackedGroup, device: torch.device) -> Tensor | None:
    """Each token to all of the beginning and its row up to itself, so to no padding before it."""
    if not group.num_shared:
        return None  # causal
    size = (group.row_length, group.num_shared + group.row_length)
    return torch.ones(size, dtype=torch.bool, device=device).tril(group.num_shared)


def _attend(
    query_BTHD: Tensor,
    key_BSHD: Tensor,
    value_BSHD: Tensor,
    mask: Tensor | None,
    scaling: float | None,
) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query_BTHD, key_BSHD, value_BSHD))
    # Repeated here, because torch's fast kernels take a mask or grouped heads, but not both.
    num_repeats = query.shape[1] // key.shape[1]
    if num_repeats > 1:
        key, value = (x.repeat_interleave(num_repeats, 1) for x in (key, value))
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling
    )
    return out.transpose(1, 2)


AttentionInterface.register(IMPLEMENTATION, packed_or_sdpa_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
