"""A conversation with a network, whose keys and values stay from one answer to the next."""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fingpt_lightning.deploy.sampling import Sampler, Sampling
from fingpt_lightning.deploy.written_text import WrittenText
from fingpt_lightning.models.decoding import end_tokens_of, greedy, run_prompts, write_on
from fingpt_lightning.models.families import max_positions
from fingpt_lightning.models.formats.tokenizer import check_tokens
from fingpt_lightning.models.key_value_cache import PreallocatedLayer, preallocated_cache
from fingpt_lightning.tasks.chat import template_of
from fingpt_lightning.tasks.encoding import encode_turns, end_tokens
from fingpt_lightning.tasks.examples import Turn

_CONTEXT, _MAX_NEW_TOKENS = 4096, 512
_SYSTEM, _USER, _ASSISTANT = "system", "user", "assistant"


class Exchange(NamedTuple):
    """A message and its answer."""

    message: str
    answer: str


class Chat:
    """A conversation with a network.

    Where a chat template is in use it renders the conversation; else that is one plain text, in
    which each message stands where the answer before it ended, on a new line. What the network has
    run of the text stays in memory as keys and values: of the next message only what follows the
    longest common beginning is run, whatever made the rest differ.

    Args:
        network: Network in evaluation mode.
        tokenizer: Tokenizer of the network.
        context: Largest number of tokens of conversation and answer together; None is 4096, or the
            network's positions where they are fewer.
        max_new_tokens: Largest number of tokens of an answer; None is 512, or a quarter of the
            context where that is less.
        sampling: Settings of the draws; None takes the most likely token.

    Raises:
        ValueError: The context is longer than the network's positions, or leaves no place for a
            message.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        context: int | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        num_positions = max_positions(network.config)
        if context is not None and context > num_positions:
            raise ValueError(f"context {context} is beyond the model's {num_positions} positions")
        self.context = min(_CONTEXT, num_positions) if context is None else context
        if max_new_tokens is None:
            max_new_tokens = max(1, min(_MAX_NEW_TOKENS, self.context // 4))
        if max_new_tokens >= self.context:
            raise ValueError(
                f"max_new_tokens {max_new_tokens} leaves no token of the context of {self.context}"
                " for a message"
            )
        self.max_new_tokens = max_new_tokens
        self.template = template_of(tokenizer)
        self.exchanges: list[Exchange] = []
        self.num_left_out = 0
        """Number of exchanges at the beginning that the network no longer sees."""
        self.num_run = 0
        """Number of tokens of the last message's prompt that were run: the others had been."""
        self._system: str | None = None
        self._network, self._tokenizer, self._sampling = network, tokenizer, sampling
        self._ends = end_tokens_of(network, *end_tokens(tokenizer))
        self._cache = preallocated_cache(network.config, self.context)
        self._layers = cast("list[PreallocatedLayer]", self._cache.layers)
        self._cached: list[int] = []

    @property
    def system(self) -> str | None:
        """The text that the conversation begins with."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text is not None and self.template is not None:
            # Some templates know no such turn: better now than at every message.
            self.template.render([[Turn(_SYSTEM, text), Turn(_USER, "?")]], opens_answer=True)
        self._system = text
        self.num_left_out = 0

    def reset(self) -> None:
        """Forgets all messages and answers; the system text stays."""
        self.exchanges.clear()
        self.num_left_out = 0

    def turns(self) -> list[Turn]:
        """The whole conversation, what the network no longer sees included."""
        return self._turns(self.exchanges)

    def ask(self, message: str, on_text: Callable[[str], object]) -> str:
        """Answers a message, which with its answer joins the conversation.

        Where the conversation with ``max_new_tokens`` more is longer than the context, its oldest
        exchanges are left out, one by one until it fits; the system text stays.

        Args:
            message: What the user says.
            on_text: Function that gets the parts of the answer while it is written.

        Returns:
            The whole answer.

        Raises:
            ValueError: The message alone does not fit, or the chat template cannot render it.
            KeyboardInterrupt: The answer was interrupted: what was written of it is kept as the
                answer; of a message without any nothing is.
            FloatingPointError: A logit is NaN or infinite.
        """
        prompt = self._fitted(message)
        new: list[int] = []
        text = WrittenText(self._tokenizer, prompt)
        try:
            self._write(prompt, new, lambda token: on_text(text.add(token)))
        except KeyboardInterrupt:
            text.finish()
            if text.text:
                self.exchanges.append(Exchange(message, text.text))
            raise
        finally:
            # Wherever it ended: these are in all layers.
            num_cached = min(layer.length for layer in self._layers)
            self._cached = [*prompt, *new][:num_cached]
        on_text(text.finish())
        self.exchanges.append(Exchange(message, text.text))
        return text.text

    @torch.no_grad()
    def _write(
        self, prompt: Sequence[int], new: list[int], on_token: Callable[[int], object]
    ) -> None:
        """Writes the tokens of an answer, each added to ``new`` before the next is made."""
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self._cached, prompt, strict=False))
        num_same = min(sum(1 for _ in same), len(prompt) - 1)  # the last gives the next token
        for layer in self._layers:
            layer.crop(num_same)
        self.num_run = len(prompt) - num_same
        device = self._network.device

        def take(written: Tensor) -> Tensor:
            token = int(written[0, -1])
            if token not in self._ends:
                new.append(token)
                on_token(token)
            return torch.zeros(1, dtype=torch.bool, device=device)

        sampling = self._sampling
        write_on(
            self._network,
            run_prompts(self._network, [prompt[num_same:]], self._cache),
            torch.tensor([len(prompt)], device=device),
            self._cache,
            self.max_new_tokens,
            end_tokens=self._ends,
            has_stopped=take,
            choose=greedy if sampling is None else Sampler(sampling, [len(self.exchanges)]),
            names=["the message"],
        )

    def _fitted(self, message: str) -> list[int]:
        """The tokens of the conversation with a message, as much of it as fits."""
        left_out = self.num_left_out
        largest = self.context - self.max_new_tokens
        while len(tokens := self._tokens(self.exchanges[left_out:], message)) > largest:
            if left_out == len(self.exchanges):
                raise ValueError(
                    f"the message has {len(tokens)} tokens with all around it; with max_new_tokens"
                    f" {self.max_new_tokens} that is beyond the context of {self.context}"
                )
            left_out += 1
        if not tokens:
            raise ValueError("the message is empty, and the tokenizer begins no text")
        check_tokens(self._tokenizer, [tokens], self._network.config.vocab_size, "the message")
        self.num_left_out = left_out
        return tokens

    def _tokens(self, exchanges: Sequence[Exchange], message: str) -> list[int]:
        if self.template is not None:
            turns = [*self._turns(exchanges), Turn(_USER, message)]
            return encode_turns(self._tokenizer, self.template, turns)
        lines = [] if self._system is None else [self._system]
        lines += [exchange.message + exchange.answer for exchange in exchanges]
        return list(self._tokenizer.encode("\n".join([*lines, message]), verbose=False))

    def _turns(self, exchanges: Sequence[Exchange]) -> list[Turn]:
        found = [] if self._system is None else [Turn(_SYSTEM, self._system)]
        for exchange in exchanges:
            found += [Turn(_USER, exchange.message), Turn(_ASSISTANT, exchange.answer)]
        return found
