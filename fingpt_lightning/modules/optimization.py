"""Parameter groups, optimizers in 8 bits and learning-rate schedules."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from fingpt_lightning.low_rank import low_rank_factors
from fingpt_lightning.low_rank.factor_optimizer import embedding_factors
from fingpt_lightning.models.families import family_of
from fingpt_lightning.modules.recipe import moves_dense_alike


def decay_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups for AdamW: matrices decay, biases and norms do not.

    Args:
        named_parameters: Parameters as given by ``module.named_parameters()``; frozen ones are left
            out.
        weight_decay: Decay of every trained parameter of two or more axes.
    """
    trained = [(name, p) for name, p in named_parameters if p.requires_grad]
    groups = [
        {"params": [p for _, p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def split_embedding(
    groups: list[dict[str, Any]], network: PreTrainedModel, settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The groups without the embedding and the head, and one more of these.

    It stays where it is empty, as on the processes of a pipeline that have neither. What the
    optimizer of factors moves as a dense matrix is left to it.

    Args:
        groups: Parameter groups of a network, changed.
        network: Network whose trained parameters they hold.
        settings: Settings of the new group.
    """
    family = family_of(network)
    ends = (network.get_submodule(family.embedding), network.get_submodule(family.head))
    elsewhere = {p for group in groups if group.get("is_dense") for p in group["params"]}
    found = {
        p: None
        for end in ends
        for p in end.parameters()
        if p.requires_grad and p.ndim >= 2 and p not in elsewhere
    }
    for group in groups:
        group["params"] = [p for p in group["params"] if p not in found]
    return [*groups, {"params": list(found), **settings}]


def cosine_with_warmup(
    num_steps: int, warmup_steps: int, final_ratio: float
) -> Callable[[int], float]:
    """The factor on the learning rate: a line up, then half a cosine down to ``final_ratio``.

    Args:
        num_steps: Number of optimizer steps of the whole run; later steps stay at ``final_ratio``.
        warmup_steps: Number of steps of the linear warm-up; step 0 already has a rate above zero.
        final_ratio: The last factor, in [0, 1].

    >>> factor = cosine_with_warmup(num_steps=10, warmup_steps=2, final_ratio=0.1)
    >>> [round(factor(step), 3) for step in (0, 1, 2, 6, 10, 99)]
    [0.5, 1.0, 1.0, 0.55, 0.1, 0.1]
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
        return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def trapezoid(
    num_steps: int, warmup_steps: int, cooldown_steps: int, final_ratio: float
) -> Callable[[int], float]:
    """The factor on the learning rate: a line up, a constant, a line down to ``final_ratio``.

    Also known as warmup-stable-decay. A cooldown of all steps after the warm-up is the linear
    schedule.

    Args:
        num_steps: Number of optimizer steps of the whole run; later steps stay at ``final_ratio``.
        warmup_steps: Number of steps of the linear warm-up; step 0 already has a rate above zero.
        cooldown_steps: Number of last steps in which the rate falls; cut where the warm-up ends.
        final_ratio: The last factor, in [0, 1].

    Source: https://arxiv.org/abs/2404.06395, section 4; https://arxiv.org/abs/2405.18392 (a linear
    cooldown); https://arxiv.org/abs/2502.15938 (linear to zero).

    >>> factor = trapezoid(num_steps=10, warmup_steps=2, cooldown_steps=4, final_ratio=0.2)
    >>> [round(factor(step), 3) for step in (0, 1, 2, 6, 8, 10, 99)]
    [0.5, 1.0, 1.0, 1.0, 0.6, 0.2, 0.2]
    """
    first = max(warmup_steps, num_steps - cooldown_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, max(0, step - first) / max(1, num_steps - first))
        return 1 - (1 - final_ratio) * progress

    return factor


def factor_groups(
    network: PreTrainedModel,
    weight_decay: float,
    factor_settings: Mapping[str, Any],
    dense_settings: Mapping[str, Any] | None = None,
    dense: Collection[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """Matrices that decay, biases and norms that do not, factors, and dense matrices moved alike.

    A group stays where it is empty, so that the processes of a pipeline, which each hold a part of
    the parameters, have the same groups.

    Args:
        network: Network whose trained parameters are grouped, factors in the order of their names.
        weight_decay: Decay of the matrices that are not factors.
        factor_settings: Settings of the group of factors: down, up, down, up, ...
        dense_settings: Settings of the group of ``dense``; None where there is no such group.
        dense: Matrices that are moved as factors are, without being factors of a layer.
    """
    factors = low_rank_factors(network)
    among_factors = {id(p) for p in factors}
    others = [p for p in network.parameters() if p.requires_grad and id(p) not in among_factors]
    in_dense = {id(p) for p in dense}
    matrices = [p for p in others if p.ndim >= 2 and id(p) not in in_dense]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        {"params": factors, **factor_settings},
    ]
    if dense_settings is None:
        return groups
    return [*groups, {"params": list(dense), **dense_settings}]


def moved_as_dense(
    network: PreTrainedModel, settings: Mapping[str, Any]
) -> list[nn.Parameter] | None:
    """The matrices, beside the layers' factors, that an optimizer of factors moves.

    Args:
        network: Network with trained parameters.
        settings: Settings of a `LowRankPretraining` with one of `FACTOR_OPTIMIZERS`.

    Returns:
        The dense matrices of the blocks, the maps of a factorized embedding and head, or both;
        None where the settings leave all of them to AdamW.
    """
    is_mixed = settings["embedding_optimizer"] == "mixed"
    if not is_mixed and not moves_dense_alike(settings):
        return None
    dense = dense_in_blocks(network) if moves_dense_alike(settings) else []
    # Of table and up, the second turns an embedding into a hidden state, as a matrix of a block.
    return [*dense, *(embedding_factors(network)[1::2] if is_mixed else [])]


def dense_in_blocks(network: PreTrainedModel) -> list[nn.Parameter]:
    """The trained matrices of a network's blocks that are not factors of a low-rank layer.

    Raises:
        ValueError: The network's family is not supported.
    """
    among_factors = {id(p) for p in low_rank_factors(network)}
    blocks = network.get_submodule(family_of(network).blocks)
    return [
        p
        for p in blocks.parameters()
        if p.ndim == 2 and p.requires_grad and id(p) not in among_factors
    ]


def adamw_8bit(
    groups: list[dict[str, Any]], betas: tuple[float, float], lr: float, is_paged: bool = False
) -> Optimizer:
    """AdamW with its averages in 8 bits, in blocks of 256 with a scale each.

    Parameters of less than 4096 numbers keep theirs in 32 bits.

    Args:
        groups: Parameter groups, whole on each process.
        betas: Decay rates of the averages.
        lr: Learning rate, where a group has none.
        is_paged: Whether to move the averages to the host when a GPU is full.

    Source: https://arxiv.org/abs/2110.02861, through bitsandbytes.
    """
    import bitsandbytes  # takes a second

    optimizers: Any = bitsandbytes.optim  # not annotated
    kind = optimizers.PagedAdamW8bit if is_paged else optimizers.AdamW8bit
    return cast("Optimizer", kind(groups, lr=lr, betas=betas))
