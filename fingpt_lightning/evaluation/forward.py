"""Running token trees through a network, after a common beginning that is run once.

Axes: B rows, T tokens or nodes, S tokens before and in the rows, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from fingpt_lightning.evaluation.token_tree import TokenTree
from fingpt_lightning.models.attention import attention_mask


class SharedPrefix:
    """The keys and values of the tokens that all rows begin with, computed at batch size 1.

    Args:
        network: Network in evaluation mode.
        tokens: Tokens that all rows begin with; may be empty.
    """

    def __init__(self, network: PreTrainedModel, tokens: Sequence[int]) -> None:
        self.num_tokens = len(tokens)
        self._config = network.config
        self._layers: list[tuple[Tensor, Tensor]] = []
        if tokens:
            cache = _growing_cache(network.config)
            ids = torch.tensor([tokens], device=network.device)
            network.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
            self._layers = [(layer.keys, layer.values) for layer in _layers(cache)]

    def cache(self, num_rows: int) -> Cache:
        """A cache for a batch; it grows without a change to the prefix."""
        cache = _growing_cache(self._config)
        for layer, (keys, values) in zip(_layers(cache), self._layers, strict=False):
            layer.lazy_initialization(keys, values)
            layer.keys = keys.expand(num_rows, -1, -1, -1)
            layer.values = values.expand(num_rows, -1, -1, -1)
        return cache


def _growing_cache(config: PreTrainedConfig) -> Cache:
    """A cache that keeps all tokens in every layer: masks, not the cache, cut windows."""
    return Cache([DynamicLayer() for _ in range(config.num_hidden_layers)])


def _layers(cache: Cache) -> list[Any]:
    return cache.layers  # annotated as of any kind of network; ours keep keys and values


def tree_mask(ends: Int[Tensor, "B T"], num_before: int) -> Bool[Tensor, "B 1 T S"]:
    """Which keys each node attends to: all before the tree, itself and the nodes on its path.

    Args:
        ends: Values of `TokenTree.ends` of each row; a padding node ends behind itself.
        num_before: Number of keys before the tree.
    """
    node_T = torch.arange(ends.shape[1], device=ends.device)
    mask_BTT = (node_T[:, None] >= node_T) & (node_T[:, None] < ends[:, None, :])
    return torch.nn.functional.pad(mask_BTT, (num_before, 0), value=True)[:, None]


def run_trees(
    network: PreTrainedModel,
    trees: Sequence[TokenTree],
    prefix: SharedPrefix,
    cache: Cache | None = None,
) -> Float[Tensor, "B T D"]:
    """The final hidden states of the nodes, right-padded.

    Args:
        network: Network in evaluation mode.
        trees: Token trees, built with ``num_before`` of the prefix.
        prefix: Prefix that has been run before.
        cache: Cache of the prefix, for callers that continue after the trees; None makes one.
    """
    length = max(len(tree.tokens) for tree in trees)
    ids, positions, ends = [], [], []
    for tree in trees:
        padding = range(len(tree.tokens), length)
        ids.append([*tree.tokens, *(0 for _ in padding)])
        positions.append([*tree.positions, *(0 for _ in padding)])
        ends.append([*tree.ends, *(node + 1 for node in padding)])
    device = network.device
    output = network.base_model(
        input_ids=torch.tensor(ids, device=device),
        position_ids=torch.tensor(positions, device=device),
        attention_mask=attention_mask(
            network, tree_mask(torch.tensor(ends, device=device), prefix.num_tokens)
        ),
        past_key_values=prefix.cache(len(trees)) if cache is None else cache,
        use_cache=True,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden
