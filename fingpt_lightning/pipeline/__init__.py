"""A network cut into stages that run on several ranks, microbatch after microbatch."""

from fingpt_lightning.pipeline.partition import (
    Balance,
    Cost,
    NetworkCosts,
    Span,
    Workload,
    given_partition,
    partition,
    to_table,
)
from fingpt_lightning.pipeline.runtime import PipelineRuntime, Sums, sum_over
from fingpt_lightning.pipeline.schedule import (
    PipelineLayout,
    Schedule,
    largest_layout,
    schedule_named,
)
from fingpt_lightning.pipeline.sharding import gathered, joined, own_share, split_like
from fingpt_lightning.pipeline.stage import (
    Stage,
    keep_stages,
    network_costs,
    part_index,
    tied_parameters,
    unused_maps,
)
from fingpt_lightning.pipeline.timeline import Pass, Work, bubble_share, chrome_trace, draw

__all__ = [
    "Balance",
    "Cost",
    "NetworkCosts",
    "Pass",
    "PipelineLayout",
    "PipelineRuntime",
    "Schedule",
    "Span",
    "Stage",
    "Sums",
    "Work",
    "Workload",
    "bubble_share",
    "chrome_trace",
    "draw",
    "gathered",
    "given_partition",
    "joined",
    "keep_stages",
    "largest_layout",
    "network_costs",
    "own_share",
    "part_index",
    "partition",
    "schedule_named",
    "split_like",
    "sum_over",
    "tied_parameters",
    "to_table",
    "unused_maps",
]
