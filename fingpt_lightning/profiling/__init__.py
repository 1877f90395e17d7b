"""Measuring memory and speed in plain torch."""

from fingpt_lightning.profiling.host_memory import keep_freed_memory
from fingpt_lightning.profiling.memory import (
    LiveTensorBytes,
    ModuleMemory,
    module_memory,
    peak_rss_bytes,
    reset_peak_rss,
    storage_bytes,
)
from fingpt_lightning.profiling.throughput import measured_peak_flops_per_s

__all__ = [
    "LiveTensorBytes",
    "ModuleMemory",
    "keep_freed_memory",
    "measured_peak_flops_per_s",
    "module_memory",
    "peak_rss_bytes",
    "reset_peak_rss",
    "storage_bytes",
]
