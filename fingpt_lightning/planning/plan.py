"""The arithmetic of a plan: bytes of a run's parts, its length, and whether it fits.

Sizes are those that `callbacks.MemoryMonitor` then measures.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fingpt_lightning.low_rank import resolve_rank
from fingpt_lightning.pipeline import (
    Balance,
    NetworkCosts,
    PipelineLayout,
    Workload,
    given_partition,
    partition,
)

TILE = 128
"""Columns of a product that a block of a GPU's threads takes at a time, in its fastest kernels."""
_BLOCK = 256
"""Numbers that share a scale in the 8-bit optimizers of bitsandbytes."""
_MIN_8BIT = 4096
"""Smaller parameters keep their state in 32 bits there."""
_MAP_BYTES = 256 * 4


class RunLength(NamedTuple):
    """Optimizer steps, and the epochs they are; None where that is unknown."""

    steps: int | None
    epochs: float | None


class MemoryPlan(NamedTuple):
    """Bytes by part on one device.

    Attributes:
        weights: Bytes of parameters and buffers.
        gradients: Bytes of the gradients of trained parameters.
        optimizer: Bytes of the optimizer's state.
        activations: Bytes kept for the backward pass.
        loss: Bytes that the loss over the vocabulary takes for a while.
        peak: Most bytes at one time.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    peak: int


class StagePlan(NamedTuple):
    """What one rank of a pipeline holds, in bytes."""

    rank: int
    blocks: str
    parameters: int
    weights_and_state: int
    activations: int


class RankTiles(NamedTuple):
    """The tiles of products whose results have one rank's number of columns.

    Attributes:
        rank: Rank of the layers.
        num_layers: Number of layers with this rank.
        filled: Share of the tiles' columns that the rank fills.
        full_rank: The nearest rank that fills them; None where it is no smaller than dense in one
            of the layers.
    """

    rank: int
    num_layers: int
    filled: float
    full_rank: int | None


class TilePlan(NamedTuple):
    """How full the tiles of low-rank layers are.

    Attributes:
        filled: Share of the operations on tiles of all layers that is of use.
        ranks: The ranks, that of most layers first.
    """

    filled: float
    ranks: list[RankTiles]


def tile_plan(layers: Iterable[tuple[int, int, int]]) -> TilePlan | None:
    """How full ranks leave tiles of `TILE` columns; None without low-rank layers.

    Args:
        layers: Rank, in features and out features of each.

    >>> tile_plan([(224, 768, 3072)])
    TilePlan(filled=0.875, ranks=[RankTiles(rank=224, num_layers=1, filled=0.875, full_rank=256)])
    """
    by_rank: dict[int, list[tuple[int, int]]] = {}
    for rank, *size in layers:
        by_rank.setdefault(rank, []).append((size[0], size[1]))
    if not by_rank:
        return None
    found, used, taken = [], 0, 0
    for rank, sizes in by_rank.items():
        whole = TILE * math.ceil(rank / TILE)
        full = {resolve_rank(rank, *size, multiple=TILE) for size in sizes}
        full_rank = full.pop() if len(full) == 1 else None
        is_full = full_rank is not None and full_rank % TILE == 0
        found.append(RankTiles(rank, len(sizes), rank / whole, full_rank if is_full else None))
        features = sum(map(sum, sizes))
        used, taken = used + rank * features, taken + whole * features
    return TilePlan(used / taken, sorted(found, key=lambda tiles: -tiles.num_layers))


def optimizer_bytes(parameters: Iterable[tuple[int, int]], optimizer: str = "adamw") -> int:
    """The state of AdamW: two means a number, and what goes with them.

    Args:
        parameters: Numbers and bytes per number of each trained parameter.
        optimizer: ``adamw``; ``spectron`` or ``lora_muon``, without what `factor_saving` counts;
            or one in 8 bits: ``adamw_8bit``, ``paged_adamw_8bit``.

    Source: torch.optim.AdamW (a step count in float32 beside each parameter);
    bitsandbytes.optim.optimizer.Optimizer2State (blocks of 256, small parameters in 32 bits).

    >>> optimizer_bytes([(1000, 4)])
    8004
    """
    found = 0
    is_8bit = optimizer.endswith("8bit")
    has_map = False
    for count, width in parameters:
        if is_8bit and count >= _MIN_8BIT:
            found += 2 * count + 2 * 4 * math.ceil(count / _BLOCK)
            has_map = True
        elif is_8bit:
            found += 2 * 4 * count
        else:
            found += 2 * width * count + 4
    return found + (2 * _MAP_BYTES if has_map else 0)


def factor_saving(factors: Iterable[tuple[int, int, int]]) -> int:
    """What the state of ``spectron`` lacks beside AdamW's: one mean per number, and the step count.

    Args:
        factors: Rank, numbers and bytes per number of each; 0 for the rank of a dense matrix that
            is moved alike, and of all under ``lora_muon``, which keeps no vector.

    >>> factor_saving([(10, 1000, 4)])  # a vector of the rank is kept instead
    3964
    """
    return sum((count - rank) * width + 4 for rank, count, width in factors)


def run_length(
    max_steps: int, max_epochs: int | None, batches_per_epoch: int | None, accumulate: int
) -> RunLength:
    """When a run ends: at its steps or its epochs, whichever comes first; -1 sets no limit.

    Args:
        max_steps: Number of optimizer steps.
        max_epochs: Number of passes over the data; None is Lightning's default, 1000 without
            ``max_steps``.
        batches_per_epoch: Batches of one replica; None where the data were not read.
        accumulate: Number of batches per optimizer step.

    >>> run_length(max_steps=-1, max_epochs=3, batches_per_epoch=10, accumulate=4)
    RunLength(steps=9, epochs=3.0)
    """
    if max_epochs is None and max_steps == -1:
        max_epochs = 1000
    steps_per_epoch = None
    if batches_per_epoch is not None:
        steps_per_epoch = math.ceil(batches_per_epoch / accumulate)
    limits = [max_steps] if max_steps != -1 else []
    if max_epochs not in (None, -1):
        if steps_per_epoch is not None:
            limits.append(max_epochs * steps_per_epoch)
        elif not limits:
            return RunLength(None, float(max_epochs))
    if not limits:
        return RunLength(None, None)
    steps = min(limits)
    return RunLength(steps, steps / steps_per_epoch if steps_per_epoch else None)


def batches_seen(num_batches: int, limit: int | float | None) -> int:
    """The batches of an epoch under ``trainer.limit_train_batches``.

    >>> batches_seen(10, 0.25), batches_seen(10, 3), batches_seen(10, None)
    (2, 3, 10)
    """
    if limit is None:
        return num_batches
    return int(num_batches * limit) if isinstance(limit, float) else min(num_batches, limit)


def rank_plans(
    costs: NetworkCosts,
    layout: PipelineLayout,
    workload: Workload,
    balance: Balance,
    blocks_per_stage: Sequence[int] | None = None,
) -> list[StagePlan]:
    """What each rank of a pipeline holds, by the cut that the strategy makes.

    Args:
        costs: Costs of the network's parts.
        layout: Layout of the ranks and their stages.
        workload: Size of a pass.
        balance: Quantity that the cut makes equal.
        blocks_per_stage: Number of blocks of each stage, to cut by hand.

    Raises:
        ValueError: The blocks cannot be cut so.
    """
    if blocks_per_stage:
        spans = given_partition(blocks_per_stage, layout, len(costs.blocks))
    else:
        spans = partition(costs, layout, workload, balance)
    found = []
    for rank in range(layout.num_ranks):
        stages = layout.stages_of(rank)
        parts = [costs.stage(spans[stage]) for stage in stages]
        passes = layout.passes_in_flight(rank) / layout.stages_per_rank
        held = sum(workload.stage_bytes(part, 0.0) for part in parts)
        whole = sum(workload.stage_bytes(part, passes) for part in parts)
        blocks = ", ".join(f"{spans[s].first} to {spans[s].end - 1}" for s in stages)
        parameters = sum(part.parameters for part in parts)
        found.append(StagePlan(rank, blocks, parameters, round(held), round(whole - held)))
    return found


def jsonable(plan: Any) -> Any:
    """Named tuples as objects, the rest as it is."""
    if isinstance(plan, tuple) and hasattr(plan, "_asdict"):
        return {key: jsonable(value) for key, value in plan._asdict().items()}
    if isinstance(plan, list | tuple):
        return [jsonable(value) for value in plan]
    if isinstance(plan, dict):
        return {key: jsonable(value) for key, value in plan.items()}
    return plan
