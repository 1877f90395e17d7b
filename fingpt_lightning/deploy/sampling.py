"""Drawing the next token.

Axes: B rows, V vocabulary.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the network's probabilities.

    Args:
        temperature: Divisor of the logits, above 0.
        top_k: Number of the most likely tokens that can be drawn; None is all.
        top_p: Joint probability of the most likely tokens, to which the draws are limited; None is
            all.
        seed: Seed of all draws.

    Raises:
        ValueError: A value outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} is not above 0; greedy needs none")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k} is below 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is outside (0, 1]")


def sampling_of(options: argparse.Namespace) -> Sampling | None:
    """The settings that `add_sampling_options` has read; None takes the most likely token."""
    if options.temperature is None:
        return None
    seed = 1 if options.seed is None else options.seed
    return Sampling(options.temperature, options.top_k, options.top_p, seed)


class Sampler:
    """Draws a token for each row of a batch, from a random stream of the row's own.

    So a text depends on the seed and on its place among the prompts, not on its batch.

    Args:
        sampling: Settings of the draws, the same for all rows.
        rows: Number of each row's prompt.
    """

    def __init__(self, sampling: Sampling, rows: Sequence[int]) -> None:
        self.sampling = sampling
        self._streams = [random.Random(f"{sampling.seed}/{row}") for row in rows]

    def __call__(self, logits: Float[Tensor, "B V"]) -> Int[Tensor, "B"]:
        """The next token of each row."""
        rule = self.sampling
        sorted_BV, order_BV = logits.double().sort(1, descending=True)
        # The likeliest is 0, so that no temperature makes an infinity of it.
        scores_BV = (sorted_BV - sorted_BV[:, :1]) / rule.temperature
        if rule.top_k is not None:
            scores_BV[:, rule.top_k :] = -torch.inf
        kept_BV = scores_BV.softmax(1)
        if rule.top_p is not None:
            before_BV = kept_BV.cumsum(1) - kept_BV
            kept_BV = kept_BV.masked_fill(before_BV >= rule.top_p, 0)
        sums_BV = kept_BV.cumsum(1)
        draws = [stream.random() for stream in self._streams]
        drawn_B1 = sums_BV[:, -1:] * sums_BV.new_tensor(draws)[:, None]
        place_B1 = torch.searchsorted(sums_BV, drawn_B1, right=True)
        # Rounding may put a draw at the very end, after the last token that can be drawn.
        last_B1 = (kept_BV > 0).sum(1, keepdim=True) - 1
        return order_BV.gather(1, place_B1.minimum(last_B1)).squeeze(1)
