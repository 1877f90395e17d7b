"""Parameter groups and learning-rate schedules."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


def decay_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups for AdamW: matrices decay, biases and norms do not.

    Args:
        named_parameters: As of ``module.named_parameters()``; frozen ones are left out.
        weight_decay: Decay of every trained parameter of two or more axes.
    """
    trained = [(name, p) for name, p in named_parameters if p.requires_grad]
    groups = [
        {"params": [p for _, p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def cosine_with_warmup(
    num_steps: int, warmup_steps: int, final_ratio: float
) -> Callable[[int], float]:
    """The factor on the learning rate: a line up, then half a cosine down to ``final_ratio``.

    Args:
        num_steps: Optimiser steps of the whole run; later steps stay at ``final_ratio``.
        warmup_steps: Steps of the line; step 0 already has a rate above zero.
        final_ratio: The last factor, in [0, 1].

    >>> factor = cosine_with_warmup(num_steps=10, warmup_steps=2, final_ratio=0.1)
    >>> [round(factor(step), 3) for step in (0, 1, 2, 6, 10, 99)]
    [0.5, 1.0, 1.0, 0.55, 0.1, 0.1]
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
        return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor
