"""Rounding of matrices in float64, number by number."""

from collections.abc import Callable

import torch
from torch import Tensor

# Source: https://arxiv.org/abs/2305.14314, appendix E.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def nearest_int8(weight: Tensor) -> Tensor:
    """Each number to the nearest of 255 multiples of its row's largest magnitude over 127."""
    made = torch.zeros(weight.shape, dtype=torch.float64)
    for row, numbers in enumerate(weight.double().tolist()):
        step = max(abs(number) for number in numbers) / 127
        for column, number in enumerate(numbers):
            made[row, column] = step * round(number / step) if step else 0.0
    return made


def nearest_nf4(weight: Tensor, block: int) -> Tensor:
    """Each number to the nearest of 16 levels times its block's largest magnitude."""
    made: list[float] = []
    numbers = weight.double().flatten().tolist()
    for first in range(0, len(numbers), block):
        part = numbers[first : first + block]
        scale = max(abs(number) for number in part)
        for number in part:
            levels = [scale * level for level in NF4_LEVELS]
            made.append(levels[min(range(16), key=[abs(x - number) for x in levels].__getitem__)])
    return torch.tensor(made, dtype=torch.float64).reshape(weight.shape)


def rounded_with_feedback(
    weight: Tensor, moments: Tensor, nearest: Callable[[Tensor, int], Tensor], damping: float
) -> Tensor:
    """Column after column: round, spread the error over the rest, take the column out of H^-1.

    Source: https://arxiv.org/abs/2208.11580, equations 3 and 4, for the columns in the order of
    falling moments.
    """
    diagonal = moments.diagonal().double()
    hessian = moments.double() + damping * diagonal.mean() * torch.eye(len(moments))
    inverse = torch.linalg.inv(hessian)
    left = weight.double().clone()
    order = sorted(range(len(moments)), key=lambda column: -float(diagonal[column]))
    for position, column in enumerate(order):
        value = nearest(left[:, column], column)
        error = (left[:, column] - value) / inverse[column, column]
        for other in order[position + 1 :]:
            left[:, other] -= error * inverse[column, other]
        left[:, column] = value
        removed = torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse = inverse - removed
    return left
