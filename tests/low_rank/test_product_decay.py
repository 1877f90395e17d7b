from typing import Any

import torch

from fingpt_lightning.low_rank import LowRankLinear, decay_products


def test_decay_is_a_step_down_the_gradient_of_the_products_norm() -> None:
    layers = [LowRankLinear(11, 13, rank=5).double(), LowRankLinear(7, 11, rank=3).double()]
    pairs = [p for layer in layers for p in (layer.down, layer.up)]
    # Gradients of zero: the optimiser itself leaves everything where it is.
    groups: list[dict[str, Any]] = [
        {"params": pairs, "product_decay": 0.3},
        {"params": [torch.zeros(3)]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.0)
    decay_products(optimizer)
    squares = [(layer.up @ layer.down).square().sum() for layer in layers]
    penalty = 0.5 * torch.stack(squares).sum()
    gradients = torch.autograd.grad(penalty, pairs)
    truth = [p.detach() - 0.1 * 0.3 * g for p, g in zip(pairs, gradients, strict=True)]
    for p in pairs:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, expected in zip(pairs, truth, strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-14)
