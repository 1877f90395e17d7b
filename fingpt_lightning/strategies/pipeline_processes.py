"""The processes of a pipeline: which one is where, and whom it talks to."""

from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from typing_extensions import override

from fingpt_lightning.pipeline import PipelineLayout, largest_layout, schedule_named
from fingpt_lightning.strategies.watched import WatchedRanks

PACKED_ROWS = (
    "lays the rows of a batch one behind the other, which cannot be cut into microbatches: take"
    " data.batching padded, whose losses and gradients are equal"
)


class PipelineProcesses(WatchedRanks, DDPStrategy):
    """Ranks as pipelines side by side: how many, in which order, with which schedule.

    What ``DDPStrategy`` does to start processes and to let them meet is all that is left of it.
    For the arguments see `PipelineStrategy`.
    """

    def __init__(
        self,
        pipeline_size: int | Literal["auto"],
        data_parallel_size: int | Literal["auto"],
        data_parallel: Literal["replicate", "shard"],
        schedule: str,
        num_microbatches: int | Literal["auto"],
        num_virtual_stages: int | Literal["auto"],
        process_group_backend: str | None,
        timeout_s: float | int,
        start_timeout_s: float | int,
    ) -> None:
        if data_parallel not in ("replicate", "shard"):
            raise ValueError(f"data_parallel {data_parallel!r} is neither replicate nor shard")
        for name, size in (
            ("pipeline_size", pipeline_size), ("data_parallel_size", data_parallel_size),
            ("num_microbatches", num_microbatches), ("num_virtual_stages", num_virtual_stages),
        ):  # fmt: skip
            if size != "auto" and size < 1:
                raise ValueError(f"{name} {size} is below 1")
        super().__init__(
            timeout_s=timeout_s,
            start_timeout_s=start_timeout_s,
            process_group_backend=process_group_backend,
        )
        self._pipeline_size, self._data_parallel_size = pipeline_size, data_parallel_size
        self._schedule = schedule_named(schedule)
        self._num_microbatches = num_microbatches
        self._stages_per_rank = (
            self._schedule.default_stages_per_rank
            if num_virtual_stages == "auto"
            else num_virtual_stages
        )
        self._shards = data_parallel == "shard"
        self._layout: PipelineLayout | None = None
        self._mesh: DeviceMesh | None = None
        self._ends: dist.ProcessGroup | None = None
        self._passes: dist.ProcessGroup | None = None

    @override
    def _configure_launcher(self) -> None:
        num_ranks = self.num_nodes * self.num_processes
        pipeline, replicas = self._pipeline_size, self._data_parallel_size
        if pipeline == "auto":
            pipeline = num_ranks // (1 if replicas == "auto" else replicas)
        if replicas == "auto":
            replicas = num_ranks // pipeline
        if pipeline * replicas != num_ranks:
            raise ValueError(
                f"pipeline_size {pipeline} x data_parallel_size {replicas} are not the {num_ranks}"
                " ranks of trainer.devices x trainer.num_nodes: leave one at auto"
            )
        if pipeline == 1:
            raise ValueError(
                "trainer.strategy PipelineStrategy parts a network among ranks, and a pipeline has"
                " one: raise trainer.devices or leave the strategy out"
            )
        if self._shards and replicas == 1:
            raise ValueError(
                "data_parallel shard splits a stage among pipelines, and data_parallel_size is 1:"
                " raise trainer.devices or take replicate"
            )
        if str(self.precision_plugin.precision).startswith("16"):
            raise ValueError(
                f"trainer.precision {self.precision_plugin.precision}: float16 needs a gradient"
                " scaler, which cannot follow gradients through a schedule; take bf16-mixed"
            )
        self._data_parallel_size = replicas
        count = self._num_microbatches
        if count == "auto":  # until there is a batch to cut
            count = 4 * pipeline
        self._layout = PipelineLayout(self._schedule, pipeline, count, self._stages_per_rank)
        super()._configure_launcher()

    @property
    def layout(self) -> PipelineLayout:
        """The schedule and its sizes, once a run begins; before, for a batch that suits them."""
        assert self._layout is not None, "a Trainer lays the pipeline out"
        return self._layout

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self._mesh is None:
            self._meet()
        if self._shards:
            assert self.lightning_module is not None
            self.lightning_module._device_mesh = self._mesh  # by which a module shards itself
        self._fit_to_data()

    def _fit_to_data(self) -> None:
        """Chooses the number of microbatches, or raises if they cannot be cut out of a batch."""
        datamodule, count = self._datamodule, self._num_microbatches
        batching = getattr(datamodule, "batching", None)
        trainer = None if self.lightning_module is None else self.lightning_module.trainer
        if batching is not None and trainer and trainer.state.fn == TrainerFn.PREDICTING:
            raise ValueError(
                "predict answers no questions through a pipeline, whose ranks hold a part of the"
                " network each: take ddp or one device, or fingpt evaluate"
            )
        if (batching or "padded") != "padded":
            raise ValueError(f"data.batching {batching} {PACKED_ROWS}")
        batch_size = getattr(datamodule, "batch_size", None)
        if count == "auto":
            if not isinstance(batch_size, int):
                raise ValueError(
                    "num_microbatches auto goes by data.batch_size, which"
                    f" {type(datamodule).__name__} has not: give a number"
                )
            ranks, stages = self.layout.num_ranks, self._stages_per_rank
            self._layout = largest_layout(self._schedule, ranks, stages, batch_size)
        elif isinstance(batch_size, int) and batch_size % count:
            raise ValueError(
                f"num_microbatches {count} does not divide data.batch_size {batch_size}: take auto,"
                " or change one of them"
            )

    def _meet(self) -> None:
        replicas = self._data_parallel_size
        assert isinstance(replicas, int)
        self._mesh = init_device_mesh(
            self.root_device.type,
            (replicas, self.layout.num_ranks),
            mesh_dim_names=("data_parallel", "pipeline"),
        )
        first, last = (self.layout.rank_of(s) for s in (0, self.layout.num_stages - 1))
        if first != last:
            for pipeline in self._mesh.mesh.tolist():  # every process makes every group
                ends = dist.new_group([pipeline[first], pipeline[last]])
                if self.global_rank in pipeline:
                    self._ends = ends if self._pipeline_rank in (first, last) else None

    @override
    def wait_less(self) -> None:
        super().wait_less()
        limit = timedelta(seconds=self._timeout_s)
        groups = [self._ends]
        groups += [self._mesh_of(axis).get_group() for axis in ("pipeline", "data_parallel")]
        for group in groups:
            if group is not None:
                _set_pg_timeout(limit, group)

    def _made_passes(self) -> dist.ProcessGroup:
        """A group for what stages send each other; the ranks make it together.

        Gloo bounds sending and receiving by the limit that a group was made with, which is, for
        all other groups, that of the start.
        """
        if self._passes is None:
            assert self._mesh is not None
            limit = timedelta(seconds=self._timeout_s)
            for pipeline in self._mesh.mesh.tolist():  # every process makes every group
                group = dist.new_group(pipeline, timeout=limit)
                if self.global_rank in pipeline:
                    self._passes = group
        assert self._passes is not None
        return self._passes

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        replicas = self._mesh_of("data_parallel")
        return {"num_replicas": replicas.size(), "rank": replicas.get_local_rank()}

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Sums are over replicas: the ranks of one pipeline have the same batch and figures."""
        if group is None and reduce_op in ("sum", dist.ReduceOp.SUM):
            group = self._mesh_of("data_parallel").get_group()
        return super().reduce(tensor, group, reduce_op)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        votes = torch.tensor(float(decision), device=self.root_device)
        dist.all_reduce(votes)
        return votes.item() == self.world_size if all else bool(votes)

    @property
    def _saves(self) -> bool:
        return self._mesh_of("data_parallel").get_local_rank() == 0

    def _mesh_of(self, axis: str) -> DeviceMesh:
        assert self._mesh is not None, "the processes have not met"
        return self._mesh[axis]

    @property
    def _pipeline_group(self) -> dist.ProcessGroup:
        return self._mesh_of("pipeline").get_group()

    @property
    def _pipeline_rank(self) -> int:
        return self._mesh_of("pipeline").get_local_rank()

    @property
    def _datamodule(self) -> Any:
        assert self.lightning_module is not None
        return getattr(self.lightning_module.trainer, "datamodule", None)
