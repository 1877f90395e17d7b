"""LoRA-Muon's step for one low-rank layer, in float64, written from the paper's formulas."""

import torch
from torch import Tensor

from tests.reference.spectron_step import newton_schulz


class LoRAMuonReference:
    """Factors and their momenta; roots of Gram matrices come from their eigenvalues.

    Source: https://arxiv.org/abs/2606.12921, algorithm 1.
    """

    def __init__(self, down: Tensor, up: Tensor) -> None:
        self.a, self.b = up.detach().clone().double(), down.detach().clone().double().T
        self.momenta = [torch.zeros_like(self.b), torch.zeros_like(self.a)]

    @property
    def factors(self) -> list[Tensor]:
        """The factors down and up."""
        return [self.b.T, self.a]

    def step(
        self,
        gradients: list[Tensor],
        lr: float,
        momentum: float,
        decay: float,
        expansion: Tensor | float = 0.0,
    ) -> None:
        """Moves both factors.

        Args:
            gradients: Gradients of the factors down and up.
            lr: Learning rate.
            momentum: Momentum.
            decay: Weight decay.
            expansion: Matrix that is a part of the weight beside ``up``.
        """
        moments = []
        for index, gradient in enumerate((gradients[0].T, gradients[1])):
            self.momenta[index] = momentum * self.momenta[index] + gradient
            moments.append(gradient + momentum * self.momenta[index])
        root_of_a, root_of_b = inverse_root(self.a + expansion), inverse_root(self.b)
        move_b = -lr / 2 * newton_schulz(moments[0] @ root_of_a) @ root_of_a
        move_a = -lr / 2 * newton_schulz(moments[1] @ root_of_b) @ root_of_b
        kept = (1 - decay * lr) ** 0.5
        self.a = kept * self.a + move_a / kept
        self.b = kept * self.b + move_b / kept


def inverse_root(factor: Tensor) -> Tensor:
    """The inverse square root of a factor's damped Gram matrix."""
    gram = factor.T @ factor
    values, vectors = torch.linalg.eigh(gram)
    values = values + 1e-5 * gram.square().sum().sqrt()
    result: Tensor = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    return result
