"""Hugging Face networks with low-rank layers, and the loss over the vocabulary."""

from fingpt_lightning.models.budget import model_budget
from fingpt_lightning.models.compilation import compile_blocks
from fingpt_lightning.models.from_scratch import block_layers, build_network, lay_out_network
from fingpt_lightning.models.recompute import Recompute, recompute_blocks
from fingpt_lightning.models.shapes import PRESETS, GPT2Shape, LlamaShape
from fingpt_lightning.models.vocabulary_loss import LossSums, vocabulary_loss

__all__ = [
    "PRESETS",
    "GPT2Shape",
    "LlamaShape",
    "LossSums",
    "Recompute",
    "block_layers",
    "build_network",
    "compile_blocks",
    "lay_out_network",
    "model_budget",
    "recompute_blocks",
    "vocabulary_loss",
]
