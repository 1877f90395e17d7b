"""Pretrain and finetune financial language models in little memory and time.

The names below are imported when they are first used: the package alone imports nothing heavy.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fingpt_lightning import callbacks
    from fingpt_lightning.compression.command import compress
    from fingpt_lightning.data.instructions import FinancialInstructions
    from fingpt_lightning.data.text_blocks import TextBlocks
    from fingpt_lightning.decomposition.command import decompose
    from fingpt_lightning.deploy.export_command import export
    from fingpt_lightning.evaluation.command import evaluate
    from fingpt_lightning.hub.pushing import push_to_hub
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
    "compress",
    "decompose",
    "evaluate",
    "export",
    "load_model",
    "make_low_rank",
    "push_to_hub",
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
    "compress": "compression.command",
    "decompose": "decomposition.command",
    "evaluate": "evaluation.command",
    "export": "deploy.export_command",
    "load_model": "models.loading",
    "make_low_rank": "low_rank.conversion",
    "push_to_hub": "hub.pushing",
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


class _AutoClassesHook:
    """Registers our model type with transformers' Auto classes as soon as those are imported.

    A finder of modules that finds none itself: it takes what the others find and adds the
    registration after it, so that this package imports nothing heavy before it is used.
    """

    MODULES = tuple(f"transformers.models.auto.{end}_auto" for end in ("configuration", "modeling"))

    @classmethod
    def install(cls) -> None:
        if not any(type(finder).__name__ == cls.__name__ for finder in sys.meta_path):
            sys.meta_path.insert(0, cls())
        for name in cls.MODULES:
            if name in sys.modules:
                cls.register(sys.modules[name])

    @staticmethod
    def register(module: Any) -> None:
        importlib.import_module("fingpt_lightning.auto_classes").register(module)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self.MODULES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((found for found in specs if found is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                self.register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


_AutoClassesHook.install()
