"""The device that a user names."""

import torch

from fingpt_lightning.terminal.inputs import refuse_unknown_device


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
