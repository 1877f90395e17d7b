"""Keys and values of past tokens in memory that is taken once.

Axes: B rows, H heads of keys and values, T new tokens, S all tokens so far, C capacity, D features
of a head.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from typing_extensions import override


class PreallocatedLayer(CacheLayerMixin):
    """One layer's keys and values; a new token is written in place, nothing is copied.

    transformers' dynamic cache copies all keys and values at each token, its static one lets each
    token attend to the whole capacity. Here attention gets a view of the filled part.

    Args:
        capacity: C, the most tokens that it can hold.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity, self.length = capacity, 0

    @override
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, features = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(rows, heads, self.capacity, features)
        self.values = torch.empty_like(self.keys)
        self.is_initialized = True

    @override
    def update(
        self,
        key_states: Float[Tensor, "B H T D"],
        value_states: Float[Tensor, "B H T D"],
        *args: object,
        **kwargs: object,
    ) -> tuple[Float[Tensor, "B H S D"], Float[Tensor, "B H S D"]]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit a cache made for {self.capacity}")
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        keys[:, :, self.length : end] = key_states
        values[:, :, self.length : end] = value_states
        self.length = end
        return keys[:, :, :end], values[:, :, :end]

    @override
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    @override
    def get_seq_length(self) -> int:
        return self.length

    @override
    def get_max_length(self) -> int:
        return self.capacity

    def crop(self, max_length: int) -> None:
        """Forgets the tokens behind the first ``max_length``; `Cache.crop` calls it by this name.

        >>> layer = PreallocatedLayer(9)
        >>> layer.length = 5
        >>> layer.crop(3)
        >>> layer.crop(4)
        >>> layer.length
        3
        """
        self.length = min(self.length, max_length)


def preallocated_cache(config: PreTrainedConfig, capacity: int) -> Cache:
    """A cache for a network; it takes the batch size of the first batch that it sees.

    Args:
        config: Config of the network.
        capacity: Most tokens that a row will have.
    """
    return Cache([PreallocatedLayer(capacity) for _ in range(config.num_hidden_layers)])


def cache_bytes_per_token(network: PreTrainedModel) -> int:
    """Bytes of keys and values that one token of one row takes, over all layers.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> cache_bytes_per_token(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=12, n_head=3)))
    192
    """
    config = network.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    features = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = torch.empty((), dtype=network.dtype).element_size()
    return 2 * int(config.num_hidden_layers) * int(heads) * int(features) * size
