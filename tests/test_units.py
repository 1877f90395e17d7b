import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fingpt_lightning.units import (
    GIB,
    MIB,
    format_bytes,
    format_count,
    format_duration,
    peak_flops_per_s,
)

_SECONDS = {"ms": 1e-3, "s": 1, "min": 60, "h": 3600, "d": 86400}


def _read_back(text: str, base: int, units: tuple[str, ...]) -> tuple[float, float]:
    """The value that a text shows, and half of its last shown digit's worth."""
    number, _, unit = text.partition(" ")
    factor = base ** units.index(unit)
    half_digit = 0.05 if "." in number else 0.5
    return float(number) * factor, half_digit * factor


@given(num_bytes=st.integers(0, 900 * 2**40))
def test_bytes_read_back_to_half_a_shown_digit(num_bytes: int) -> None:
    shown, half_digit = _read_back(format_bytes(num_bytes), 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
    assert abs(shown - num_bytes) <= half_digit * (1 + 1e-9)


@given(count=st.integers(0, 10**15 - 10**12))
def test_counts_read_back_to_half_a_shown_digit_and_stay_below_1000(count: int) -> None:
    text = format_count(count)
    shown, half_digit = _read_back(text, 1000, ("", "K", "M", "B", "T"))
    assert abs(shown - count) <= half_digit * (1 + 1e-9)
    assert float(text.partition(" ")[0]) < 1000


@given(seconds=st.floats(0, 1e7))
def test_durations_read_back_to_half_their_smaller_unit(seconds: float) -> None:
    parts = re.findall(r"([\d.]+) (ms|s|min|h|d)", format_duration(seconds))
    shown = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    number, unit = parts[-1]
    assert abs(shown - seconds) <= (0.05 if "." in number else 0.5) * _SECONDS[unit] + 1e-9
    assert len(parts) <= 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (MIB - 1, "1.0 MiB"),
        (MIB, "1.0 MiB"),
        (2.66 * GIB, "2.7 GiB"),
        (2000 * 2**50, "2000.0 PiB"),
    ],
)
def test_bytes_carry_into_the_next_unit_and_end_at_the_largest(value: float, text: str) -> None:
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.99996, "1.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (3599.6, "1 h 00 min"),
        (86399, "1 d 00 h"),
        (90000, "1 d 01 h"),
    ],
)
def test_durations_carry_into_the_next_unit(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla T4", "fp32", 8.1),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A100-SXM4-40GB", "tf32", 156),
        ("NVIDIA A100 80GB PCIe", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA GeForce RTX 3090", "bf16", 71),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 5090", "fp16", 209.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "tf32", 494.7),
        ("NVIDIA B200", "bf16", 2250),
    ],
)
def test_peaks_are_those_of_the_data_sheets(name: str, dtype: str, tflops: float) -> None:
    peak = peak_flops_per_s(name, dtype)
    assert peak is not None
    assert math.isclose(peak, tflops * 1e12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA GeForce RTX 4090 D", "bf16"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16"),
        ("NVIDIA A10G", "bf16"),
        ("NVIDIA H20", "bf16"),
        ("Tesla V100-SXM2-16GB", "bf16"),
        ("Tesla T4", "tf32"),
        ("NVIDIA H200", "fp64"),
        ("NVIDIA H200", "name"),
        ("AMD Instinct MI300X", "bf16"),
    ],
)
def test_a_device_or_type_that_is_not_listed_has_no_peak(name: str, dtype: str) -> None:
    assert peak_flops_per_s(name, dtype) is None
