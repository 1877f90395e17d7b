"""Lightning strategies: how one model is trained on several devices."""

from fingpt_lightning.strategies.fully_sharded import FullySharded
from fingpt_lightning.strategies.pipeline import PipelineStrategy

__all__ = ["FullySharded", "PipelineStrategy"]
