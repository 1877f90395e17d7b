"""Text in, batches of token blocks out: streaming, cached once, exact in order and on resume."""

from fingpt_lightning.data.batch import TokenBatch
from fingpt_lightning.data.instructions import FinancialInstructions
from fingpt_lightning.data.text_blocks import TextBlocks

__all__ = ["FinancialInstructions", "TextBlocks", "TokenBatch"]
