"""What numbers the settings of a module may be."""

import math


def check_optimization(
    *,
    learning_rate: float,
    final_learning_rate_ratio: float,
    warmup: int | float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    loss_chunk_size: int | None,
) -> None:
    """Raises unless the settings that all modules have are in their ranges.

    Raises:
        ValueError: One is not.
    """
    check_above_0(learning_rate=learning_rate)
    check_from_0(weight_decay=weight_decay)
    check_below_1(beta1=beta1, beta2=beta2)
    if warmup < 0 or (isinstance(warmup, float) and not warmup <= 1):
        raise ValueError(f"warmup {warmup} is neither a share in [0, 1] nor a number of steps")
    if not 0 <= final_learning_rate_ratio <= 1:
        raise ValueError(f"final_learning_rate_ratio {final_learning_rate_ratio} is outside [0, 1]")
    if loss_chunk_size is not None and loss_chunk_size < 1:
        raise ValueError(f"loss_chunk_size {loss_chunk_size} is below 1")


def check_above_0(**numbers: float) -> None:
    """Raises unless all are finite and above 0."""
    for name, number in numbers.items():
        _check_finite(name, number)
        if number <= 0:
            raise ValueError(f"{name} {number} is not above 0")


def check_from_0(**numbers: float) -> None:
    """Raises unless all are finite and 0 or above."""
    for name, number in numbers.items():
        _check_finite(name, number)
        if number < 0:
            raise ValueError(f"{name} {number} is below 0")


def check_below_1(**shares: float) -> None:
    """Raises unless all are in [0, 1)."""
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"{name} {share} is outside [0, 1)")


def _check_finite(name: str, number: float) -> None:
    if not math.isfinite(number):
        raise ValueError(f"{name} {number} is not a finite number")
