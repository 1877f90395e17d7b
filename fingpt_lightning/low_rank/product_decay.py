"""Decay of the product of two factors, in place of each factor's own."""

from typing import Any

import torch
from torch.optim import Optimizer


def decay_products(optimizer: Optimizer) -> None:
    """Lets an optimizer decay ``up down`` in its groups that set ``product_decay``.

    After each step, with d = lr x product_decay,

        down <- down - d (up' up) down        up <- up - d up (down down')

    at once: a step down the gradient of d |up down|^2 / 2, beside the optimizer's own and not
    through its averages, as AdamW decays. Decay of each factor alone shrinks what the product
    needs and what it does not alike; here a direction decays as far as the product has it.
    Cost: 4 R^2 (in + out) floating-point operations per low-rank layer.

    Args:
        optimizer: Optimizer of any class. A group with ``product_decay`` holds down, up, down, up,
            ... and should set its own ``weight_decay`` to 0.

    Source: https://arxiv.org/abs/2105.01029 (Frobenius decay), there as a part of the loss.
    """
    optimizer.register_step_post_hook(_decay)


@torch.no_grad()
def _decay(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    found_inf = getattr(optimizer, "found_inf", None)
    for group in optimizer.param_groups:
        if decay := group.get("product_decay"):
            params = group["params"]
            for down, up in zip(params[::2], params[1::2], strict=True):
                gram_of_up, gram_of_down = up.T @ up, down @ down.T
                if found_inf is not None:  # the step was skipped where it is 1
                    gram_of_up *= 1 - found_inf
                    gram_of_down *= 1 - found_inf
                down.sub_(gram_of_up @ down, alpha=group["lr"] * decay)
                up.sub_(up @ gram_of_down, alpha=group["lr"] * decay)
