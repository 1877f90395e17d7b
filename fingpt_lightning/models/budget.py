"""The budget of a network of transformers, dense or low-rank."""

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.low_rank import LowRankEmbedding, LowRankHead, LowRankLinear
from fingpt_lightning.low_rank.budget import LayerBudget, LayerKind, ModelBudget
from fingpt_lightning.low_rank.embedding import OwnLowRankHead
from fingpt_lightning.models.families import Family, family_of, head_of
from fingpt_lightning.models.low_rank_config import has_own_head_map


def model_budget(network: PreTrainedModel, sequence_length: int) -> ModelBudget:
    """Parameters and floating-point operations of a network and its dense baseline.

    Args:
        network: Dense or low-rank; one on the meta device will do.
        sequence_length: Tokens of a sequence, which attention's cost grows with.

    Raises:
        ValueError: The network's family is not supported.
    """
    family, head = family_of(network), head_of(network)
    is_tied = {id(p) for p in head.parameters()} <= {
        id(p) for p in network.get_input_embeddings().parameters()
    }
    table_is_shared = has_own_head_map(network.config)
    layers = [
        _layer_budget(name, module, is_tied, table_is_shared, family)
        for name, module in network.named_modules()
    ]
    attention_flops = 4 * sequence_length * _attention_width(network)  # scores and their use
    attention = [
        LayerBudget(
            name=f"block {block}, attention",
            kind=LayerKind.ATTENTION,
            in_block=True,
            parameters=0,
            dense_parameters=0,
            flops_per_token=attention_flops,
            dense_flops_per_token=attention_flops,
        )
        for block in range(network.config.num_hidden_layers)
    ]
    found = tuple([layer for layer in layers if layer is not None] + attention)
    stored = sum(p.numel() for p in network.parameters())
    budget = ModelBudget(found, sequence_length)
    assert budget.total_parameters == stored, (budget.total_parameters, stored)
    return budget


def _attention_width(network: PreTrainedModel) -> int:
    config = network.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * config.num_attention_heads)


def _layer_budget(
    name: str, module: nn.Module, head_is_tied: bool, table_is_shared: bool, family: Family
) -> LayerBudget | None:
    kind, rank = LayerKind.LINEAR, None
    held = sum(p.numel() for p in module.parameters(recurse=False))
    dense = held
    flops = dense_flops = 0
    match module:
        case LowRankLinear():
            rank = module.rank
            dense = module.in_features * module.out_features
            dense += 0 if module.bias is None else module.out_features
            flops = 2 * rank * (module.in_features + module.out_features)
            dense_flops = 2 * module.in_features * module.out_features
        case Conv1D():
            flops = dense_flops = 2 * module.weight.numel()
        case LowRankEmbedding():
            kind, rank = LayerKind.EMBEDDING, module.rank
            dense = module.num_embeddings * module.embedding_dim
            flops = 2 * rank * module.embedding_dim
        case LowRankHead():
            kind, rank = LayerKind.HEAD, module.table.shape[1]
            flops = 2 * rank * sum(module.table.shape[:1] + module.up.shape[:1])
            dense_flops = 2 * module.table.shape[0] * module.up.shape[0]
            held = dense = 0  # the embedding's own parameters
        case OwnLowRankHead():
            kind, rank = LayerKind.HEAD, module.rank
            dense = module.in_features * module.out_features
            flops = 2 * rank * (module.in_features + module.out_features)
            dense_flops = 2 * dense
            if table_is_shared:  # the embedding's own parameters
                held, dense = held - module.table.numel(), 0
        case nn.Linear():
            flops = dense_flops = 2 * module.weight.numel()
            if family.is_head(name):
                kind = LayerKind.HEAD
                held = dense = 0 if head_is_tied else held
        case nn.Embedding() if name == family.embedding:
            kind = LayerKind.EMBEDDING
        case _ if held:
            kind = LayerKind.OTHER
        case _:
            return None
    return LayerBudget(name, kind, family.is_in_block(name), held, dense, flops, dense_flops, rank)
