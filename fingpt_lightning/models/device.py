"""The device and the dtype that a user names."""

import torch

from fingpt_lightning.terminal.inputs import refuse_unknown_device

AUTO_DTYPE = "auto"
"""The dtype that fits the device."""


def find_device(name: str | None) -> torch.device:
    """The device of that name; None is CUDA where there is one, else the CPU.

    Raises:
        ValueError: There is none of that name.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refuse_unknown_device(name)
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def find_dtype(name: str, device: torch.device) -> str:
    """The dtype of that name; ``auto`` is bfloat16 on a GPU that computes in it, else float32.

    Args:
        name: Name of a dtype, or ``auto``.
        device: Device of the weights.
    """
    if name != AUTO_DTYPE:
        return name
    # From compute capability 8.0 on; older ones only imitate it.
    has_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return "bfloat16" if has_bfloat16 else "float32"


def device_name(device: torch.device) -> str:
    """The name of a GPU, or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def dtype_remark(requested: str, dtype: str) -> str | None:
    """The line that says of ``auto`` what it came to, where results are not those of a CPU."""
    if requested != AUTO_DTYPE or dtype == "float32":
        return None
    return f"computed in {dtype}, as the GPU is fastest; --dtype float32 is as on a CPU"
