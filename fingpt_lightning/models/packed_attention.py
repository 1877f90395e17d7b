"""Attention over rows that lie one behind the other, without padding, behind a shared beginning.

A packed sequence is made of groups: a beginning, and rows that all go on from it. A row attends to
its group's beginning and to itself; rows do not see each other. So the beginning, such as the
instruction of a task, passes through the network once, with gradients, and all but attention
computes on no padding. Position ids continue from the beginning in every row.

Axes: B batch, H heads, D features of a head, N packed tokens, R rows, T tokens of the longest row,
P tokens of the beginning.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from fingpt_lightning.models.attention import (
    MARKED,
    blocked_or_sdpa_attention,
    capped_attention,
    layer_windows,
)

IMPLEMENTATION = "fingpt_packed"
"""The name under which transformers finds `packed_or_sdpa_attention`."""

_CELLS_OF_A_CALL = {"cpu": 10_000, "cuda": 500_000}
"""Scores of all heads that one more call costs as much as, by device.

Measured with 9 heads on two cores. For CUDA on paper, not measured: the 40 kernels of a call and
its backward pass are started in 0.15 ms, in which 30 TFLOP/s compute half a million scores.
"""


KeysAndValues: TypeAlias = tuple[Tensor, Tensor]
"""What attention of one layer keeps of some tokens, with the axes heads, tokens, features."""


class PackedBucket(NamedTuple):
    """Consecutive rows of a group that attention pads to one length.

    Args:
        first: Index of the bucket's first token, counted from the group's first row.
        num_rows: R.
        row_length: T.
        slots: Place of each token of the rows among ``R x T`` padded ones.
    """

    first: int
    num_rows: int
    row_length: int
    slots: Int64[Tensor, "n"]


class PackedGroup(NamedTuple):
    """Where a group lies in a packed sequence.

    Args:
        first: Index of the group's first token.
        num_shared: Number of shared tokens P; 0 where the rows share nothing.
        buckets: Buckets of the group's rows.
    """

    first: int
    num_shared: int
    buckets: tuple[PackedBucket, ...]


def packed_group(
    first: int, num_shared: int, row_lengths: Sequence[int], device_type: str = "cpu"
) -> PackedGroup:
    """The group of rows of these lengths, the beginning not counted.

    Cheapest where the rows are sorted by length: its buckets then hold little padding.

    Args:
        first: Index of the group's first token.
        num_shared: Number of shared tokens; 0 where the rows share nothing.
        row_lengths: Number of tokens of each row, behind the shared ones.
        device_type: Type of the device that is to attend: on a GPU a further bucket pays later.

    Raises:
        ValueError: There are no rows, or one is empty.

    >>> group = packed_group(0, num_shared=4, row_lengths=[1, 3])
    >>> [bucket.slots.tolist() for bucket in group.buckets]
    [[0, 3, 4, 5]]
    """
    if not row_lengths or min(row_lengths) < 1:
        raise ValueError(f"a group needs rows of a token or more, not {list(row_lengths)}")
    buckets: list[PackedBucket] = []
    row = begin = 0
    of_a_call = _CELLS_OF_A_CALL.get(device_type, _CELLS_OF_A_CALL["cuda"])
    for num_rows in _bucket_sizes(num_shared, row_lengths, of_a_call):
        own = row_lengths[row : row + num_rows]
        longest = max(own)
        slots = [r * longest + t for r, length in enumerate(own) for t in range(length)]
        buckets.append(PackedBucket(begin, num_rows, longest, torch.tensor(slots)))
        row, begin = row + num_rows, begin + sum(own)
    return PackedGroup(first, num_shared, tuple(buckets))


def _bucket_sizes(num_shared: int, row_lengths: Sequence[int], of_a_call: int) -> list[int]:
    """Rows of each bucket, such that all together take the fewest operations."""
    cheapest = [0.0]  # of the first n rows
    starts = [0]  # of the last bucket then
    for end in range(1, len(row_lengths) + 1):
        longest, best, start = 0, math.inf, 0
        for row in range(end - 1, -1, -1):
            longest = max(longest, row_lengths[row])
            cells = (end - row) * longest * (num_shared + longest)
            if cells >= best:
                break  # with more rows it only grows
            cost = cheapest[row] + cells + of_a_call
            if cost < best:
                best, start = cost, row
        cheapest.append(best)
        starts.append(start)
    sizes: list[int] = []
    end = len(row_lengths)
    while end:
        sizes.append(end - starts[end])
        end = starts[end]
    return sizes[::-1]


def use_packed_attention(network: PreTrainedModel) -> None:
    """Lets a network take ``packing``; without it the network computes as with torch's attention.

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
    kept: list[KeysAndValues] | None = None,
) -> Float[Tensor, "1 N W"]:
    """The final hidden states of a packed sequence.

    Args:
        network: Network after `use_packed_attention`.
        input_ids: Tokens of all groups.
        position_ids: Positions of all tokens in their own rows.
        packing: Groups, one behind the other, without a gap.
        kept: List that gets the keys and values of all tokens, layer by layer.
    """
    # A mask of four axes keeps transformers from making one; attention does not read it.
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    output = network.base_model(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=no_mask,
        use_cache=False,
        packing=_Packing(packing, network),
        kept=kept,
    )
    return cast("Tensor", output.last_hidden_state)


class _Masked(NamedTuple):
    """A group and what its attention adds to the scores, made once for all layers of a kind."""

    group: PackedGroup
    of_shared: Tensor | None
    of_buckets: list[Tensor | None]


class _Packing:
    """Groups with their masks, by the window of a layer's attention.

    Not a tuple or dict: a compiler looks into those, and compiles anew where their lengths differ.
    """

    def __init__(self, groups: Sequence[PackedGroup], network: PreTrainedModel) -> None:
        windows = set(layer_windows(network.config))
        self._masked = {window: _masked(groups, network, window) for window in windows}

    def seen_within(self, window: int | None) -> tuple[_Masked, ...]:
        """The groups as a layer of this window attends to them."""
        return self._masked[window]


def _masked(
    packing: Sequence[PackedGroup], network: PreTrainedModel, window: int | None
) -> tuple[_Masked, ...]:
    masks = _Masks(packing, network, window)
    return tuple(
        _Masked(
            group,
            masks.of(group.num_shared, 0),
            [masks.of(bucket.row_length, group.num_shared) for bucket in group.buckets],
        )
        for group in packing
    )


class _Masks:
    """What is added to the scores of rows of any length behind beginnings of any length.

    All are parts of one, which is made on the device: whether a token sees another depends on the
    distance between them. Each is a copy, as kernels want their rows aligned.
    """

    def __init__(
        self, packing: Sequence[PackedGroup], network: PreTrainedModel, window: int | None
    ) -> None:
        config = network.config
        num_keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self._per_key = config.num_attention_heads // num_keys
        self._window = window
        self._most_shared = max(group.num_shared for group in packing)
        sizes = [bucket.row_length for group in packing for bucket in group.buckets]
        self._most_tokens = max(*sizes, self._most_shared)
        self._dtype = _working_dtype(network.dtype, network.device)
        self._device = network.device
        self._whole: Tensor | None = None
        self._made: dict[tuple[int, int], Tensor] = {}

    def of(self, num_tokens: int, num_shared: int) -> Float[Tensor, "T S"] | None:
        """The mask of rows of ``num_tokens``; None is causal, which kernels know."""
        num_seen = num_shared + num_tokens
        is_cut = self._window is not None and num_seen > self._window
        if not (num_shared or is_cut) and self._per_key == 1:
            return None
        if (num_tokens, num_shared) not in self._made:
            if self._whole is None:
                self._whole = self._all()
            first = self._most_shared - num_shared
            part = self._whole[:num_tokens, first : first + num_seen]
            self._made[num_tokens, num_shared] = part.repeat(self._per_key, 1)
        return self._made[num_tokens, num_shared]

    def _all(self) -> Tensor:
        shape = self._most_tokens, self._most_shared + self._most_tokens
        hidden = torch.full(shape, -torch.inf, dtype=self._dtype, device=self._device)
        future = hidden.triu(self._most_shared + 1)
        if self._window is not None:
            future += hidden.tril(self._most_shared - self._window)
        return future


def packed_or_sdpa_attention(
    module: nn.Module,
    query: Float[Tensor, "B H N D"],
    key: Float[Tensor, "B H_kv S D"],
    value: Float[Tensor, "B H_kv S D"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packing: _Packing | None = None,
    kept: list[KeysAndValues] | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B N H D"], None]:
    """An attention function for transformers: that of a packed sequence where ``packing`` is given.

    Raises:
        ValueError: Attention has dropout, which would differ between the rows of a beginning.
    """
    if packing is None:
        return blocked_or_sdpa_attention(
            module, query, key, value, attention_mask, dropout, scaling, softcap, **kwargs
        )
    if dropout:
        raise ValueError(f"attention dropout {dropout} is not supported over packed rows; set it 0")
    made = _attend_packed(query, key, value, packing, sliding_window, scaling, softcap, kept)
    return cast("Tensor", made), None


# What is compiled is before and after it: here the code would be another for each batch.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: _Packing,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
    kept: list[KeysAndValues] | None,
) -> Tensor:
    groups = packing.seen_within(window)
    if kept is not None:
        kept.append((key[0], value[0]))
    # Cut all at once: the backward pass of a slice is as long as the whole.
    sizes = [
        size
        for group, _, _ in groups
        for size in (group.num_shared, *(len(bucket.slots) for bucket in group.buckets))
    ]
    of_query, of_key, of_value = (x[0].transpose(0, 1).split(sizes) for x in (query, key, value))
    pieces = zip(of_query, of_key, of_value, strict=True)
    results = []
    for group, mask_of_shared, masks in groups:
        shared = next(pieces)
        if group.num_shared:
            alone = [x[None] for x in shared]
            results.append(_attend(alone, mask_of_shared, scaling, softcap)[0])
        for bucket, mask in zip(group.buckets, masks, strict=True):
            rows = [_padded(x_nHD, bucket) for x_nHD in next(pieces)]
            if group.num_shared:
                for i in (1, 2):
                    before = shared[i].expand(bucket.num_rows, *shared[i].shape)
                    rows[i] = torch.cat([before, rows[i]], 1)
            out_RTHD = _attend(rows, mask, scaling, softcap)
            results.append(_unpadded(out_RTHD, bucket))
    return torch.cat(results)[None]


def _working_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype of attention: on the CPU the backward kernel takes three times as long in 16 bits."""
    is_slow = device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if is_slow else dtype


def _padded(x_nHD: Tensor, bucket: PackedBucket) -> Tensor:
    size = bucket.num_rows * bucket.row_length
    if size > len(bucket.slots):
        x_nHD = x_nHD.new_zeros(size, *x_nHD.shape[1:]).index_copy(0, bucket.slots, x_nHD)
    return x_nHD.view(bucket.num_rows, bucket.row_length, *x_nHD.shape[1:])


def _unpadded(out_RTHD: Tensor, bucket: PackedBucket) -> Tensor:
    out_nHD = out_RTHD.flatten(0, 1)
    is_padded = len(out_nHD) > len(bucket.slots)
    return out_nHD.index_select(0, bucket.slots) if is_padded else out_nHD


def _attend(
    inputs: Sequence[Tensor],
    mask_TS: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Each token to all of the beginning and its row up to itself, so to no padding before it.

    Heads that share a key (K keys and values for H heads) stand below each other as if they were
    further tokens: torch's fast kernels take a mask or grouped heads, but not both, and repeated
    keys would be copies.
    """
    query_RTHD, key_RSKD, value_RSKD = inputs
    num_rows, num_tokens, num_heads, size = query_RTHD.shape
    num_keys = key_RSKD.shape[2]
    per_key = num_heads // num_keys
    query = query_RTHD.unflatten(2, (num_keys, per_key)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    key, value = key_RSKD.transpose(1, 2), value_RSKD.transpose(1, 2)
    dtype = _working_dtype(query.dtype, query.device)
    query_w, key_w, value_w = (x.to(dtype) for x in (query, key, value))
    if softcap is None:
        out = nn.functional.scaled_dot_product_attention(
            query_w,
            key_w,
            value_w,
            attn_mask=mask_TS,
            is_causal=mask_TS is None,
            scale=scaling,
        ).to(query.dtype)
    else:
        scale = size**-0.5 if scaling is None else scaling
        out = capped_attention(query_w, key_w, value_w, mask_TS, scale, softcap).to(query.dtype)
    out_RTKGD: Tensor = out.unflatten(2, (per_key, num_tokens)).permute(0, 3, 1, 2, 4)
    return out_RTKGD.reshape(num_rows, num_tokens, num_heads, size)


AttentionInterface.register(IMPLEMENTATION, packed_or_sdpa_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
MARKED.add(IMPLEMENTATION)
