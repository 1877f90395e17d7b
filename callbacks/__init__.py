"""Lightning callbacks that observe a run: memory, throughput, compression, summary.

``DISTRIBUTION`` tells this package from any other one named ``callbacks``.
"""

from callbacks.compression import CompressionMonitor
from callbacks.memory import MemoryMonitor
from callbacks.summary import RunSummary
from callbacks.throughput import ThroughputMonitor

__all__ = [
    "DISTRIBUTION",
    "CompressionMonitor",
    "MemoryMonitor",
    "RunSummary",
    "ThroughputMonitor",
]

DISTRIBUTION = "fingpt-lightning"
