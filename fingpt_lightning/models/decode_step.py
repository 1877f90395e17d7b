"""One token more of each row, through the layers themselves.

transformers' forward pass around them costs about as much at one token as the products of a small
low-rank network: masks, hooks, output classes.

Axes: B rows, S tokens so far and the new one, D width.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from fingpt_lightning.models.attention import IMPLEMENTATION as BLOCKED_ATTENTION
from fingpt_lightning.models.attention import attention_mask
from fingpt_lightning.models.families import family_of
from fingpt_lightning.models.packed_attention import IMPLEMENTATION as PACKED_ATTENTION

_PLAIN_ATTENTION = ("sdpa", BLOCKED_ATTENTION, PACKED_ATTENTION)


def decode_step(
    network: PreTrainedModel,
    token: Int[Tensor, "B"],
    position: Int[Tensor, "B"],
    cache: Cache,
    allowed: Bool[Tensor, "B S"] | None,
) -> Float[Tensor, "B D"]:
    """The final hidden state of each row's new token, which joins the cache.

    Args:
        network: Network in evaluation mode.
        token: New token of each row.
        position: Position of the token in the row's text.
        cache: Cache of the tokens before.
        allowed: Tokens of the cache, and the new one, that each row attends to; None is all.

    Raises:
        ValueError: The network's family is not supported.
    """
    config, family = network.config, family_of(network)
    is_plain = config._attn_implementation in _PLAIN_ATTENTION and family.is_plain(config)
    if family.decode_step is not None and is_plain:
        return family.decode_step(network.base_model, token, position, cache, allowed)
    mask = None if allowed is None else attention_mask(network, allowed[:, None, None])
    output = network.base_model(
        input_ids=token[:, None],
        position_ids=position[:, None],
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
    )
    hidden: Tensor = output.last_hidden_state[:, -1]
    return hidden
