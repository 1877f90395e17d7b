"""LightningModules: a network to train with its loss, optimizer and schedule."""

from fingpt_lightning.modules.language_modeling import LanguageModelingModule
from fingpt_lightning.modules.low_rank_pretraining import LowRankPretraining
from fingpt_lightning.modules.quantized_finetuning import QuantizedFinetuning

__all__ = ["LanguageModelingModule", "LowRankPretraining", "QuantizedFinetuning"]
