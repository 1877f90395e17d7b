"""Lightning callbacks that observe a run and keep its checkpoints.

``DISTRIBUTION`` distinguishes this package from any other one named ``callbacks``.
"""

from callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from callbacks.compression import CompressionMonitor
from callbacks.financial_evaluation import FinancialEvaluation
from callbacks.log_lines import LogLines
from callbacks.memory import MemoryMonitor
from callbacks.pipeline_trace import PipelineTrace
from callbacks.predictions import PredictionWriter
from callbacks.progress import TrainingProgress
from callbacks.summary import RunSummary
from callbacks.throughput import ThroughputMonitor

__all__ = [
    "DISTRIBUTION",
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

DISTRIBUTION = "fingpt-lightning"
