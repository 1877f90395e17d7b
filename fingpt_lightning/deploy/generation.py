"""Texts that continue prompts."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fingpt_lightning.deploy.adapter_bank import AdapterBank
from fingpt_lightning.deploy.sampling import Sampler, Sampling
from fingpt_lightning.models.decoding import decode, end_tokens_of, greedy
from fingpt_lightning.models.families import max_positions
from fingpt_lightning.models.formats.tokenizer import check_tokens
from fingpt_lightning.tasks.encoding import encode_message, end_tokens


class Prompt(NamedTuple):
    """The beginning of a text, and the name of the adapter that continues it; None is the base."""

    text: str
    adapter: str | None = None


class Completion(NamedTuple):
    """The text that a network wrote after a prompt.

    ``has_ended`` is whether it ended by itself, before the maximum number of tokens was written.
    """

    prompt: Prompt
    text: str
    num_tokens: int
    has_ended: bool


def complete(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    num_new: int,
    *,
    sampling: Sampling | None = None,
    batch_size: int = 8,
    bank: AdapterBank | None = None,
) -> Iterator[tuple[int, Completion]]:
    """Continues each prompt; yields the number of the prompt and its text, batch by batch.

    Prompts of like length share a batch, whatever their adapters. All are checked first.

    Args:
        network: Network in evaluation mode.
        tokenizer: Tokenizer of the network.
        prompts: Prompts to continue.
        num_new: Largest number of tokens that are written to each.
        sampling: Settings of the draws; None takes the most likely token.
        batch_size: Number of prompts that are run together.
        bank: Bank of the network, with the adapters that prompts name.

    Raises:
        ValueError: A prompt has no token, does not fit the network's positions with ``num_new``
            more, or names an adapter that is not loaded.
        FloatingPointError: While writing, a logit is NaN or infinite.
    """
    tokens = _prompt_tokens(network, tokenizer, prompts, num_new)
    for prompt in prompts:
        if prompt.adapter is not None:
            if bank is None:
                raise ValueError(f"prompt for adapter {prompt.adapter!r}: no adapters are loaded")
            bank.check(prompt.adapter)
    return _completed(network, tokenizer, prompts, tokens, num_new, sampling, batch_size, bank)


def _completed(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    tokens: Sequence[list[int]],
    num_new: int,
    sampling: Sampling | None,
    batch_size: int,
    bank: AdapterBank | None,
) -> Iterator[tuple[int, Completion]]:
    ends = end_tokens_of(network, *end_tokens(tokenizer))
    order = sorted(range(len(prompts)), key=lambda row: -len(tokens[row]))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        names = [prompts[row].adapter for row in batch]
        with nullcontext() if bank is None else bank.rows(names):
            written = decode(
                network,
                [tokens[row] for row in batch],
                num_new,
                end_tokens=ends,
                choose=greedy if sampling is None else Sampler(sampling, batch),
                names=[f"prompt {row + 1}" for row in batch],
            )
        for row, new in zip(batch, written, strict=True):
            text = _text_after(tokenizer, tokens[row], new)
            yield row, Completion(prompts[row], text, len(new), len(new) < num_new)


def _prompt_tokens(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    num_new: int,
) -> list[list[int]]:
    num_positions = max_positions(network.config)
    found = []
    for number, prompt in enumerate(prompts, start=1):
        tokens = encode_message(tokenizer, prompt.text)
        if not tokens:
            raise ValueError(f"prompt {number} is empty, and the tokenizer begins no text")
        if len(tokens) + num_new > num_positions:
            raise ValueError(
                f"prompt {number} has {len(tokens)} tokens; with max_new_tokens {num_new} that is"
                f" beyond the model's {num_positions} positions"
            )
        check_tokens(tokenizer, [tokens], network.config.vocab_size, f"prompt {number}")
        found.append(tokens)
    return found


def _text_after(tokenizer: PreTrainedTokenizerFast, prompt: list[int], new: list[int]) -> str:
    # Tokens are not decoded alone: some tokenizers drop the blank before the first.
    before = str(tokenizer.decode(prompt, skip_special_tokens=True))
    whole = str(tokenizer.decode(prompt + new, skip_special_tokens=True))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(new, skip_special_tokens=True))
