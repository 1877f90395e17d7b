"""Causal self-attention as torch's kernels have not got it, and masks in the form networks take.

In bfloat16 on the CPU it is faster than torch's own and keeps less; with a cap on the scores, which
no kernel of torch knows, it is written out.

Axes: B batch, H heads, T tokens, S keys, D features of a head; G = B H; Q tokens of one block of
queries, K = tokens up to the end of that block.
"""

from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fingpt_lightning.models.families import capped, family_of

IMPLEMENTATION = "fingpt_blocked"
"""The name under which transformers finds `blocked_or_sdpa_attention` (``attn_implementation``)."""

MARKED = {IMPLEMENTATION}
"""Names of the attention functions that take `causal_marker`."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers in a config of transformers, and the keys of masks by kind."""

_BLOCK = 128


def causal_attention(
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B H T D"],
    value: Float[Tensor, "B H T D"],
    scale: float,
) -> Float[Tensor, "B H T D"]:
    """softmax(scale query key' + causal mask) value, block by block of queries.

    Matrix products of whole blocks run nearer to the machine's peak than torch's CPU kernel, and
    keys after a block are never multiplied. Scores are rounded to the inputs' dtype, as in
    transformers' eager attention; softmax and sums are wider inside. Memory: scores of
    ``B H 128 T``; for the backward pass only the three inputs are kept.

    Cost: 2 B H D T (T + 128) floating-point operations; the backward pass 2.5 times as many.
    Source: query blocks as in https://arxiv.org/abs/2205.14135, without its split over keys.
    """
    return cast("Tensor", _causal_attention(query, key, value, scale))


# An operator of torch's own kind: recomputation can name it, and compilers need not look inside.
@torch.library.custom_op("fingpt::causal_attention", mutates_args=())
def _causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    batch, heads, tokens, head_dim = query.shape
    query_GTD, key_GTD, value_GTD = (_joined(x) for x in (query, key, value))
    # Heads last but one, so that joining them again is a view.
    out_BTHD = query.new_empty(batch, tokens, heads, head_dim)
    for first in range(0, tokens, _BLOCK):
        end = min(first + _BLOCK, tokens)
        weights_GQK = _attention_weights(query_GTD[:, first:end], key_GTD[:, :end], scale)
        block_GQD = torch.bmm(weights_GQK, value_GTD[:, :end])
        out_BTHD[:, first:end] = block_GQD.view(batch, heads, -1, head_dim).transpose(1, 2)
    return out_BTHD.transpose(1, 2)


@torch.library.custom_op("fingpt::causal_attention_backward", mutates_args=())
def _causal_attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    query_GTD, key_GTD, value_GTD, grad_GTD = (_joined(x) for x in (query, key, value, grad_out))
    sum_dtype = torch.promote_types(query.dtype, torch.float32)
    grad_query_GTD = torch.empty_like(query_GTD)
    grad_key_GTD = torch.zeros_like(key_GTD, dtype=sum_dtype)
    grad_value_GTD = torch.zeros_like(value_GTD, dtype=sum_dtype)
    for first in range(0, query.shape[2], _BLOCK):
        end = min(first + _BLOCK, query.shape[2])
        query_GQD, grad_GQD = query_GTD[:, first:end], grad_GTD[:, first:end]
        weights_GQK = _attention_weights(query_GQD, key_GTD[:, :end], scale)
        grad_value_GTD[:, :end] += torch.bmm(weights_GQK.mT, grad_GQD)
        grad_weights_GQK = torch.bmm(grad_GQD, value_GTD[:, :end].mT)
        grad_scores_GQK = torch._softmax_backward_data(
            grad_weights_GQK, weights_GQK, -1, weights_GQK.dtype
        )
        grad_query_GTD[:, first:end] = torch.bmm(grad_scores_GQK, key_GTD[:, :end])
        grad_key_GTD[:, :end] += torch.bmm(grad_scores_GQK.mT, query_GQD)
    return (
        grad_query_GTD.mul_(scale).view_as(query),
        grad_key_GTD.mul_(scale).to(key.dtype).view_as(key),
        grad_value_GTD.to(value.dtype).view_as(value),
    )


def _joined(x: Tensor) -> Tensor:
    batch, heads, tokens, head_dim = x.shape
    return x.reshape(batch * heads, tokens, head_dim)


def _attention_weights(query_GQD: Tensor, key_GKD: Tensor, scale: float) -> Tensor:
    num_queries = query_GQD.shape[1]
    scores_GQK = torch.bmm(query_GQD * scale, key_GKD.mT)
    future_QQ = query_GQD.new_full((num_queries, num_queries), -torch.inf).triu_(1)
    scores_GQK[:, :, -num_queries:] += future_QQ
    return torch.softmax(scores_GQK, -1)


@_causal_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return torch.empty_like(query.transpose(1, 2).contiguous()).transpose(1, 2)


@_causal_attention_backward.register_fake
def _(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, ctx.scale = inputs
    ctx.save_for_backward(query, key, value)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return *_causal_attention_backward(grad_out, *ctx.saved_tensors, ctx.scale), None


_causal_attention.register_autograd(_backward, setup_context=_setup_context)
ATTENTION_OPERATOR = torch.ops.fingpt.causal_attention.default
"""`causal_attention` as recomputation sees it."""


def blocked_or_sdpa_attention(
    module: nn.Module,
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B H_kv S D"],
    value: Float[Tensor, "B H_kv S D"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B T H D"], None]:
    """An attention function for transformers: `causal_attention` where it is faster, else torch's.

    That is in bfloat16 on the CPU, for whole causal sequences without mask, dropout or cache; heads
    that share keys and values are given copies of them. In float32 torch's kernel is as fast. With
    a cap on the scores it is `capped_attention`.
    """
    attention_mask = without_marker(query, attention_mask)
    if softcap is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = capped_attention(query, key, value, attention_mask, scale, softcap, dropout)
        return out.transpose(1, 2), None
    # Autocast has attention in its dtype; a Llama's rotated queries and keys come in float32.
    is_cast = torch.is_autocast_enabled("cpu") and query.dtype == torch.float32
    dtype = torch.get_autocast_dtype("cpu") if is_cast else query.dtype
    applies = (
        query.device.type == "cpu"
        and dtype == torch.bfloat16
        and query.shape[2] == key.shape[2]
        and query.shape[2] > 1
        and attention_mask is None
        and dropout == 0
        and getattr(module, "is_causal", True)
    )
    if not applies:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (x.to(dtype) for x in (query, key, value))
    per_key = query.shape[1] // key.shape[1]
    if per_key > 1:
        key, value = (
            x.unsqueeze(2).expand(-1, -1, per_key, -1, -1).flatten(1, 2) for x in (key, value)
        )
    return causal_attention(query, key, value, scale).transpose(1, 2), None


def causal_marker(
    network: PreTrainedModel, input_ids: Int[Tensor, "B T"]
) -> Bool[Tensor, "1 1 1 1"] | None:
    """The mask that has our attention functions attend causally to whole rows, as None does.

    Given no mask, transformers looks into the positions for rows that hold several texts, which
    makes the host wait for the device in each forward pass. A mask of four axes is handed on as it
    is. This one has no numbers: it is known by its shape.

    Args:
        network: Network that the mask is for.
        input_ids: Tokens of the rows.

    Returns:
        None where another function attends, or a layer does not see the whole row.
    """
    config, num_tokens = network.config, input_ids.shape[1]
    sees_all = all(window is None or window >= num_tokens for window in layer_windows(config))
    if config._attn_implementation not in MARKED or num_tokens == 1 or not sees_all:
        return None
    return torch.empty(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)


def without_marker(query: Float[Tensor, "B H T D"], mask: Tensor | None) -> Tensor | None:
    """The mask that an attention function was given; None in place of `causal_marker`."""
    is_marker = mask is not None and mask.shape == (1, 1, 1, 1) and query.shape[2] > 1
    return None if is_marker else mask


def capped_attention(
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B H_kv S D"],
    value: Float[Tensor, "B H_kv S D"],
    mask: Tensor | None,
    scale: float,
    cap: float,
    dropout: float = 0.0,
) -> Float[Tensor, "B H T D"]:
    """softmax(cap tanh(scale query key' / cap) + mask) value.

    Args:
        query: Queries; ``H / H_kv`` heads in turn share keys and values.
        key: Keys.
        value: Values.
        mask: Truth values (True is seen) or summands of the scores, to broadcast over ``B H T S``;
            None is causal, the last query with the last key.
        scale: Factor of the scores.
        cap: Bound that the scores approach and never reach.
        dropout: Probability with which a weight is dropped.

    Memory: all scores, ``B H T S``. Softmax is in float32 or wider.
    Source: https://arxiv.org/abs/2408.00118, section 2.
    """
    num_tokens, num_keys = query.shape[2], key.shape[2]
    query = query.unflatten(1, (key.shape[1], -1))
    scores = query @ (key * scale).unsqueeze(2).mT
    scores = capped(scores, cap).flatten(1, 2)
    if mask is None:
        mask = torch.ones(num_tokens, num_keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(num_keys - num_tokens)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, -1, dtype=wide).to(value.dtype)
    weights = nn.functional.dropout(weights, dropout)
    mixed: Tensor = weights.unflatten(1, (key.shape[1], -1)) @ value.unsqueeze(2)
    return mixed.flatten(1, 2)


def layer_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """How many tokens each layer attends to, the token itself included; None is all before it.

    >>> from transformers import LlamaConfig
    >>> layer_windows(LlamaConfig(num_hidden_layers=2))
    (None, None)
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [SLIDING] * config.num_hidden_layers
    return tuple(window if kind == SLIDING else None for kind in kinds)


def attention_mask(
    network: PreTrainedModel, allowed: Bool[Tensor, "B 1 T S"]
) -> Tensor | dict[str, Tensor]:
    """The mask in the form that the network's attention takes, windows of layers included.

    Args:
        network: Network that the mask is for.
        allowed: Keys of each token's own text: all tokens before it in their order, and itself as
            the last one.

    Raises:
        ValueError: Its attention takes no mask of one's own.
    """
    config = network.config
    window = getattr(config, "sliding_window", None)
    full = _in_form(network, allowed)
    if window is None or set(layer_windows(config)) == {None}:
        return {FULL: full} if family_of(network).masks_by_kind else full
    # Of a text's n tokens the last is the query's own; a key's distance counts those behind it.
    behind = allowed.sum(-1, keepdim=True) - allowed.cumsum(-1)
    sliding = _in_form(network, allowed & (behind < window))
    return {FULL: full, SLIDING: sliding} if family_of(network).masks_by_kind else sliding


def _in_form(network: PreTrainedModel, allowed: Tensor) -> Tensor:
    kind = network.config._attn_implementation
    if kind == "eager":  # it adds the mask to the scores
        scores = torch.zeros(allowed.shape, dtype=network.dtype, device=allowed.device)
        return scores.masked_fill(~allowed, torch.finfo(network.dtype).min)
    if "flash" in kind or "flex" in kind or "paged" in kind:
        raise ValueError(f"attn_implementation {kind!r} takes no mask of trees; load with 'sdpa'")
    return allowed


AttentionInterface.register(IMPLEMENTATION, blocked_or_sdpa_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
