"""Networks of any family from scratch, linear layers and if wanted embedding and head low-rank."""

import bisect
import copy
import functools
import hashlib
import math
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.low_rank import (
    Initialization,
    LowRankEmbedding,
    LowRankLinear,
    RankRule,
)
from fingpt_lightning.low_rank.budget import SameSizeDense
from fingpt_lightning.low_rank.embedding import OwnLowRankHead
from fingpt_lightning.low_rank.rank import Rank, resolve_rank
from fingpt_lightning.low_rank.rank_allocation import (
    num_parameters,
    parameters_left,
    ratio_for_parameters,
)
from fingpt_lightning.models.attention import IMPLEMENTATION as BLOCKED_ATTENTION
from fingpt_lightning.models.budget import model_budget
from fingpt_lightning.models.families import (
    check_plain_embedding,
    family_named,
    family_of,
    head_of,
)
from fingpt_lightning.models.layout import compute_buffers, features_of
from fingpt_lightning.models.low_rank_config import (
    note_low_rank,
    note_own_head,
    note_own_head_map,
)
from fingpt_lightning.models.shapes import (
    AnyShape,
    GPT2Shape,
    LlamaShape,
    of_depth,
    of_width,
    resized,
    width_step,
)
from fingpt_lightning.models.split_layers import part_names, split_fused_layers
from fingpt_lightning.models.tied_head import tie_head

INITIALIZER_STD = 0.02
_WIDTH_STEP = 16
"""Widths of dense networks of the same size are its multiples."""


@functools.lru_cache(maxsize=16)
def _dense(shape: AnyShape, vocab_size: int) -> PreTrainedModel:
    """The dense network of a shape on the meta device."""
    config = shape.config(vocab_size)
    with torch.device("meta"):
        network = family_named(config.model_type).network_class(config)
    network.tie_weights()
    return network


def block_layers(shape: AnyShape, rank: RankRule | None = None) -> dict[str, tuple[int, int]]:
    """In and out features of the blocks' linear layers, by full name.

    Args:
        shape: Sizes of the network.
        rank: Rule for the rank of each layer; one that names parts of fused layers splits them.
    """
    network = _dense(shape, 1)
    if rank is not None and _splits(rank, network):
        network = copy.deepcopy(network)
        split_fused_layers(network)
    family = family_of(network)
    return {
        name: features_of(module)
        for name, module in network.named_modules()
        if isinstance(module, family.dense_layer) and family.is_in_block(name)
    }


def _splits(rank: RankRule, network: PreTrainedModel) -> bool:
    """Whether a rule has a pattern for a part of a fused layer that the whole does not fit."""
    family = family_of(network)
    return any(
        set(rank.patterns_of(part)) - set(rank.patterns_of(name))
        for name, _ in network.named_modules()
        for part in part_names(family, name)
    )


def rank_ratio_of(
    compression: float,
    shape: AnyShape,
    vocab_size: int,
    overrides: Mapping[str, Rank] | None = None,
    embedding_rank: Rank = None,
    has_own_head_map: bool = False,
    rank_multiple: int = 1,
) -> float:
    """The rank ratio with which a network comes nearest to a total compression.

    Args:
        compression: Ratio of all parameters of the dense network to all of this one.
        shape: Sizes of the network.
        vocab_size: Size of the vocabulary.
        overrides: Ranks by name pattern, as in a `RankRule`; layers that match keep theirs.
        embedding_rank: Rank of the embedding, and of a head that is not tied to it; None keeps both
            dense.
        has_own_head_map: Whether a head with the embedding's table has a map of its own.
        rank_multiple: Number whose multiples all ranks are rounded to, as in `resolve_rank`.

    Raises:
        ValueError: ``compression`` is below 1, or more than the lowest ranks give.

    >>> from fingpt_lightning.models.shapes import PRESETS
    >>> round(rank_ratio_of(2.64, PRESETS["gpt2-small"], 50257, embedding_rank=256), 3)
    0.293
    """
    if not 1 <= compression < math.inf:
        raise ValueError(f"compression {compression} is below 1 (dense over stored parameters)")
    rule = RankRule(None, overrides or {}, rank_multiple)
    layers = block_layers(shape, rule)
    free = {name: size for name, size in layers.items() if not rule.patterns_of(name)}
    given = {name: rule.rank_of(name, *layers[name]) for name in layers.keys() - free.keys()}
    network = _dense(shape, vocab_size)
    dense = sum(parameter.numel() for parameter in network.parameters())
    fixed = dense - sum(num_parameters(None, *size) for size in layers.values())
    fixed += _embedding_change(network, embedding_rank, rank_multiple)
    width = int(network.config.hidden_size)
    columns = resolve_rank(embedding_rank, vocab_size, width, rank_multiple)
    if has_own_head_map and columns is not None:
        fixed += columns * width
    fixed += sum(num_parameters(rank, *layers[name]) for name, rank in given.items())
    left = parameters_left(
        free,
        compression,
        dense,
        fixed,
        f"compression {compression}",
        "embedding_rank makes the embedding smaller",
        rank_multiple,
    )
    return ratio_for_parameters(free, left, rank_multiple)


@functools.lru_cache(maxsize=16, typed=True)  # a rank of 1 is not the share 1.0
def narrow_shape(
    compression: float,
    shape: AnyShape,
    vocab_size: int,
    embedding_rank: Rank,
    has_own_head_map: bool = False,
) -> AnyShape:
    """The widest shape whose network, dense behind a factorized embedding, is small enough.

    Depth, number of heads and the proportion of the MLP stay.

    Args:
        compression: Ratio of all parameters of the dense network of ``shape`` to all of the narrow
            one, which is reached or exceeded.
        shape: Sizes of the dense baseline.
        vocab_size: Size of the vocabulary.
        embedding_rank: Rank of the embedding, and of a head that is not tied to it; a float is a
            share of the width that is found.
        has_own_head_map: Whether a head with the embedding's table has a map of its own.

    Raises:
        ValueError: No width up to the shape's has a smaller embedding or reaches ``compression``.

    >>> from fingpt_lightning.models.shapes import PRESETS
    >>> narrow_shape(2.64, PRESETS["gpt2-small"], 50257, 0.875, has_own_head_map=True).width
    432
    """
    step, width = width_step(shape), int(shape.config(1).hidden_size)
    widths = [
        w
        for w in range(step, width + 1, step)
        if _columns_that_fit(embedding_rank, vocab_size, w) is not None
    ]
    if not widths:
        raise ValueError(
            f"embedding_rank {embedding_rank} makes the embedding of {vocab_size:,} tokens smaller"
            f" at no width up to {width}: lower embedding_rank"
        )

    def parameters(width: int) -> int:
        narrow = of_width(shape, width)
        change = _embedding_change(_dense(of_depth(narrow, 1), vocab_size), embedding_rank)
        columns = _columns_that_fit(embedding_rank, vocab_size, width)
        assert columns is not None
        own_map = columns * width if has_own_head_map else 0
        return _num_parameters(narrow, vocab_size) + change + own_map

    dense = _num_parameters(shape, vocab_size)
    found = bisect.bisect_right(widths, dense / compression, key=parameters)
    if found == 0:
        limit, other = "with as many heads", " or num_heads"
        if isinstance(embedding_rank, int) and widths[0] > step:
            limit, other = f"for embedding_rank {embedding_rank}", " or embedding_rank"
        elif not isinstance(shape, (GPT2Shape, LlamaShape)):
            other = ""
        raise ValueError(
            f"compression {compression} is out of reach: width {widths[0]}, the smallest {limit},"
            f" gives {dense / parameters(widths[0]):.2f}; lower compression{other}"
        )
    return of_width(shape, widths[found - 1])


def _columns_that_fit(embedding_rank: Rank, vocab_size: int, width: int) -> int | None:
    """The rank of an embedding; None where it is larger than the width or saves nothing."""
    if isinstance(embedding_rank, int) and embedding_rank > min(vocab_size, width):
        return None
    return resolve_rank(embedding_rank, vocab_size, width)


def _embedding_change(
    network: PreTrainedModel, embedding_rank: Rank, rank_multiple: int = 1
) -> int:
    """Parameters that factors of a dense network's embedding and head have more than these."""
    embedding, head = network.get_input_embeddings(), head_of(network)
    assert isinstance(embedding, nn.Embedding)
    table = (embedding.num_embeddings, embedding.embedding_dim)
    num_tables = 1 if head.weight is embedding.weight else 2
    columns = resolve_rank(embedding_rank, *table, rank_multiple)
    return num_tables * (num_parameters(columns, *table) - num_parameters(None, *table))


def same_size_dense(
    shape: GPT2Shape | LlamaShape, vocab_size: int, parameters: int, sequence_length: int
) -> SameSizeDense | None:
    """The narrower dense network whose parameters come nearest to a number.

    Args:
        shape: Sizes of the dense baseline; depth and proportions stay.
        vocab_size: Size of the vocabulary.
        parameters: Number of parameters.
        sequence_length: Tokens per sequence, for its operations.

    Returns:
        None where no width below the shape's comes near.
    """
    widths = range(_WIDTH_STEP, shape.width, _WIDTH_STEP)
    if not widths:
        return None
    first = bisect.bisect_left(widths, parameters, key=lambda w: _num_dense(shape, w, vocab_size))
    near = widths[max(0, first - 1) : first + 1]
    width = min(near, key=lambda w: abs(_num_dense(shape, w, vocab_size) - parameters))
    found = _dense(_of_width(shape, width), vocab_size)
    budget = model_budget(found, sequence_length)
    return SameSizeDense(width, budget.total_parameters, budget.forward_flops_per_token)


def _of_width(shape: GPT2Shape | LlamaShape, width: int) -> GPT2Shape | LlamaShape:
    heads = next(h for h in range(shape.num_heads, 0, -1) if width % (2 * h) == 0)
    return resized(shape, width=width, num_heads=heads)


def _num_dense(shape: GPT2Shape | LlamaShape, width: int, vocab_size: int) -> int:
    return _num_parameters(_of_width(shape, width), vocab_size)


def _num_parameters(shape: AnyShape, vocab_size: int) -> int:
    """Parameters of the dense network of a shape, from those of one and two blocks."""
    networks = (_dense(of_depth(shape, n), vocab_size) for n in (1, 2))
    one, two = (sum(p.numel() for p in network.parameters()) for network in networks)
    num_layers = int(shape.config(1).num_hidden_layers)
    return int(one + (num_layers - 1) * (two - one))


def check_ranks(shape: AnyShape, rank: RankRule, embedding_rank: Rank) -> None:
    """Raises what `build_network` would raise, before anything is built.

    Raises:
        ValueError: A rank that does not fit a layer, or a pattern that names no layer.
    """
    layers = block_layers(shape, rank)
    for name, size in layers.items():
        rank.rank_of(name, *size)
    if unused := rank.unused_patterns(list(layers)):
        raise ValueError(
            f"rank_overrides: {unused[0]!r} fits no layer; layers are named like"
            f" {', '.join(list(layers)[:4])}"
        )
    config = shape.config(1)
    if embedding_rank is not None:
        check_plain_embedding(family_named(config.model_type))
    width = int(config.hidden_size)
    try:  # the vocabulary is larger than the width, so the width is the bound
        resolve_rank(embedding_rank, width, max(width, 50257))
    except ValueError as error:
        raise ValueError(f"embedding_{error}") from None


def lay_out_network(
    shape: AnyShape,
    vocab_size: int,
    rank: RankRule | None = None,
    embedding_rank: Rank = None,
    dropout: float = 0.0,
    eos_token_id: int | None = None,
    factor_activation: str = "none",
    expansion: float = 0.0,
    has_own_head_map: bool = False,
) -> PreTrainedModel:
    """The network of `build_network` on the meta device: names and sizes, no memory.

    Its embedding's rank, too, is rounded to the multiples of the rule of ``rank``.
    What `LowRankLinear` takes beside sizes is noted in the config, where loading looks for it; and
    so is a map of its own of the head, beside the table that it shares with the embedding.
    """
    config = shape.config(vocab_size, dropout, eos_token_id)
    family = family_named(config.model_type)
    config.use_cache = False
    config._attn_implementation = BLOCKED_ATTENTION
    note_low_rank(config, factor_activation, expansion)
    rank = rank or RankRule()
    columns = resolve_rank(embedding_rank, vocab_size, config.hidden_size, rank.multiple)
    is_tied = bool(config.tie_word_embeddings)
    if columns is not None:
        config.tie_word_embeddings = False  # transformers' own tying is for full tables
        if not is_tied:
            note_own_head(config)
        elif has_own_head_map:
            note_own_head_map(config)
    with torch.device("meta"):
        network = family.network_class(config)
        _replace_linears(network, rank, factor_activation, expansion)
        if columns is not None:
            embedding = LowRankEmbedding(vocab_size, config.hidden_size, columns)
            network.set_submodule(family.embedding, embedding)
            if not is_tied or has_own_head_map:
                own_head = OwnLowRankHead(config.hidden_size, vocab_size, columns)
                network.set_submodule(family.head, own_head)
    tie_head(network)
    return network


def build_network(
    shape: AnyShape,
    vocab_size: int,
    rank: RankRule | None = None,
    embedding_rank: Rank = None,
    dropout: float = 0.0,
    eos_token_id: int | None = None,
    seed: int | None = None,
    initialization: Initialization = Initialization.SVD,
    has_own_head_map: bool = False,
) -> PreTrainedModel:
    """A freshly initialized network with every linear layer of its blocks low-rank.

    No dense weight is held: the network is laid out without memory, its layers are replaced,
    and only then filled, each layer from a random stream of its own (so that a part of the
    network can be made alone and equals the same part of the whole).

    Args:
        shape: Sizes of the network.
        vocab_size: Size of the vocabulary.
        rank: Rule for the rank of each layer; None for the dense baseline.
        embedding_rank: Rank of embedding and head, tied or not; None for full tables.
        dropout: Probability after embedding, attention and MLP, in [0, 1).
        eos_token_id: Token that ends a document, for generation.
        seed: Seed of the initialization; None draws one from torch's global generator.
        initialization: Initialization of the factors; a factorized embedding is always the
            truncated SVD.
        has_own_head_map: Whether the head of a factorized embedding that it shares the table of
            has a map of its own to it, which starts as the embedding's.

    Raises:
        ValueError: A rank does not fit its layer.

    Source: initialization of Radford et al. (2019) as in transformers: N(0, 0.02^2), projections
    into the residual stream divided by sqrt(2 x layers); the factors follow from that draw.
    """
    network = lay_out_network(
        shape,
        vocab_size,
        rank,
        embedding_rank,
        dropout,
        eos_token_id,
        has_own_head_map=has_own_head_map,
    )
    seed = seed if seed is not None else int(torch.randint(2**31, ()))
    materialize(network, seed, initialization)
    return network


def materialize(
    network: PreTrainedModel, seed: int, initialization: Initialization = Initialization.SVD
) -> None:
    """Gives a network of `lay_out_network`, or the part of it that is left, memory and weights."""
    network.to_empty(device=torch.get_default_device())
    tie_head(network)  # to_empty gives tied parameters separate memory
    compute_buffers(network)
    initialize(network, seed, initialization)


def _replace_linears(
    network: PreTrainedModel, rank: RankRule, activation: str, expansion: float
) -> None:
    family = family_of(network)
    if _splits(rank, network):
        split_fused_layers(network)
    for name, module in list(network.named_modules()):
        if not (isinstance(module, family.dense_layer) and family.is_in_block(name)):
            continue
        in_features, out_features = features_of(module)
        columns = rank.rank_of(name, in_features, out_features)
        if columns is not None:
            factors = LowRankLinear(
                in_features,
                out_features,
                columns,
                bias=module.bias is not None,
                activation=activation,
                expansion=expansion,
            )
            network.set_submodule(name, factors)


@torch.no_grad()
def initialize(
    network: PreTrainedModel, seed: int, initialization: Initialization = Initialization.SVD
) -> None:
    """Fills every parameter; each layer's stream depends on ``seed`` and its name alone."""
    family = family_of(network)
    into_residual = INITIALIZER_STD / (2 * network.config.num_hidden_layers) ** 0.5
    of_embedding = {id(parameter) for parameter in network.get_input_embeddings().parameters()}
    filled = set[nn.Parameter]()
    for name, module in network.named_modules():
        parameters = list(module.parameters(recurse=False))
        if family.is_head(name) and {id(p) for p in parameters} <= of_embedding:  # tied
            filled.update(parameters)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        stream = torch.Generator(network.device).manual_seed(int.from_bytes(digest[:7], "big"))
        std = into_residual if name.endswith(family.into_residual) else INITIALIZER_STD
        match module:
            case LowRankLinear():
                module.reset_parameters(std, stream, initialization)
            case OwnLowRankHead() if module.table in filled:
                # The shared table's: the head begins as a tied one.
                module.up.copy_(network.get_input_embeddings().get_parameter("up"))
            case LowRankEmbedding() | OwnLowRankHead():
                module.reset_parameters(std, stream)
            case Conv1D() | nn.Linear():
                module.weight.normal_(std=std, generator=stream)
                if module.bias is not None:
                    module.bias.zero_()
            case nn.Embedding():
                module.weight.normal_(std=std, generator=stream)
            case nn.LayerNorm():
                module.reset_parameters()
            case _ if type(module).__name__.endswith("RMSNorm"):
                module.get_parameter("weight").fill_(0.0 if family.shifted_norms else 1.0)
            case _:
                continue
        filled.update(parameters)
    missed = [name for name, p in network.named_parameters() if p not in filled]
    assert not missed, f"not initialized: {missed}"
