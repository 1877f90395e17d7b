"""Float32 products on CPUs where torch's default library is slow at them.

torch multiplies float32 matrices with MKL, which on processors that are not Intel's leaves half of
AVX-512 unused. torch's other library, oneDNN, does not, but is used only where reduced precision
is allowed. So it is allowed, and only where none is lost by it: where a product that was tried came
out as exact as MKL's.
"""

import functools
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# oneDNN compiles the products of each triple of sizes and keeps 1024 of them, which it reads from
# here at the first one. Where each layer has a rank of its own, a pass takes hundreds for each
# number of tokens, and compiling them anew took half of its time.
if not {"ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"} & os.environ.keys():
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "16384"


class _Users:
    """How many are within `faster_products`, over all threads, and the setting before the first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.number = 0
        self.before = "none"


_USERS = _Users()


@contextmanager
def faster_products() -> Iterator[None]:
    """Within it float32 products on the CPU are oneDNN's where `has_faster_products`.

    They are equal to MKL's to rounding. The setting is the whole process's, and put back when the
    last thread has left; a function can be decorated with it.
    """
    if not has_faster_products():
        yield
        return
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _USERS.lock:
        if _USERS.number == 0:
            _USERS.before = settings.fp32_precision
            settings.fp32_precision = "bf16"
        _USERS.number += 1
    try:
        yield
    finally:
        with _USERS.lock:
            _USERS.number -= 1
            if _USERS.number == 0:
                settings.fp32_precision = _USERS.before


def is_exact(device: torch.device) -> bool:
    """Whether float32 products on a device are of float32, not of TF32 or bfloat16.

    Args:
        device: A CPU or a GPU.
    """
    # torch.get_float32_matmul_precision refuses to answer while a library has its own setting.
    backends: Any = torch.backends
    if device.type == "cpu":
        setting = backends.mkldnn.matmul.fp32_precision
        return setting in ("none", "ieee") or (_USERS.number > 0 and has_faster_products())
    return backends.cuda.matmul.fp32_precision in ("none", "ieee")


@functools.cache
def has_faster_products() -> bool:
    """Whether oneDNN's float32 products are known to be faster here, and found to be exact."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or _vendor() == "GenuineIntel":
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(256, 512, generator=stream)
    weight = torch.randn(384, 512, generator=stream)
    truth = x.double() @ weight.double().T
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        error = (x @ weight.T).double() - truth
    finally:
        settings.fp32_precision = before
    # Sixteen times float32's rounding; on processors with AMX it comes out at bfloat16's, 2**-9.
    return bool(error.norm() <= 2.0**-20 * truth.norm())


def _vendor() -> str:
    info = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not info.is_file():
        return "GenuineIntel"  # where nothing is known, torch's choice stands
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")
