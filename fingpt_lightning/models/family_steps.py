"""One token more of each row through the layers of a family, without transformers around them.

Layers are called as they stand in the network, so that low-rank, quantized and adapted ones need
nothing of their own here.

Axes: B rows, S tokens so far and the new one, D width, H heads, G heads of queries that share
keys and values, F features of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache


def gpt2_step(
    body: Any, token_B: Tensor, position_B: Tensor, cache: Cache, allowed_BS: Tensor | None
) -> Tensor:
    """The final hidden states of a GPT-2; see `decode_step` for the arguments."""
    x_B1D = body.wte(token_B[:, None]) + body.wpe(position_B[:, None])
    mask = _summand(allowed_BS, x_B1D.dtype)
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


def llama_step(
    body: Any, token_B: Tensor, position_B: Tensor, cache: Cache, allowed_BS: Tensor | None
) -> Tensor:
    """The final hidden states of a Llama, or of a family that adds norms of queries and keys.

    See `decode_step` for the arguments.
    """
    x_B1D = body.embed_tokens(token_B[:, None])
    mask = _summand(allowed_BS, x_B1D.dtype)
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
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
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


def _summand(allowed_BS: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores: made once, where each layer would make it of truth values."""
    if allowed_BS is None:
        return None
    summand_BS = torch.zeros_like(allowed_BS, dtype=dtype).masked_fill_(~allowed_BS, -torch.inf)
    return summand_BS[:, None, None]
