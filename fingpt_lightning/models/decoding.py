"""Writing text token by token, with a cache of keys and values.

Axes: B rows, T tokens of a prompt, S tokens that the last one could attend to, N new tokens, D
width, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from fingpt_lightning.low_rank.cpu_products import faster_products
from fingpt_lightning.models.decode_step import decode_step
from fingpt_lightning.models.families import logits_of
from fingpt_lightning.models.finite import not_finite
from fingpt_lightning.models.key_value_cache import preallocated_cache

Choose = Callable[[Tensor], Tensor]
"""Function from logits, one row per text, to the next token of each."""
HasStopped = Callable[[Tensor], Tensor]
"""Function from the new tokens of all rows so far to whether each row has ended."""


def greedy(logits: Float[Tensor, "B V"]) -> Int[Tensor, "B"]:
    """The likeliest token of each row."""
    return logits.argmax(1)


@torch.no_grad()
def decode(
    network: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    num_new: int,
    *,
    end_tokens: Sequence[int] = (),
    choose: Choose = greedy,
    cache: Cache | None = None,
    names: Sequence[str] | None = None,
) -> list[list[int]]:
    """Goes on with each prompt, all in one batch, for at most ``num_new`` tokens.

    Rows are padded on the right and keep their own positions: the rows beside it change no text.

    Args:
        network: Network in evaluation mode.
        prompts: Prompts of one token at least; with ``num_new`` they fit the network's positions.
        num_new: Number of new tokens, at least 1.
        end_tokens: Tokens that end a text, which stops before the first of them.
        choose: Function called with the logits of all rows, those of ended ones included.
        cache: Empty cache, in place of one with memory for just these rows.
        names: Name of each row in messages; None numbers them.

    Returns:
        The new tokens of each row.

    Raises:
        FloatingPointError: A logit is NaN or infinite: the row and the likely cause are named.
    """
    device = network.device
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    if cache is None:
        cache = preallocated_cache(network.config, longest + num_new)
    lengths_B = torch.tensor(lengths, device=device)
    allowed_BS = None
    if min(lengths) < longest:
        # A padding token lies behind its row, so that causal attention alone keeps it out of the
        # prompt; tokens written later must not see it.
        place_S = torch.arange(longest + num_new, device=device)
        allowed_BS = (place_S < lengths_B[:, None]) | (place_S >= longest)
    return write_on(
        network,
        run_prompts(network, prompts, cache),
        lengths_B,
        cache,
        num_new,
        allowed=allowed_BS,
        end_tokens=end_tokens,
        choose=choose,
        names=names,
    )


@faster_products()
def run_prompts(
    network: PreTrainedModel, prompts: Sequence[Sequence[int]], cache: Cache
) -> Float[Tensor, "B D"]:
    """The final hidden state of each prompt's last token; rows are padded on the right.

    Args:
        network: Network in evaluation mode.
        prompts: Prompts of one token at least.
        cache: Cache that takes their keys and values, those of padding included; a single prompt
            goes on from the tokens that are in it.
    """
    device, longest = network.device, max(map(len, prompts))
    ids_BT = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=device)
    output = network.base_model(input_ids=ids_BT, past_key_values=cache, use_cache=True)
    last_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    hidden: Tensor = output.last_hidden_state[torch.arange(len(prompts), device=device), last_B]
    return hidden


@torch.no_grad()
@faster_products()
def write_on(
    network: PreTrainedModel,
    hidden: Float[Tensor, "B D"],
    position: Int[Tensor, "B"],
    cache: Cache,
    num_new: int,
    *,
    allowed: Bool[Tensor, "B S"] | None = None,
    end_tokens: Sequence[int] = (),
    has_stopped: HasStopped | None = None,
    choose: Choose = greedy,
    names: Sequence[str] | None = None,
) -> list[list[int]]:
    """Goes on with texts that a network has run already.

    Args:
        network: Network in evaluation mode.
        hidden: Final hidden state of each row's last token.
        position: Position of each row's next token in its text.
        cache: Cache of all tokens before.
        num_new: Most tokens that are written.
        allowed: Tokens that each row attends to, of those in the cache and ``num_new`` more; None
            is all.
        end_tokens: End tokens as in `decode`.
        has_stopped: Function called after each token; nothing is written once all rows have
            stopped or ended, but tokens of rows that stopped before others stay.
        choose: Choice of tokens as in `decode`.
        names: Names of rows as in `decode`.

    Returns:
        The new tokens of each row.

    Raises:
        FloatingPointError: A logit is NaN or infinite, as in `decode`.
    """
    num_before = int(cache.get_seq_length())
    ends = torch.tensor(list(end_tokens), device=hidden.device, dtype=torch.long)
    has_ended_B = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    written: list[Tensor] = []
    for step in range(num_new):
        logits_BV = logits_of(network, hidden)
        is_finite_B = logits_BV.isfinite().all(1)
        if not is_finite_B.all():
            row = int(is_finite_B.int().argmin())
            name = f"row {row + 1}" if names is None else names[row]
            raise not_finite(network, f"{name}: the logits")
        token_B = choose(logits_BV)
        written.append(token_B)
        if len(ends):
            has_ended_B |= torch.isin(token_B, ends)
        if has_stopped is not None:
            has_ended_B |= has_stopped(torch.stack(written, 1))
        if has_ended_B.all():
            break
        if step < num_new - 1:
            seen = None if allowed is None else allowed[:, : num_before + step + 1]
            hidden = decode_step(network, token_B, position + step, cache, seen)
    return [_until(row, set(end_tokens)) for row in torch.stack(written, 1).tolist()]


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    found = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:found]


def end_tokens_of(network: PreTrainedModel, *more: int | None) -> tuple[int, ...]:
    """The tokens that end a text, by the network's generation config, and those of ``more``."""
    named = getattr(network.generation_config, "eos_token_id", None)
    ends = named if isinstance(named, list) else [named]
    return tuple(dict.fromkeys(token for token in (*ends, *more) if token is not None))
