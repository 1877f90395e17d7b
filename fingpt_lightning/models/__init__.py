"""Hugging Face networks with low-rank layers, and the loss over the vocabulary."""

from fingpt_lightning.models.budget import model_budget
from fingpt_lightning.models.compilation import compile_blocks
from fingpt_lightning.models.gpt2 import PRESETS, GPT2Shape, build_gpt2, lay_out_gpt2
from fingpt_lightning.models.recompute import Recompute, recompute_blocks
from fingpt_lightning.models.vocabulary_loss import LossSums, vocabulary_loss

__all__ = [
    "PRESETS",
    "GPT2Shape",
    "LossSums",
    "Recompute",
    "build_gpt2",
    "compile_blocks",
    "lay_out_gpt2",
    "model_budget",
    "recompute_blocks",
    "vocabulary_loss",
]
