"""The device and the dtype that a user names, and the memory that is free there."""

from pathlib import Path

import psutil
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


def dtype_remark(requested: str, dtype: str) -> str | None:
    """The line that says of ``auto`` what it came to, where results are not those of a CPU."""
    if requested != AUTO_DTYPE or dtype == "float32":
        return None
    return f"computed in {dtype}, as the GPU is fastest; --dtype float32 is as on a CPU"


_CGROUP = Path("/sys/fs/cgroup")
"""Where Linux says what the processes of a container may take, in its second version."""


def free_bytes(device: torch.device, cgroup: Path = _CGROUP) -> int:
    """Memory that is free for this process: on the host that of its container, where it is less.

    Args:
        device: Device, a GPU or the CPU.
        cgroup: Folder with the limits of the container.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        limit = (cgroup / "memory.max").read_text()
        used = int((cgroup / "memory.current").read_text())
        counts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except OSError:  # no container, or not by this version
        return free
    if limit.strip() == "max":
        return free
    # Pages of files that are no longer in use are given back before the limit counts.
    return max(0, min(free, int(limit) - used + int(counts.get("inactive_file", 0))))
