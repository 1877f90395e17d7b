"""Lightning strategies: how one model is trained on several devices."""

from fingpt_lightning.strategies.fully_sharded import FullySharded

__all__ = ["FullySharded"]
