"""Prompts run one behind the other, without padding, and the keys and values of each.

Axes: B prompts, N tokens of all, T tokens of one, H heads of keys and values, F features of a head,
D width.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from fingpt_lightning.models.packed_attention import KeysAndValues, packed_group, run_packed


class RunPrompts(NamedTuple):
    """Prompts that a network has run, in the order in which they were given.

    Args:
        hidden: Final hidden state of each prompt's last token.
        lengths: Number of tokens of each prompt.
        layers: Keys and values of all tokens, by layer.
        firsts: Place of each prompt's first token among them.
    """

    hidden: Float[Tensor, "B D"]
    lengths: list[int]
    layers: list[KeysAndValues]
    firsts: list[int]

    def keys_and_values(self, prompt: int) -> list[KeysAndValues]:
        """Each layer's keys and values of one prompt, of the axes ``H T F``."""
        first = self.firsts[prompt]
        own = slice(first, first + self.lengths[prompt])
        return [(keys[:, own], values[:, own]) for keys, values in self.layers]


def packed_order(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The order in which prompts lie behind each other: attention pads those of like length."""
    return sorted(range(len(prompts)), key=lambda place: len(prompts[place]))


def run_packed_prompts(network: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> RunPrompts:
    """Runs prompts in one forward pass, in which they do not see each other.

    Args:
        network: Network in evaluation mode, after
            `fingpt_lightning.models.packed_attention.use_packed_attention`.
        prompts: Prompts of one token at least.
    """
    device = network.device
    order = packed_order(prompts)
    lengths = [len(prompts[place]) for place in order]
    tokens = torch.tensor([token for place in order for token in prompts[place]], device=device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    group = packed_group(0, 0, lengths, device.type)
    layers: list[KeysAndValues] = []
    hidden_1ND = run_packed(network, tokens[None], positions[None], [group], layers)
    ends = dict(zip(order, accumulate(lengths), strict=True))
    last_B = torch.tensor([ends[place] - 1 for place in range(len(prompts))], device=device)
    own = [len(prompt) for prompt in prompts]
    firsts = [ends[place] - length for place, length in enumerate(own)]
    return RunPrompts(hidden_1ND[0, last_B], own, layers, firsts)
