"""Numbers that are not finite: found where they come out, explained by where they come from."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def first_not_finite(module: nn.Module) -> str | None:
    """The name of the first weight or buffer with a NaN or an infinity; None where all are finite.

    The scales of weights that bitsandbytes quantized count as part of the weight.

    Cost: one pass over all numbers; meant for after a failure.
    """
    for name, tensor in _tensors(module):
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            return name
    return None


def check_stored(name: str, tensor: Tensor) -> None:
    """Checks that a stored tensor is one of floating-point numbers.

    Raises:
        ValueError: It holds integers, truth values or complex numbers, which a copy into a weight
            would convert without a word.
    """
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name} is stored as {kind}, a weight has floating-point numbers")


def check_finite(name: str, tensor: Tensor) -> None:
    """Checks the numbers of a stored tensor; costs one pass over them.

    Raises:
        ValueError: It does not hold floating-point numbers.
        FloatingPointError: One of them is NaN or infinite.
    """
    check_stored(name, tensor)
    if not tensor.isfinite().all():
        raise FloatingPointError(
            f"the tensor {name} holds a NaN or an infinity: its file is damaged, or the training"
            " that wrote it diverged"
        )


def check_network(network: nn.Module) -> None:
    """Checks all weights of a network; costs one pass over them.

    Raises:
        FloatingPointError: One is NaN or infinite; names the tensor.
    """
    if (name := first_not_finite(network)) is not None:
        check_finite(name, torch.tensor(float("nan")))


def to_finite(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A finite tensor in another dtype.

    Raises:
        FloatingPointError: A number is beyond the dtype's range.
    """
    converted = tensor.to(dtype)
    if not converted.isfinite().all():
        kind = str(dtype).removeprefix("torch.")
        largest = f"{float(tensor.abs().max()):.3g}"
        raise FloatingPointError(
            f"{name} has a number of {largest}, beyond {kind}; take bfloat16 or float32"
        )
    return converted


def not_finite(network: nn.Module, what: str) -> FloatingPointError:
    """The error to raise for numbers of a network that are NaN or infinite, with its likely cause.

    Args:
        network: Network that computed them.
        what: The numbers and the row that they belong to, such as ``row 3: the scores``.
    """
    dtype = _compute_dtype(network)
    is_half = dtype is torch.float16
    retry = "take bfloat16 or float32"
    if (name := first_not_finite(network)) is not None:
        cause = f"the tensor {name} holds a NaN or an infinity"
        advice = (
            f"it was beyond float16 ({retry}), or its file is damaged"
            if is_half
            else "its file is damaged, or the training that wrote it diverged"
        )
        return FloatingPointError(f"{what} are not finite: {cause}; {advice}")
    cause = f"all weights are finite, but activations overflow {str(dtype).removeprefix('torch.')}"
    advice = retry if is_half else "its weights are damaged, or the training diverged"
    return FloatingPointError(f"{what} are not finite: {cause}; {advice}")


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        yield name, parameter
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            for scale in (getattr(part, "absmax", None), getattr(part, "offset", None)):
                if isinstance(scale, Tensor):
                    yield name, scale
    yield from module.named_buffers()


def _compute_dtype(network: nn.Module) -> torch.dtype:
    first = next(network.parameters(), torch.empty(0))
    kind = first.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    # A quantized network has integers among its parameters.
    floats = (p.dtype for p in network.parameters() if p.is_floating_point())
    return next(floats, torch.get_default_dtype())
