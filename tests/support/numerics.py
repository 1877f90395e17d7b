"""The comparison of three results: ours, plain torch and the truth."""

import torch
from torch import Tensor


def assert_no_worse(ours: Tensor, plain: Tensor, truth: Tensor, slack: float = 1.1) -> None:
    """Asserts that ours is as near the truth as plain torch in the same dtype.

    The error is the Frobenius norm of the whole difference: a permutation shows, and unlike the
    largest element's error it hardly depends on how single roundings fall. Half a unit in the last
    place of each true element is granted in any case, which no result of that dtype can avoid.

    Args:
        ours: Result under test.
        plain: Result of the obvious torch expression on the same inputs.
        truth: Value in float64.
        slack: Factor on the error of ``plain`` that ours may have.

    Raises:
        AssertionError: Ours has another shape or dtype than ``plain``, or a larger error.
        ValueError: The truth is not finite float64, so that nothing can be compared with it.
    """
    if truth.dtype != torch.float64 or not truth.isfinite().all():
        raise ValueError(f"truth must be finite float64, not {truth.dtype}")
    assert ours.shape == plain.shape == truth.shape, (ours.shape, plain.shape, truth.shape)
    assert ours.dtype == plain.dtype, (ours.dtype, plain.dtype)
    unavoidable = torch.finfo(ours.dtype).eps / 2 * truth.norm().item()
    our_error = (ours.double() - truth).norm().item()
    plain_error = (plain.double() - truth).norm().item()
    allowed = max(slack * plain_error, unavoidable)
    # Written so that a NaN in ours fails.
    assert our_error <= allowed, (
        f"error {our_error:.3e} is above {allowed:.3e} (plain torch: {plain_error:.3e}, "
        f"slack {slack}, norm of the truth {truth.norm().item():.3e})"
    )
