"""Bytes, counts and seconds as people read them, and what a device can do at best."""

import re
from typing import NamedTuple

MIB = 2**20
GIB = 2**30
GB = 10**9


def format_bytes(num_bytes: int | float) -> str:
    """Bytes in the largest binary unit that leaves at least one whole of it.

    >>> format_bytes(512), format_bytes(1.5 * GIB)
    ('512 B', '1.5 GiB')
    """
    return _scaled(num_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def format_count(count: int | float) -> str:
    """A number of things in thousands (K), millions (M), billions (B) or trillions (T).

    >>> format_count(124_439_808), format_count(999)
    ('124.4 M', '999')
    """
    return _scaled(count, 1000, ("", "K", "M", "B", "T"))


def format_duration(seconds: int | float) -> str:
    """Seconds in the two units that matter at that length.

    >>> format_duration(0.0123), format_duration(59.96), format_duration(7384)
    ('12.3 ms', '1 min 00 s', '2 h 03 min')
    """
    if round(1000 * seconds, 1) < 1000:
        return f"{1000 * seconds:.1f} ms"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        return "{} min {:02d} s".format(*divmod(round(seconds), 60))
    if round(seconds / 60) < 24 * 60:
        return "{} h {:02d} min".format(*divmod(round(seconds / 60), 60))
    return "{} d {:02d} h".format(*divmod(round(seconds / 3600), 24))


def _scaled(value: int | float, base: int, units: tuple[str, ...]) -> str:
    if round(value) < base:
        return f"{value:.0f} {units[0]}".rstrip()
    power = 1
    while round(value / base**power, 1) >= base and power < len(units) - 1:
        power += 1
    return f"{value / base**power:.1f} {units[power]}"


class _Peak(NamedTuple):
    """A device's name, and its TFLOP/s; None where it has no unit for that type."""

    name: str
    fp32: float
    tf32: float | None
    fp16: float
    bf16: float | None


_PEAKS = (
    _Peak(r"V100-SXM[23].*", 15.7, None, 125, None),
    _Peak(r"V100-PCIE.*", 14.0, None, 112, None),
    _Peak(r"V100S-PCIE.*", 16.4, None, 130, None),
    _Peak(r"T4", 8.1, None, 65, None),
    _Peak(r"A10", 31.2, 62.5, 125, 125),
    _Peak(r"A30", 10.3, 82, 165, 165),
    _Peak(r"A40", 37.4, 74.8, 149.7, 149.7),
    _Peak(r"A100[- ](SXM|PCIE|PG509|\d+GB PCIe).*", 19.5, 156, 312, 312),
    _Peak(r"RTX A6000", 38.7, 77.4, 154.8, 154.8),
    _Peak(r"RTX 3090", 35.6, 35.6, 71, 71),
    _Peak(r"RTX 4090", 82.6, 82.6, 165.2, 165.2),
    _Peak(r"RTX 5090", 104.8, 104.8, 209.5, 209.5),
    _Peak(r"L4", 30.3, 60, 121, 121),
    _Peak(r"L40", 90.5, 90.5, 181, 181),
    _Peak(r"L40S", 91.6, 183, 362, 362),
    _Peak(r"H100 PCIe", 51.2, 378, 756, 756),
    _Peak(r"(H100|H200) NVL", 60, 417.5, 835.5, 835.5),
    _Peak(r"H100( 80GB HBM3|-SXM.*)|H200|GH200.*", 66.9, 494.7, 989.4, 989.4),
    _Peak(r"B200", 75, 1100, 2250, 2250),
    _Peak(r"GB200", 80, 1250, 2500, 2500),
)


def peak_flops_per_s(device_name: str, dtype_name: str) -> float | None:
    """The most a device can do by its data sheet, without sparsity, summing in fp32.

    A name must match as a whole: laptop versions, export versions and slices of a device (MIG)
    are slower than the device they are named after, and unknown here.

    Args:
        device_name: As ``torch.cuda.get_device_name`` gives it.
        dtype_name: ``bf16``, ``fp16``, ``fp32`` (no tensor cores) or ``tf32``.

    Returns:
        FLOP/s, or None where the device is not in the table or lacks the type.

    Source: NVIDIA's data sheets of V100, T4, A10, A30, A40, A100, RTX A6000, L4, L40, L40S, H100,
    H200, HGX B200 and GB200 (halved where they count sparsity); appendix A of the GA102, Ada and
    RTX Blackwell architecture white papers (rows "with FP32 accumulate") for the GeForce cards.

    >>> peak_flops_per_s("NVIDIA A100-SXM4-80GB", "bf16")
    312000000000000.0
    >>> peak_flops_per_s("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16") is None
    True
    """
    model = re.sub(r"^(NVIDIA |Tesla |GeForce )+", "", device_name)
    if "MIG" in model or dtype_name not in ("fp32", "tf32", "fp16", "bf16"):
        return None
    for peak in _PEAKS:
        if re.fullmatch(peak.name, model):
            tflops: float | None = getattr(peak, dtype_name)
            return None if tflops is None else tflops * 1e12
    return None
