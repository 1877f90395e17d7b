"""Rounding of a matrix that hands the error of each column on to those that are not yet rounded.

Axes: O rows, I columns, B columns of a panel.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

DAMPING = 0.01
"""Share of the mean second moment, added to all: bounds the effect of a rare input on others."""
_PANEL = 128


@torch.no_grad()
def round_with_feedback(
    weight: Float[Tensor, "O I"],
    moments: Float[Tensor, "I I"],
    nearest: Callable[[Float[Tensor, "O"], int], Float[Tensor, "O"]],
    damping: float = DAMPING,
) -> Float[Tensor, "O I"]:
    """A matrix Q of representable numbers with small tr((W - Q) C (W - Q)').

    Column after column is rounded, the heaviest inputs first; what a column's rounding changes in
    the outputs, the columns still to come compensate as far as they can: with H = C + damping mean
    C_ii and the Cholesky factor U'U = H^-1, column j hands on (w_j - q_j) / U_jj times row j of U.

    Args:
        weight: W.
        moments: C, the second moments of the inputs.
        nearest: Function from a column and its place in W to the nearest representable numbers.
        damping: Share of the mean moment; more brings Q nearer to plain rounding.

    Source: GPTQ, https://arxiv.org/abs/2210.17323, algorithm 1, in the order of its ``act-order``.
    Cost: O(I^3 + O I^2) operations, half of the second part as products of panels.
    """
    num_columns = weight.shape[1]
    diagonal = moments.diagonal()
    order = diagonal.argsort(descending=True, stable=True).tolist()
    hessian = moments.double()[order][:, order]
    hessian.diagonal().add_(damping * float(diagonal.mean()) or 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    left = weight.detach().float()[:, order]
    made = torch.empty_like(left)
    for first in range(0, num_columns, _PANEL):
        end = min(first + _PANEL, num_columns)
        panel = left[:, first:end].T.contiguous()  # columns as rows: each is read as one piece
        factor = upper[first:end, first:end]
        errors = torch.empty_like(panel)
        for j in range(end - first):
            column = nearest(panel[j], order[first + j])
            made[:, first + j] = column
            errors[j] = (panel[j] - column) / factor[j, j]
            panel[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
        left[:, end:] -= errors.T @ upper[first:end, end:]
    back = torch.empty_like(made)
    back[:, order] = made
    return back
