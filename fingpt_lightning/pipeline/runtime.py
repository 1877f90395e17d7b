"""Runs a network's stages over the ranks of a pipeline: one training step, or forward alone.

Axes: B batch, T tokens, D width.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    get_schedule_class,
)
from typing_extensions import override

from fingpt_lightning.models.vocabulary_loss import row_sums
from fingpt_lightning.pipeline.schedule import PipelineLayout
from fingpt_lightning.pipeline.sharding import keep_sums_in_reduce_dtype
from fingpt_lightning.pipeline.stage import Stage
from fingpt_lightning.pipeline.timeline import Pass, Work

_IGNORED_LABEL = -100
_BUCKET_BYTES = 2**25


class Sums(NamedTuple):
    """What the microbatches of a batch add up to, equal on all ranks of the pipeline."""

    loss_sum: Float[Tensor, ""]
    num_tokens: Int[Tensor, ""]


LossFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Hidden states and labels of a microbatch to summed loss and number of supervised tokens."""


class PipelineRuntime:
    """This process's stages and what connects them with those of the other ranks.

    All ranks of the pipeline make it and call its methods together, with the same batches.

    Args:
        layout: Schedule and its sizes.
        stages: Stages of this rank by index, in order.
        group: Processes of the pipeline, in the order of their ranks.
        device: Device of the stages.
        width: Features of the hidden states between stages.
        loss: Loss, called on the rank of the last stage.
        batch_rows: Rows of a full batch, where that is known before the first one.
    """

    def __init__(
        self,
        layout: PipelineLayout,
        stages: Mapping[int, Stage],
        group: dist.ProcessGroup,
        device: torch.device,
        width: int,
        loss: LossFunction,
        batch_rows: int = 0,
    ) -> None:
        self.layout, self.stages, self.group = layout, dict(stages), group
        self.rank = dist.get_rank(group)
        self._device, self._width, self._loss = device, width, loss
        self._dtype = next(iter(self.stages.values())).dtype
        self._last_rank = layout.rank_of(layout.num_stages - 1)
        self._full_rows = batch_rows
        self._shape: tuple[int, int] | None = None
        self._schedule: PipelineScheduleSingle | PipelineScheduleMulti | None = None
        self._scale = 1.0
        self._step_sums: list[tuple[Tensor, Tensor]] = []
        self._recorder: _Recorder | None = None

    @property
    def has_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.rank == self._last_rank

    def train(
        self,
        input_ids: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        position_ids: Int[Tensor, "B T"] | None = None,
        scale: float = 1.0,
        record: bool = False,
    ) -> Sums:
        """Adds the gradients of ``scale`` times the summed loss to those of the stages.

        A batch smaller than the largest so far is filled up with unsupervised rows.

        Args:
            input_ids: Tokens of the whole batch; rows are dealt out in order to the microbatches.
            labels: Labels; -100 where nothing is supervised.
            position_ids: Positions where they do not count from 0.
            scale: Scale of the gradients.
            record: Whether `passes` are recorded; device and ranks then wait for each other.

        Raises:
            ValueError: The rows of a full batch cannot be dealt out evenly.
        """
        parts = self.layout.num_microbatches
        self._full_rows = max(self._full_rows, len(input_ids))
        if self._full_rows % parts:
            raise ValueError(
                f"a batch of {self._full_rows} rows cannot be cut into num_microbatches {parts}:"
                " change data.batch_size or num_microbatches"
            )
        missing = -len(input_ids) % parts
        given: dict[str, Any] = {}
        if position_ids is not None:
            given["position_ids"] = _padded(position_ids, missing, 0)
        input_ids = _padded(input_ids, missing, 0)
        labels = _padded(labels, missing, _IGNORED_LABEL)
        self._recorder = _Recorder(self.rank, self._device, self.group) if record else None
        self._scale = scale
        self._step_sums.clear()
        schedule = self._schedule_for((len(input_ids) // parts, input_ids.shape[1]))
        schedule.step(
            *((input_ids,) if 0 in self.stages else ()),
            target=labels if self.has_last_stage else None,
            losses=[] if self.has_last_stage else None,
            return_outputs=False,
            **given,
        )
        return self._shared(self._step_sums)

    @torch.no_grad()
    def evaluate(
        self,
        input_ids: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        position_ids: Int[Tensor, "B T"] | None = None,
    ) -> Sums:
        """The sums of a batch of any size, without gradients."""
        hidden = self._forward(input_ids, position_ids)
        parts = labels.split([len(h) for h in hidden]) if hidden else ()
        return self._shared([self._loss(h, p) for h, p in zip(hidden, parts, strict=True)])

    @torch.no_grad()
    def evaluate_rows(
        self,
        input_ids: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        position_ids: Int[Tensor, "B T"] | None = None,
    ) -> Float64[Tensor, "B 2"]:
        """Summed loss and supervised tokens of each row, without gradients, on all ranks."""
        hidden = self._forward(input_ids, position_ids)
        sums = torch.zeros(len(input_ids), 2, dtype=torch.float64, device=self._device)
        if hidden:
            parts = labels.split([len(h) for h in hidden])
            rows = [row_sums(self._loss, h, p) for h, p in zip(hidden, parts, strict=True)]
            sums = torch.cat(rows)
        dist.broadcast(sums, group=self.group, group_src=self._last_rank)
        return sums

    def passes(self) -> list[Pass]:
        """What the ranks did in the last step with ``record``; all ranks call it together."""
        assert self._recorder is not None, "no step was recorded"
        gathered: list[list[Pass]] = [[] for _ in range(self.layout.num_ranks)]
        dist.all_gather_object(gathered, self._recorder.passes, group=self.group)
        return [p for of_rank in gathered for p in of_rank]

    def _schedule_for(
        self, shape: tuple[int, int]
    ) -> PipelineScheduleSingle | PipelineScheduleMulti:
        """The schedule whose buffers are of this shape: those of one shape are held at a time."""
        if self._schedule is not None and shape == self._shape:
            return self._schedule
        self._schedule, self._shape = None, shape
        stages = [self._connected(index, shape) for index in self.stages]
        kind = get_schedule_class(self.layout.schedule.value)
        single = self.layout.schedule.is_single
        self._schedule = kind(
            stages[0] if single else stages,
            n_microbatches=self.layout.num_microbatches,
            loss_fn=self._start_of_backward,
            scale_grads=False,
        )
        return self._schedule

    def _connected(self, index: int, shape: tuple[int, int]) -> "_ObservedStage":
        # Shapes are given beforehand, or torch runs every stage once to find out.
        hidden = torch.empty(*shape, self._width, dtype=self._dtype, device="meta")
        hidden.requires_grad_()
        tokens = torch.empty(shape, dtype=torch.int64, device="meta")
        stage = _ObservedStage(
            self.stages[index], index, self.layout.num_stages, self._device,
            input_args=tokens if index == 0 else hidden, output_args=hidden, group=self.group,
        )  # fmt: skip
        stage.runtime = self
        return stage

    def _start_of_backward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Runs the loss forward and backward; returns what has its gradient with respect to hidden.

        So the head's gradient is not kept for every microbatch in flight, and the loss is not gone
        through twice where gradients of inputs and of weights are computed apart.
        """
        microbatch = len(self._step_sums)
        with self._noting(self.layout.num_stages - 1, microbatch, Work.FORWARD):
            leaf = hidden.detach().requires_grad_()
            loss_sum, num_tokens = self._loss(leaf, labels)
            (loss_sum * self._scale).backward()
        self._step_sums.append((loss_sum.detach(), num_tokens))
        assert leaf.grad is not None
        return (hidden * leaf.grad).sum()

    def _noting(self, stage: int, microbatch: int, work: Work) -> "_Noted":
        return _Noted(self._recorder, stage, microbatch, work)

    def _shared(self, sums: list[tuple[Tensor, Tensor]]) -> Sums:
        numbers = torch.zeros(2, dtype=torch.float64, device=self._device)
        for loss_sum, num_tokens in sums:
            numbers += torch.stack([loss_sum.double(), num_tokens.double()])
        dist.broadcast(numbers, group=self.group, group_src=self._last_rank)
        return Sums(numbers[0], numbers[1].long())

    def _forward(self, input_ids: Tensor, position_ids: Tensor | None) -> list[Tensor]:
        """The last stage's hidden states by microbatch; on other ranks nothing."""
        ids = input_ids.chunk(self.layout.num_microbatches)
        positions: list[Tensor | None] = [None] * len(ids)
        if position_ids is not None:
            positions = list(position_ids.chunk(self.layout.num_microbatches))
        results: list[Tensor] = []
        for index, stage in self.stages.items():
            inputs, results = results, []
            sends: list[tuple[dist.Work | None, Tensor]] = []
            came_from = self.layout.rank_of(index - 1) if index else self.rank
            is_last = index == self.layout.num_stages - 1
            goes_to = self.rank if is_last else self.layout.rank_of(index + 1)
            # Around the loop the first rank receives when it has sent: earlier sends would wait
            # for it on a connection that orders them, and it for us.
            is_wrap = goes_to < self.rank and not self.layout.schedule.is_v_shaped
            held: list[Tensor] = []
            for part, its_ids in enumerate(ids):
                if index == 0:
                    x = its_ids
                elif came_from == self.rank:
                    x = inputs[part]
                else:
                    x = torch.empty(
                        *its_ids.shape, self._width, dtype=self._dtype, device=self._device
                    )
                    dist.recv(x, group=self.group, group_src=came_from)
                out = stage(x, positions[part])
                if goes_to == self.rank:
                    results.append(out)
                elif is_wrap:
                    held.append(out)
                else:
                    sends.append(self._send(out, goes_to))
            sends += [self._send(out, goes_to) for out in held]
            for work, _ in sends:
                assert work is not None
                work.wait()
        return results

    def _send(self, hidden: Tensor, goes_to: int) -> tuple[dist.Work | None, Tensor]:
        # The tensor stays alive until it has been sent.
        hidden = hidden.contiguous()
        return dist.isend(hidden, group=self.group, group_dst=goes_to), hidden


class _ObservedStage(PipelineStage):
    """A stage whose passes are noted while a step is recorded."""

    runtime: PipelineRuntime

    @override
    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.runtime._noting(self.stage_index, fwd_chunk_id, Work.FORWARD):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    @override
    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        work = Work.BACKWARD if kwargs.get("full_backward", True) else Work.INPUT
        with self.runtime._noting(self.stage_index, bwd_chunk_id, work):
            super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    @override
    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        with self.runtime._noting(self.stage_index, bwd_chunk_id, Work.WEIGHT):
            super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
            keep_sums_in_reduce_dtype(self.submod)


class _Recorder:
    """The passes of one rank in one step, on a clock that all ranks start together."""

    def __init__(self, rank: int, device: torch.device, group: dist.ProcessGroup) -> None:
        self.rank, self.device = rank, device
        self.passes: list[Pass] = []
        dist.barrier(group=group)
        self.began_s = time.perf_counter()

    def now_s(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.began_s


class _Noted:
    """Notes when its body began and ended, if there is a recorder."""

    def __init__(self, recorder: _Recorder | None, stage: int, microbatch: int, work: Work) -> None:
        self._recorder, self._what = recorder, (stage, microbatch, work)

    def __enter__(self) -> None:
        if self._recorder is not None:
            self._start_s = self._recorder.now_s()

    def __exit__(self, *_: object) -> None:
        if self._recorder is not None:
            stage, microbatch, work = self._what
            end_s = self._recorder.now_s()
            self._recorder.passes.append(
                Pass(self._recorder.rank, stage, microbatch, work, self._start_s, end_s)
            )


def sum_over(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Adds tensors up over a group, in place, many in one message.

    All ranks of the group call it together, with tensors of equal sizes.
    """
    buckets: dict[torch.dtype, list[list[Tensor]]] = {}
    for tensor in tensors:
        of_dtype = buckets.setdefault(tensor.dtype, [[]])
        if sum(t.nbytes for t in of_dtype[-1]) + tensor.nbytes > _BUCKET_BYTES and of_dtype[-1]:
            of_dtype.append([])
        of_dtype[-1].append(tensor)
    for bucket in (bucket for of_dtype in buckets.values() for bucket in of_dtype):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat, group=group)
        parts = flat.split([tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def _padded(rows: Tensor, missing: int, value: int) -> Tensor:
    if not missing:
        return rows
    return torch.cat([rows, rows.new_full((missing, rows.shape[1]), value)])
