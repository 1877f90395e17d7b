"""The frozen base that adapters are trained on: loaded, or tiny and random for a dry run."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fingpt_lightning.models.layout import cut, fill, lay_out
from fingpt_lightning.models.shapes import MAX_LAYERS


@dataclass
class RandomLlama:
    """The sizes of a Llama with random weights, to try a config without a model.

    Args:
        num_layers: Number of decoder blocks.
        width: Width of the hidden states; a multiple of 32 times ``num_heads`` suits quantization.
        num_heads: Number of attention heads.
        num_key_value_heads: Number of heads of keys and values, a divisor of ``num_heads``.
        mlp_width: Width of the MLP's inner layer.
        num_positions: Most tokens per row.

    Raises:
        ValueError: A size is outside its range, or they do not divide each other.
    """

    num_layers: int = 2
    width: int = 64
    num_heads: int = 2
    num_key_value_heads: int = 1
    mlp_width: int = 128
    num_positions: int = 512

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"random_base.{name} {value} is below 1")
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"random_base.num_layers {self.num_layers:,} is above {MAX_LAYERS:,}")
        for whole, part in (("width", "num_heads"), ("num_heads", "num_key_value_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"random_base.{part} {getattr(self, part)} does not divide {whole}"
                    f" {getattr(self, whole)}"
                )


def random_llama(
    shape: RandomLlama,
    vocab_size: int,
    eos_token_id: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None,
    seed: int,
    keep_part: Callable[[PreTrainedModel], None] | None = None,
) -> PreTrainedModel:
    """A Llama of the given sizes; the same seed gives the same weights.

    Args:
        shape: Sizes of the network.
        vocab_size: Number of rows of embedding and head.
        eos_token_id: Token that ends a text.
        dtype: Dtype of weights and products.
        device: Device of the network.
        quantize: ``nf4``, ``int8`` or None.
        seed: Seed of the weights.
        keep_part: Function that takes out of the network what other processes hold.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=shape.num_positions,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = LlamaForCausalLM(config).state_dict()
    network = lay_out(config, {name: tuple(tensor.shape) for name, tensor in drawn.items()})
    fill(network, drawn.items(), dtype, device, quantize, cut(network, keep_part))
    return network
