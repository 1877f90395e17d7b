"""Where to cut a network into stages, so that the slowest or the fullest is as small as can be."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from rich.table import Table

from fingpt_lightning.pipeline.schedule import PipelineLayout
from fingpt_lightning.units import GIB

_TRAINING_COPIES = 4
"""Numbers held for a trained parameter: itself, its gradient and AdamW's two means."""


class Balance(StrEnum):
    """What a partition makes as equal as can be."""

    TIME = "time"
    MEMORY = "memory"


@dataclass(frozen=True)
class Cost:
    """What a part of a network takes.

    Args:
        parameters: Count of all numbers of its weights.
        flops_per_token: Floating-point operations of the forward pass, 2 for a multiply-add.
        activations_per_token: Numbers kept for the backward pass.
        frozen_parameters: Count of those that are not trained.
        frozen_bytes: Bytes in which the frozen numbers are stored.
    """

    parameters: int = 0
    flops_per_token: int = 0
    activations_per_token: int = 0
    frozen_parameters: int = 0
    frozen_bytes: int = 0

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(
            self.parameters - other.parameters,
            self.flops_per_token - other.flops_per_token,
            self.activations_per_token - other.activations_per_token,
            self.frozen_parameters - other.frozen_parameters,
            self.frozen_bytes - other.frozen_bytes,
        )

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.parameters + other.parameters,
            self.flops_per_token + other.flops_per_token,
            self.activations_per_token + other.activations_per_token,
            self.frozen_parameters + other.frozen_parameters,
            self.frozen_bytes + other.frozen_bytes,
        )


@dataclass(frozen=True)
class NetworkCosts:
    """The costs of a network's parts, in their order.

    Args:
        front: Cost of the part before the blocks, which stays on the first stage: the embedding.
        blocks: Costs of the decoder blocks, which may be parted anywhere.
        back: Cost of the part after them, which stays on the last stage: norm and head, with a copy
            of its own where the head is tied to the embedding.
    """

    front: Cost
    blocks: tuple[Cost, ...]
    back: Cost

    def stage(self, span: "Span") -> Cost:
        """The cost of a stage."""
        cost = self._sums[span.end] - self._sums[span.first]
        if span.is_first:
            cost += self.front
        if span.is_last:
            cost += self.back
        return cost

    @cached_property
    def _sums(self) -> list[Cost]:
        """Costs of the first blocks, none to all: a stage is the difference of two."""
        return list(itertools.accumulate(self.blocks, initial=Cost()))


class Span(NamedTuple):
    """The blocks of one stage, from ``first`` to before ``end``, and whether it is at an end."""

    first: int
    end: int
    is_first: bool
    is_last: bool


def spans_of(blocks_per_stage: Sequence[int]) -> list[Span]:
    """The stages with so many blocks each.

    >>> [(span.first, span.end) for span in spans_of([7, 5])]
    [(0, 7), (7, 12)]
    """
    bounds = [0, *itertools.accumulate(blocks_per_stage)]
    last = len(blocks_per_stage) - 1
    return [
        Span(first, end, is_first=stage == 0, is_last=stage == last)
        for stage, (first, end) in enumerate(itertools.pairwise(bounds))
    ]


def minimax(
    num_blocks: int, num_stages: int, cost_of: Callable[[int, int, int], float | int]
) -> list[int]:
    """Blocks per stage with the smallest possible largest cost; among those a rather even one.

    Exact, by dynamic programming over (stage, end): ``num_stages num_blocks^2`` evaluations.

    Args:
        num_blocks: Number of blocks to part, in order, at least one per stage.
        num_stages: Number of parts.
        cost_of: Function ``(stage, first, end) -> cost``.

    Raises:
        ValueError: There are more stages than blocks.
    """
    if num_stages > num_blocks:
        raise ValueError(
            f"{num_stages} stages are more than the {num_blocks} blocks of the network: lower"
            " pipeline_size or num_virtual_stages"
        )
    # (largest cost, sum of squares, blocks of each stage) of the best parting up to a block.
    best: dict[int, tuple[float | int, float | int, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(num_stages):
        ends = range(stage + 1, num_blocks - (num_stages - 1 - stage) + 1)
        extended = {}
        for end in ends:
            candidates = []
            for first, (largest, squares, sizes) in best.items():
                if first < end:
                    cost = cost_of(stage, first, end)
                    whole = (max(largest, cost), squares + cost**2, (*sizes, end - first))
                    candidates.append(whole)
            extended[end] = min(candidates)
        best = extended
    return list(best[num_blocks][2])


@dataclass(frozen=True)
class Workload:
    """What memory depends on beside the network.

    Args:
        tokens_per_microbatch: Tokens of each pass.
        bytes_per_number: Bytes per number of trained weights, their gradients and AdamW's state.
        bytes_per_activation: Bytes per number kept for the backward pass.
        num_shards: Ranks among which FSDP2 splits all that is held for a trained parameter. While a
            batch runs, its weight and its gradient are there whole beside the shares.
    """

    tokens_per_microbatch: int
    bytes_per_number: int = 4
    bytes_per_activation: float | int = 4
    num_shards: int = 1

    def stage_bytes(self, cost: Cost, passes_in_flight: float) -> float:
        """Weights, gradients, AdamW's state and kept activations of a stage."""
        copies = _TRAINING_COPIES / self.num_shards + (2 if self.num_shards > 1 else 0)
        trained = copies * (cost.parameters - cost.frozen_parameters)
        kept = cost.activations_per_token * self.tokens_per_microbatch * passes_in_flight
        return (
            self.bytes_per_number * trained + cost.frozen_bytes + self.bytes_per_activation * kept
        )


def partition(
    costs: NetworkCosts,
    layout: PipelineLayout,
    workload: Workload,
    balance: Balance = Balance.TIME,
) -> list[Span]:
    """The stages of a network.

    Args:
        costs: Costs of its parts.
        layout: Number of stages and of the passes that each holds.
        workload: Size of a pass.
        balance: Quantity to make as equal as can be over the stages.

    Raises:
        ValueError: There are more stages than blocks.
    """
    num_blocks = len(costs.blocks)

    def cost_of(stage: int, first: int, end: int) -> float | int:
        cost = costs.stage(Span(first, end, stage == 0, stage == layout.num_stages - 1))
        if balance is Balance.TIME:
            return cost.flops_per_token
        return workload.stage_bytes(cost, _passes_per_stage(layout, stage))

    return spans_of(minimax(num_blocks, layout.num_stages, cost_of))


def given_partition(
    blocks_per_stage: Sequence[int], layout: PipelineLayout, num_blocks: int
) -> list[Span]:
    """The stages as someone wants them.

    Raises:
        ValueError: The numbers do not fit the stages or the blocks.
    """
    fits = len(blocks_per_stage) == layout.num_stages and sum(blocks_per_stage) == num_blocks
    if not fits or min(blocks_per_stage) < 1:
        raise ValueError(
            f"blocks_per_stage {list(blocks_per_stage)}: {layout.num_stages} numbers above 0 that"
            f" add up to the {num_blocks} blocks are wanted"
        )
    return spans_of(blocks_per_stage)


def to_table(
    costs: NetworkCosts, spans: Sequence[Span], layout: PipelineLayout, workload: Workload
) -> Table:
    """One row per stage: its blocks, parameters, share of the work and memory in training."""
    table = Table(
        title=f"{layout.schedule.value}, {layout.num_stages} stages on {layout.num_ranks} ranks,"
        f" {layout.num_microbatches} microbatches"
    )
    columns = ("stage", "rank", "blocks", "parameters (M)", "share of work", "memory (GiB)")
    for column in columns:
        table.add_column(column, justify="right")
    stages = [costs.stage(span) for span in spans]
    all_flops = sum(cost.flops_per_token for cost in stages)
    for stage, (span, cost) in enumerate(zip(spans, stages, strict=True)):
        held = workload.stage_bytes(cost, _passes_per_stage(layout, stage))
        table.add_row(
            str(stage),
            str(layout.rank_of(stage)),
            f"{span.first} to {span.end - 1}",
            f"{cost.parameters / 1e6:,.2f}",
            f"{cost.flops_per_token / max(1, all_flops):.1%}",
            f"{held / GIB:,.2f}",
        )
    slowest = max(cost.flops_per_token for cost in stages)
    evenness = all_flops / max(1, slowest * len(stages))
    table.caption = (
        f"bubble by formula {layout.bubble_share:.1%}; the slowest stage keeps the others at"
        f" {evenness:.1%}"
    )
    return table


def _passes_per_stage(layout: PipelineLayout, stage: int) -> float:
    return layout.passes_in_flight(layout.rank_of(stage)) / layout.stages_per_rank
