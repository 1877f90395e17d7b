"""Pretrain and finetune financial language models in little memory and time.

The names below are imported when they are first used: the package alone imports nothing heavy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fingpt_lightning import callbacks
    from fingpt_lightning.data.instructions import FinancialInstructions
    from fingpt_lightning.data.text_blocks import TextBlocks
    from fingpt_lightning.decomposition.command import decompose
    from fingpt_lightning.deploy.export_command import export
    from fingpt_lightning.evaluation.command import evaluate
    from fingpt_lightning.low_rank.conversion import make_low_rank
    from fingpt_lightning.low_rank.embedding import LowRankEmbedding
    from fingpt_lightning.low_rank.linear import LowRankLinear
    from fingpt_lightning.models.loading import load_model
    from fingpt_lightning.models.recompute import recompute_blocks
    from fingpt_lightning.models.vocabulary_loss import vocabulary_loss
    from fingpt_lightning.modules.low_rank_pretraining import LowRankPretraining
    from fingpt_lightning.modules.quantized_finetuning import QuantizedFinetuning
    from fingpt_lightning.strategies.pipeline import PipelineStrategy

    __version__: str

__all__ = [
    "FinancialInstructions",
    "LowRankEmbedding",
    "LowRankLinear",
    "LowRankPretraining",
    "PipelineStrategy",
    "QuantizedFinetuning",
    "TextBlocks",
    "__version__",
    "callbacks",
    "decompose",
    "evaluate",
    "export",
    "load_model",
    "make_low_rank",
    "recompute_blocks",
    "vocabulary_loss",
]

# As above, for the interpreter; a test holds the two against each other.
_MODULES = {
    "FinancialInstructions": "data.instructions",
    "LowRankEmbedding": "low_rank.embedding",
    "LowRankLinear": "low_rank.linear",
    "LowRankPretraining": "modules.low_rank_pretraining",
    "PipelineStrategy": "strategies.pipeline",
    "QuantizedFinetuning": "modules.quantized_finetuning",
    "TextBlocks": "data.text_blocks",
    "decompose": "decomposition.command",
    "evaluate": "evaluation.command",
    "export": "deploy.export_command",
    "load_model": "models.loading",
    "make_low_rank": "low_rank.conversion",
    "recompute_blocks": "models.recompute",
    "vocabulary_loss": "models.vocabulary_loss",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        found: Any = version("fingpt-lightning")
    elif name == "callbacks":
        found = importlib.import_module("fingpt_lightning.callbacks")
    elif name in _MODULES:
        found = getattr(importlib.import_module(f"fingpt_lightning.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module 'fingpt_lightning' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
