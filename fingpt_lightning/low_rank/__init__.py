"""Low-rank layers in plain torch: factors A and B, factorization, ranks and budgets."""

from fingpt_lightning.low_rank.adapters import AdaptedLinear, AdapterOptions
from fingpt_lightning.low_rank.budget import LayerBudget, ModelBudget
from fingpt_lightning.low_rank.conversion import LowRankReport, make_low_rank
from fingpt_lightning.low_rank.embedding import LowRankEmbedding, LowRankHead
from fingpt_lightning.low_rank.factor_optimizer import embedding_factors, low_rank_factors
from fingpt_lightning.low_rank.factorize import Factors, factorize
from fingpt_lightning.low_rank.initialization import Initialization
from fingpt_lightning.low_rank.linear import LowRankLinear
from fingpt_lightning.low_rank.lora_muon import LoRAMuon
from fingpt_lightning.low_rank.product_decay import decay_products
from fingpt_lightning.low_rank.rank import Rank, RankRule, resolve_rank
from fingpt_lightning.low_rank.spectron import Spectron

__all__ = [
    "AdaptedLinear",
    "AdapterOptions",
    "Factors",
    "Initialization",
    "LayerBudget",
    "LoRAMuon",
    "LowRankEmbedding",
    "LowRankHead",
    "LowRankLinear",
    "LowRankReport",
    "ModelBudget",
    "Rank",
    "RankRule",
    "Spectron",
    "decay_products",
    "embedding_factors",
    "factorize",
    "low_rank_factors",
    "make_low_rank",
    "resolve_rank",
]
