"""transformers' GPT-2 with its linear layers, and if wanted its embedding, low-rank."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.low_rank import (
    Initialization,
    LowRankEmbedding,
    LowRankLinear,
    RankRule,
)
from fingpt_lightning.low_rank.rank import Rank, resolve_rank
from fingpt_lightning.low_rank.rank_allocation import (
    num_parameters,
    parameters_left,
    ratio_for_parameters,
)
from fingpt_lightning.models.attention import IMPLEMENTATION as BLOCKED_ATTENTION
from fingpt_lightning.models.families import GPT2
from fingpt_lightning.models.low_rank_config import note_low_rank
from fingpt_lightning.models.tied_head import tie_head
from fingpt_lightning.terminal.messages import nearest

INITIALIZER_STD = 0.02
MAX_LAYERS = 10_000
"""Most blocks of a network that is made here: one with more would take hours to be laid out."""


@dataclass(frozen=True)
class GPT2Shape:
    """The sizes of a GPT-2.

    Args:
        num_layers: Number of decoder blocks.
        width: Width of the hidden states: features of the residual stream, a multiple of
            ``num_heads``.
        num_heads: Number of attention heads.
        num_positions: Length of the longest sequence.
    """

    num_layers: int
    width: int
    num_heads: int
    num_positions: int = 1024

    def __post_init__(self) -> None:
        for name in ("num_layers", "width", "num_heads", "num_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1")
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers {self.num_layers:,} is above {MAX_LAYERS:,}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is no multiple of num_heads {self.num_heads}")


PRESETS = {
    "gpt2-nano": GPT2Shape(num_layers=4, width=256, num_heads=4, num_positions=256),
    "gpt2-small": GPT2Shape(num_layers=12, width=768, num_heads=12),
    "gpt2-medium": GPT2Shape(num_layers=24, width=1024, num_heads=16),
    "gpt2-large": GPT2Shape(num_layers=36, width=1280, num_heads=20),
    "gpt2-xl": GPT2Shape(num_layers=48, width=1600, num_heads=25),
}
"""Source: Radford et al. (2019), table 2; nano is ours, for laptops and tests."""


def preset_shape(preset: str, **changes: int | None) -> GPT2Shape:
    """The shape of a preset, with those ``changes`` that are not None.

    Raises:
        ValueError: No such preset (the nearest is named), or sizes that do not fit together.

    >>> preset_shape("gpt2-small", num_layers=2).num_layers
    2
    """
    if preset not in PRESETS:
        hint = nearest(preset, PRESETS, cutoff=0.3)
        raise ValueError(f"preset {preset!r} is none of {', '.join(PRESETS)}{hint}")
    return replace(PRESETS[preset], **{k: v for k, v in changes.items() if v is not None})


def block_layers(shape: GPT2Shape) -> dict[str, tuple[int, int]]:
    """In and out features of the blocks' linear layers, by full name."""
    width = shape.width
    sizes = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    return {
        GPT2.layer_name(block, name): size
        for block in range(shape.num_layers)
        for name, size in zip(GPT2.linear_layers, sizes, strict=True)
    }


def rank_ratio_of(
    compression: float,
    shape: GPT2Shape,
    vocab_size: int,
    overrides: Mapping[str, Rank] | None = None,
    embedding_rank: Rank = None,
) -> float:
    """The rank ratio with which a GPT-2 comes nearest to a total compression.

    Args:
        compression: Ratio of all parameters of the dense network to all of this one.
        shape: Sizes of the network.
        vocab_size: Size of the vocabulary.
        overrides: Ranks by name pattern, as in a `RankRule`; layers that match keep theirs.
        embedding_rank: Rank of the tied embedding; None keeps it dense.

    Raises:
        ValueError: ``compression`` is below 1, or more than rank 1 everywhere gives.

    >>> round(rank_ratio_of(2.64, PRESETS["gpt2-small"], 50257, embedding_rank=256), 3)
    0.293
    """
    if not 1 <= compression < math.inf:
        raise ValueError(f"compression {compression} is below 1 (dense over stored parameters)")
    layers, rule = block_layers(shape), RankRule(None, overrides or {})
    free = {name: size for name, size in layers.items() if not rule.patterns_of(name)}
    given = {name: rule.rank_of(name, *layers[name]) for name in layers.keys() - free.keys()}
    table = (vocab_size, shape.width)
    beside = (shape.num_positions + 2) * shape.width  # positions and the last norm
    # Biases: 3 + 1 + 4 + 1 times the width; two norms.
    beside += shape.num_layers * 13 * shape.width
    dense = beside + num_parameters(None, *table)
    dense += sum(num_parameters(None, *size) for size in layers.values())
    fixed = beside + num_parameters(resolve_rank(embedding_rank, *table), *table)
    fixed += sum(num_parameters(rank, *layers[name]) for name, rank in given.items())
    left = parameters_left(
        free,
        compression,
        dense,
        fixed,
        f"compression {compression}",
        "embedding_rank makes the embedding smaller",
    )
    return ratio_for_parameters(free, left)


def check_ranks(shape: GPT2Shape, rank: RankRule, embedding_rank: Rank) -> None:
    """Raises what `build_gpt2` would raise, before anything is built.

    Raises:
        ValueError: A rank that does not fit a layer, or a pattern that names no layer.
    """
    layers = block_layers(shape)
    for name, size in layers.items():
        rank.rank_of(name, *size)
    if unused := rank.unused_patterns(list(layers)):
        raise ValueError(
            f"rank_overrides: {unused[0]!r} fits no layer; layers are named like"
            f" {', '.join(list(layers)[:4])}"
        )
    try:  # the vocabulary is larger than the width, so the width is the bound
        resolve_rank(embedding_rank, shape.width, max(shape.width, 50257))
    except ValueError as error:
        raise ValueError(f"embedding_{error}") from None


def lay_out_gpt2(
    shape: GPT2Shape,
    vocab_size: int,
    rank: RankRule | None = None,
    embedding_rank: Rank = None,
    dropout: float = 0.0,
    eos_token_id: int | None = None,
    factor_activation: str = "none",
    expansion: float = 0.0,
) -> GPT2LMHeadModel:
    """The network of `build_gpt2` on the meta device: names and sizes, no memory.

    What `LowRankLinear` takes beside sizes is noted in the config, where loading looks for it.
    """
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=shape.num_positions,
        n_embd=shape.width,
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        # The same curve as GPT-2's gelu_new, in one fused operator.
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        use_cache=False,
    )
    config._attn_implementation = BLOCKED_ATTENTION
    note_low_rank(config, factor_activation, expansion)
    embedding_columns = resolve_rank(embedding_rank, vocab_size, shape.width)
    config.tie_word_embeddings = embedding_columns is None
    with torch.device("meta"):
        network = GPT2LMHeadModel(config)
        _replace_linears(network, rank or RankRule(), factor_activation, expansion)
        if embedding_columns is not None:
            embedding = LowRankEmbedding(vocab_size, shape.width, embedding_columns)
            network.set_submodule(GPT2.embedding, embedding)
    tie_head(network)
    return network


def build_gpt2(
    shape: GPT2Shape,
    vocab_size: int,
    rank: RankRule | None = None,
    embedding_rank: Rank = None,
    dropout: float = 0.0,
    eos_token_id: int | None = None,
    seed: int | None = None,
    initialization: Initialization = Initialization.SVD,
) -> GPT2LMHeadModel:
    """A freshly initialized GPT-2 with every linear layer of its blocks low-rank.

    No dense weight is held: the network is laid out without memory, its layers are replaced,
    and only then filled, each layer from a random stream of its own (so that a part of the
    network can be made alone and equals the same part of the whole).

    Args:
        shape: Sizes of the network.
        vocab_size: Size of the vocabulary.
        rank: Rule for the rank of each layer; None for the dense baseline.
        embedding_rank: Rank of the tied embedding and head; None for a full table.
        dropout: Probability after embedding, attention and MLP, in [0, 1).
        eos_token_id: Token that ends a document, for generation.
        seed: Seed of the initialization; None draws one from torch's global generator.
        initialization: Initialization of the factors; a factorized embedding is always the
            truncated SVD.

    Raises:
        ValueError: A rank does not fit its layer.

    Source: initialization of Radford et al. (2019) as in transformers: N(0, 0.02^2), projections
    into the residual stream divided by sqrt(2 x layers); the factors follow from that draw.
    """
    network = lay_out_gpt2(shape, vocab_size, rank, embedding_rank, dropout, eos_token_id)
    seed = seed if seed is not None else int(torch.randint(2**31, ()))
    materialize(network, seed, initialization)
    return network


def materialize(
    network: GPT2LMHeadModel, seed: int, initialization: Initialization = Initialization.SVD
) -> None:
    """Gives a network of `lay_out_gpt2`, or the part of it that is left, memory and weights."""
    network.to_empty(device=torch.get_default_device())
    tie_head(network)  # to_empty gives tied parameters separate memory
    initialize(network, seed, initialization)


def _replace_linears(
    network: GPT2LMHeadModel, rank: RankRule, activation: str, expansion: float
) -> None:
    for name, module in list(network.named_modules()):
        if not isinstance(module, Conv1D):
            continue
        in_features, out_features = module.weight.shape
        columns = rank.rank_of(name, in_features, out_features)
        if columns is not None:
            pair = LowRankLinear(
                in_features, out_features, columns, activation=activation, expansion=expansion
            )
            network.set_submodule(name, pair)


@torch.no_grad()
def initialize(
    network: GPT2LMHeadModel, seed: int, initialization: Initialization = Initialization.SVD
) -> None:
    """Fills every parameter; each layer's stream depends on ``seed`` and its name alone."""
    into_residual = INITIALIZER_STD / (2 * network.config.n_layer) ** 0.5
    filled = set[nn.Parameter]()
    for name, module in network.named_modules():
        if module is network.lm_head:  # tied to the embedding
            filled.update(module.parameters())
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        stream = torch.Generator(network.device).manual_seed(int.from_bytes(digest[:7], "big"))
        std = into_residual if name.endswith(GPT2.into_residual) else INITIALIZER_STD
        match module:
            case LowRankLinear():
                module.reset_parameters(std, stream, initialization)
            case LowRankEmbedding():
                module.reset_parameters(std, stream)
            case Conv1D():
                module.weight.normal_(std=std, generator=stream)
                module.bias.zero_()
            case nn.Embedding():
                module.weight.normal_(std=std, generator=stream)
            case nn.LayerNorm():
                module.reset_parameters()
            case _:
                continue
        filled.update(module.parameters(recurse=False))
    missed = [name for name, p in network.named_parameters() if p not in filled]
    assert not missed, f"not initialized: {missed}"
    assert not list(network.buffers()), "buffers would be left unfilled"
