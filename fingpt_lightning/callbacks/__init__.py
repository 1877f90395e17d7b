"""An alias of the package ``callbacks``: the same names, the same classes.

Write new callbacks there, and name them here.
"""

from callbacks import (
    BestCheckpoint,
    CompressionMonitor,
    FinancialEvaluation,
    LastCheckpoint,
    LogLines,
    MemoryMonitor,
    PipelineTrace,
    PredictionWriter,
    RunSummary,
    ThroughputMonitor,
    TrainingProgress,
)

__all__ = [
    "BestCheckpoint",
    "CompressionMonitor",
    "FinancialEvaluation",
    "LastCheckpoint",
    "LogLines",
    "MemoryMonitor",
    "PipelineTrace",
    "PredictionWriter",
    "RunSummary",
    "ThroughputMonitor",
    "TrainingProgress",
]
