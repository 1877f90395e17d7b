"""Fused linear layers of a network, such as GPT-2's query, key and value, taken apart and joined.

The network's config notes that its layers are split, and loading lays it out so.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.low_rank.split import SplitLinear
from fingpt_lightning.models.families import Family, family_of
from fingpt_lightning.models.low_rank_config import forget_split, note_split


def part_names(family: Family, name: str) -> list[str]:
    """Full names of the parts of a linear layer; none where it is not fused.

    Args:
        family: Family of the network.
        name: Full name of the layer.

    >>> from fingpt_lightning.models.families import GPT2
    >>> part_names(GPT2, "transformer.h.0.attn.c_attn")[0]
    'transformer.h.0.attn.c_attn.q'
    >>> part_names(GPT2, "transformer.h.0.attn.c_proj")
    []
    """
    found = (parts for layer, parts in family.fused.items() if name.endswith(f".{layer}"))
    return [f"{name}.{part}" for part in next(found, ())]


def split_fused_layers(network: PreTrainedModel) -> None:
    """Puts one dense layer for each part in the place of each fused one, and notes it.

    Args:
        network: Dense network on the meta device; changed in place, its weights lost.
    """
    family = family_of(network)
    for name, layer in list(network.named_modules()):
        if not (names := part_names(family, name)):
            continue
        assert isinstance(layer, Conv1D)
        with torch.device("meta"):
            parts = {
                part.rpartition(".")[2]: Conv1D(layer.nf // len(names), layer.nx) for part in names
            }
        network.set_submodule(name, SplitLinear(parts))
    note_split(network.config)


@torch.no_grad()
def join_split_layers(network: PreTrainedModel) -> None:
    """Undoes `split_fused_layers` in a network whose parts are dense and keeps their weights.

    Args:
        network: Network without adapters; changed in place.
    """
    for name, layer in list(network.named_modules()):
        if not isinstance(layer, SplitLinear):
            continue
        parts = [part for part in layer.children() if isinstance(part, Conv1D)]
        weight, bias = (_joined([getattr(part, key) for part in parts]) for key in _TENSORS)
        with torch.device("meta"):
            joined = Conv1D(weight.shape[1], weight.shape[0])
        joined.weight, joined.bias = nn.Parameter(weight), nn.Parameter(bias)
        network.set_submodule(name, joined.requires_grad_(False))
    forget_split(network.config)


_TENSORS = ("weight", "bias")


def _joined(tensors: list[Tensor]) -> Tensor:
    """Side by side: a Conv1D has its outputs on the last axis."""
    return torch.cat([tensor.detach() for tensor in tensors], -1)
