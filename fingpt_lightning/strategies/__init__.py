"""Lightning strategies: how one model is trained on several devices."""

from fingpt_lightning.strategies.fully_sharded import FullySharded
from fingpt_lightning.strategies.pipeline import PipelineStrategy
from fingpt_lightning.strategies.watched import DataParallel

__all__ = ["DataParallel", "FullySharded", "PipelineStrategy"]
