"""One token more of each row, through the layers themselves.

transformers' forward pass around them costs about as much at one token as the products of a small
low-rank network: masks, hooks, output classes. Layers are called as they stand in the network, so
that low-rank, quantised and adapted ones need nothing of their own here.

Axes: B rows, S tokens so far and the new one, D width, H heads, G heads of queries that share
keys and values, F features of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from fingpt_lightning.models.attention import IMPLEMENTATION as BLOCKED_ATTENTION
from fingpt_lightning.models.attention import attention_mask

_PLAIN_ATTENTION = ("sdpa", BLOCKED_ATTENTION)


def decode_step(
    network: PreTrainedModel,
    token: Int[Tensor, "B"],
    position: Int[Tensor, "B"],
    cache: Cache,
    allowed: Bool[Tensor, "B S"] | None,
) -> Float[Tensor, "B D"]:
    """The final hidden state of each row's new token, which joins the cache.

    Args:
        network: A GPT-2 or Llama in evaluation mode.
        token: The new one of each row.
        position: Its place in the row's text.
        cache: Of the tokens before.
        allowed: Which tokens of the cache, and the new one, each row attends to; None is all.
    """
    kind = network.config._attn_implementation
    hidden: Tensor
    if kind in _PLAIN_ATTENTION and isinstance(network, GPT2LMHeadModel) and _is_usual(network):
        hidden = _gpt2_step(network.transformer, token, position, cache, allowed)
    elif kind in _PLAIN_ATTENTION and isinstance(network, LlamaForCausalLM):
        hidden = _llama_step(network.model, token, position, cache, allowed)
    else:
        mask = None if allowed is None else attention_mask(network, allowed[:, None, None])
        output = network.base_model(
            input_ids=token[:, None],
            position_ids=position[:, None],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        hidden = output.last_hidden_state[:, -1]
    return hidden


def _is_usual(network: GPT2LMHeadModel) -> bool:
    return not (network.config.reorder_and_upcast_attn or network.config.add_cross_attention)


def _gpt2_step(
    body: Any, token_B: Tensor, position_B: Tensor, cache: Cache, allowed_BS: Tensor | None
) -> Tensor:
    mask = None if allowed_BS is None else allowed_BS[:, None, None]
    x_B1D = body.wte(token_B[:, None]) + body.wpe(position_B[:, None])
    rows, _, width = x_B1D.shape
    for index, block in enumerate(body.h):
        attention = block.attn
        made = attention.c_attn(block.ln_1(x_B1D)).view(rows, 3, attention.num_heads, 1, -1)
        query, key, value = made.unbind(1)
        keys_BHSF, values_BHSF = cache.update(key, value, index)
        mixed = F.scaled_dot_product_attention(
            query, keys_BHSF, values_BHSF, mask, scale=attention.scaling
        )
        x_B1D = x_B1D + attention.c_proj(mixed.reshape(rows, 1, width))
        mlp = block.mlp
        x_B1D = x_B1D + mlp.c_proj(mlp.act(mlp.c_fc(block.ln_2(x_B1D))))
    hidden: Tensor = body.ln_f(x_B1D)[:, 0]
    return hidden


def _llama_step(
    body: Any, token_B: Tensor, position_B: Tensor, cache: Cache, allowed_BS: Tensor | None
) -> Tensor:
    mask = None if allowed_BS is None else allowed_BS[:, None, None]
    x_B1D = body.embed_tokens(token_B[:, None])
    rows = len(token_B)
    cos_B1F, sin_B1F = body.rotary_emb(x_B1D, position_ids=position_B[:, None])
    half = cos_B1F.shape[-1] // 2
    # sin with the sign of rotate_half, so that a rotation is two products and a roll.
    sin_B1F = torch.cat((-sin_B1F[..., :half], sin_B1F[..., half:]), -1)
    for index, layer in enumerate(body.layers):
        attention, mlp = layer.self_attn, layer.mlp
        h_B1D = layer.input_layernorm(x_B1D)
        query, key, value = (
            projection(h_B1D).view(rows, -1, attention.head_dim)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = (part * cos_B1F + part.roll(half, -1) * sin_B1F for part in (query, key))
        keys_BHSF, values_BHSF = cache.update(key[:, :, None], value[:, :, None], index)
        # The heads that share keys and values are so many queries of one head.
        query_BHGF = query.view(rows, keys_BHSF.shape[1], -1, attention.head_dim)
        mixed = F.scaled_dot_product_attention(
            query_BHGF, keys_BHSF, values_BHSF, mask, scale=attention.scaling
        )
        x_B1D = x_B1D + attention.o_proj(mixed.reshape(rows, 1, -1))
        h_B1D = layer.post_attention_layernorm(x_B1D)
        x_B1D = x_B1D + mlp.down_proj(mlp.act_fn(mlp.gate_proj(h_B1D)) * mlp.up_proj(h_B1D))
    hidden: Tensor = body.norm(x_B1D)[:, 0]
    return hidden
