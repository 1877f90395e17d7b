"""The device and the dtype that a user names, and the memory that is free there."""

import functools
import time
from pathlib import Path

import psutil
import torch

from fingpt_lightning.low_rank.cpu_products import faster_products
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
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices")
        return device
    try:
        torch.empty(0, device=device)
    except (ImportError, RuntimeError, AssertionError):  # by the kind, at length
        there = "cpu and cuda" if torch.cuda.is_available() else "cpu alone"
        raise ValueError(f"device {name!r} is not to be had here; there is {there}") from None
    return device


def find_dtype(name: str, device: torch.device, sizes: tuple[int, int] | None = None) -> str:
    """The dtype of that name; ``auto`` is bfloat16 where the device is faster in it, else float32.

    A GPU is from compute capability 8.0 on; older ones only imitate it. A CPU is asked, where it
    has instructions for it: see `bfloat16_speedup`.

    Args:
        name: Name of a dtype, or ``auto``.
        device: Device of the weights.
        sizes: In and out features of a product of the network; None, or sizes below 256, whose
            products cost nothing, leave a CPU at float32.
    """
    if name != AUTO_DTYPE:
        return name
    if device.type == "cuda":
        is_faster = torch.cuda.get_device_capability(device)[0] >= 8
    elif sizes is None or min(sizes) < _LEAST_FEATURES or not _has_bfloat16():
        is_faster = False
    else:
        is_faster = bfloat16_speedup(*sizes) >= _CLEARLY_FASTER
    return "bfloat16" if is_faster else "float32"


def device_name(device: torch.device) -> str:
    """The name of a GPU, or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


_LEAST_FEATURES = 256
_CLEARLY_FASTER = 1.2
"""Below it the default of a CPU stays exact."""


def _has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 by instructions of its own: AMX, or those of AVX-512."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


@functools.cache
@faster_products()
def bfloat16_speedup(in_features: int, out_features: int) -> float:
    """Time of a product of a batch of texts in float32 over that in bfloat16, on this CPU.

    It is measured once per process and takes a tenth of a second or less; the global random state
    is left as it is.

    Args:
        in_features: Features of the input; 2048 at most are multiplied.
        out_features: Features of the output, likewise.
    """
    stream = torch.Generator().manual_seed(0)
    columns, rows = min(in_features, 2048), min(out_features, 2048)
    x, weight = (torch.randn(size, columns, generator=stream) for size in (256, rows))
    times_s: dict[torch.dtype, float] = {}
    with torch.no_grad():
        for _ in range(5):  # the first warms up; the fastest is the one that was not disturbed
            for dtype in (torch.float32, torch.bfloat16):
                of_dtype = x.to(dtype), weight.to(dtype)
                started_s = time.perf_counter()
                torch.nn.functional.linear(*of_dtype)
                taken_s = time.perf_counter() - started_s
                times_s[dtype] = min(taken_s, times_s.get(dtype, taken_s))
    return times_s[torch.float32] / times_s[torch.bfloat16]


def dtype_remark(requested: str, dtype: str, device: torch.device) -> str | None:
    """The line that says of ``auto`` what it came to, where results are not those of float32."""
    if requested != AUTO_DTYPE or dtype == "float32":
        return None
    if device.type == "cuda":
        return f"computed in {dtype}, as the GPU is fastest; --dtype float32 is as on a CPU"
    return f"computed in {dtype}, in which this CPU was measured faster; --dtype float32 is exact"


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
        limit = (cgroup / "memory.max").read_text(encoding="utf-8")
        used = int((cgroup / "memory.current").read_text(encoding="utf-8"))
        stat = (cgroup / "memory.stat").read_text(encoding="utf-8")
        counts = dict(line.split() for line in stat.splitlines())
    except OSError:  # no container, or not by this version
        return free
    if limit.strip() == "max":
        return free
    # Pages of files that are no longer in use are given back before the limit counts.
    return max(0, min(free, int(limit) - used + int(counts.get("inactive_file", 0))))
