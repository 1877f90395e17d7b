"""Spectron's step for the factors of one layer, in float64, written from the paper's formulas."""

import torch
from torch import Tensor


class SpectronReference:
    """Factors and their momenta; singular values come from a decomposition, not from an iteration.

    Source: https://arxiv.org/abs/2602.12429.
    """

    def __init__(self, down: Tensor, up: Tensor) -> None:
        self.factors = [down.detach().clone().double(), up.detach().clone().double()]
        self.momenta = [torch.zeros_like(factor) for factor in self.factors]

    def step(
        self,
        gradients: list[Tensor],
        lr: float,
        momentum: float,
        decay: float,
        more: float = 0.0,
        adjusts: bool = False,
    ) -> None:
        """Moves both factors.

        Args:
            gradients: Gradients of both factors.
            lr: Learning rate.
            momentum: Momentum.
            decay: Weight decay.
            more: Number added to the bound's denominator.
            adjusts: Whether steps are multiplied by sqrt(max(1, rows / columns)).
        """
        norms = [float(torch.linalg.svdvals(factor)[0]) for factor in self.factors]
        bound = lr / (sum(norms) + more + 1)
        for index, gradient in enumerate(gradients):
            self.momenta[index] = momentum * self.momenta[index] + gradient
            direction = newton_schulz(gradient + momentum * self.momenta[index])
            rows, columns = direction.shape
            factor = max(1, rows / columns) ** 0.5 if adjusts else 1
            kept = (1 - lr * decay) * self.factors[index]
            self.factors[index] = kept - bound * factor * direction


def newton_schulz(matrix: Tensor) -> Tensor:
    """Its singular values after five steps of the quintic, its singular vectors as they were."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    result: Tensor = u @ torch.diag(s) @ vh
    return result
