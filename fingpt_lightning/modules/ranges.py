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
    check_from_0_or_share("the steps", warmup=warmup)
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


def check_from_0_or_share(of: str, **numbers: int | float) -> None:
    """Raises unless integers are 0 or above and floats, which are shares ``of``, in [0, 1]."""
    for name, number in numbers.items():
        if isinstance(number, float) and not 0 <= number <= 1:
            raise ValueError(f"{name} {number} is outside [0, 1] (a share of {of})")
        if number < 0:
            raise ValueError(f"{name} {number} is below 0")


def check_from_1_or_share(of: str, **numbers: int | float) -> None:
    """Raises unless integers are 1 or above and floats, which are shares ``of``, in (0, 1]."""
    for name, number in numbers.items():
        if isinstance(number, float) and not 0 < number <= 1:
            raise ValueError(f"{name} {number} is outside (0, 1] (a share of {of})")
        if not isinstance(number, float) and number < 1:
            raise ValueError(f"{name} {number} is below 1")


def check_compression(compression: float) -> None:
    """Raises unless a compression, all parameters of the dense network over those stored, is one.

    Raises:
        ValueError: It is below 1 or not finite.
    """
    _check_finite("compression", compression)
    if compression < 1:
        raise ValueError(f"compression {compression} is below 1 (dense over stored parameters)")


def _check_finite(name: str, number: float) -> None:
    if not math.isfinite(number):
        raise ValueError(f"{name} {number} is not a finite number")
