"""Pipelined model parallelism: the blocks of one network on several devices."""

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from transformers import PreTrainedModel
from typing_extensions import override

from fingpt_lightning.models import LossSums, Recompute, recompute_blocks
from fingpt_lightning.pipeline import (
    Balance,
    Pass,
    PipelineLayout,
    PipelineRuntime,
    Span,
    Stage,
    Workload,
    given_partition,
    keep_stages,
    network_costs,
    partition,
    schedule_named,
    sum_over,
    tied_parameters,
    to_table,
)
from fingpt_lightning.strategies.pipeline_checkpoint import (
    WholeNames,
    gather_optimizer_state,
    gather_tensors,
    own_optimizer_state,
)

_PREFIX = "network."
_SIGNS_OF_A_LOST_RANK = ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out")


@runtime_checkable
class PipelinedModule(Protocol):
    """What a module offers for its step to be run stage by stage."""

    network: PreTrainedModel

    def loss_sum_and_tokens(self, hidden: Tensor, labels: Tensor) -> LossSums:
        """Of one microbatch, from the last stage's hidden states."""

    def backward_start(self, loss_sum: Tensor) -> Tensor:
        """What the backward pass begins from."""

    def log_step(self, sums: LossSums) -> None:
        """Takes the sums of a training batch."""

    def log_evaluation(self, sums: LossSums) -> None:
        """Takes the sums of a batch of validation or test."""

    def likeliest_tokens(self, hidden: Tensor) -> Tensor:
        """For prediction."""


class PipelineStrategy(DDPStrategy):
    """Each rank keeps some decoder blocks; the microbatches of a batch follow each other through.

    ``data.batch_size`` is that of one pipeline, whose ranks all read the same batches. Losses and
    weights are those of one device; module, data, callbacks, clipping and accumulation stay as
    they are. Checkpoints are the one file of a run on one device, put together in the host memory
    of rank 0. Processes come from Lightning, torchrun or SLURM, as with DDP, from which this class
    has them; nothing of DDP's wrapper is left.

    Args:
        pipeline_size: Ranks of one pipeline; ``auto`` takes all that ``data_parallel_size`` leaves.
        data_parallel_size: Pipelines that each read their own data; ``auto`` takes all ranks that
            ``pipeline_size`` leaves: 1 where both are ``auto``.
        schedule: GPipe, 1F1B, Interleaved1F1B, InterleavedZeroBubble, ZBVZeroBubble or DualPipeV.
        num_microbatches: Parts of a batch; they divide ``data.batch_size``.
        num_virtual_stages: Stages of each rank; ``auto`` is 1 for GPipe and 1F1B, else 2.
        balance: Whether stages are to take the same time or the same memory.
        blocks_per_stage: The cut by hand; null cuts by ``balance``.
        activation_checkpointing: In place of the module's own ``recompute``; null leaves that.
        process_group_backend: Such as ``nccl`` or ``gloo``; null goes by the device.
        timeout_s: How long a rank waits for another before it ends the run.

    Raises:
        ValueError: The ranks, blocks, microbatches or precision do not fit. All but a wrong number
            of blocks is found before a process is started.
        TypeError: The module is not a `PipelinedModule`.
    """

    def __init__(
        self,
        pipeline_size: int | Literal["auto"] = "auto",
        data_parallel_size: int | Literal["auto"] = "auto",
        schedule: str = "1F1B",
        num_microbatches: int = 8,
        num_virtual_stages: int | Literal["auto"] = "auto",
        balance: Literal["time", "memory"] = "time",
        blocks_per_stage: list[int] | None = None,
        activation_checkpointing: Literal["none", "block", "low_rank"] | None = None,
        process_group_backend: str | None = None,
        timeout_s: float | int = 1800,
    ) -> None:
        if timeout_s <= 0:
            raise ValueError(f"timeout_s {timeout_s} is not above 0")
        for name, size in (
            ("pipeline_size", pipeline_size), ("data_parallel_size", data_parallel_size),
        ):  # fmt: skip
            if size != "auto" and size < 1:
                raise ValueError(f"{name} {size} is below 1")
        super().__init__(
            process_group_backend=process_group_backend, timeout=timedelta(seconds=timeout_s)
        )
        self._pipeline_size, self._data_parallel_size = pipeline_size, data_parallel_size
        self._schedule = schedule_named(schedule)
        self._num_microbatches = num_microbatches
        self._stages_per_rank = (
            self._schedule.default_stages_per_rank
            if num_virtual_stages == "auto"
            else num_virtual_stages
        )
        self._balance, self._blocks_per_stage = Balance(balance), blocks_per_stage
        self._recompute = activation_checkpointing
        self._timeout_s = timeout_s
        self._layout: PipelineLayout | None = None
        self._mesh: DeviceMesh | None = None
        self._ends: dist.ProcessGroup | None = None
        self._spans: list[Span] = []
        self._names: WholeNames | None = None
        self._tied: frozenset[str] = frozenset()
        self._runtime: PipelineRuntime | None = None
        self._fresh: list[tuple[nn.Parameter, Tensor | None]] = []
        self._is_in_window = self._is_mid_window = False
        self._record_next = False

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
        if str(self.precision_plugin.precision).startswith("16"):
            raise ValueError(
                f"trainer.precision {self.precision_plugin.precision}: float16 needs a gradient"
                " scaler, which cannot follow gradients through a schedule; take bf16-mixed"
            )
        self._data_parallel_size = replicas
        self._layout = PipelineLayout(
            self._schedule, pipeline, self._num_microbatches, self._stages_per_rank
        )
        super()._configure_launcher()

    @property
    def layout(self) -> PipelineLayout:
        """The schedule and its sizes; known once a Trainer has the strategy."""
        assert self._layout is not None, "a Trainer lays the pipeline out"
        return self._layout

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self._mesh is None:
            self._meet()
        batch_size = getattr(self._datamodule, "batch_size", None)
        if isinstance(batch_size, int) and batch_size % self._num_microbatches:
            raise ValueError(
                f"num_microbatches {self._num_microbatches} does not divide data.batch_size"
                f" {batch_size}"
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

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        replicas = self._mesh_of("data_parallel")
        return {"num_replicas": replicas.size(), "rank": replicas.get_local_rank()}

    def keep_own_part(self, network: PreTrainedModel) -> None:
        """Takes out of a network what other ranks hold, and says who holds what.

        Args:
            network: Best on the meta device: then this rank never holds more than its part.
        """
        sequence_length = getattr(self._datamodule, "block_length", None) or 1024
        rows = getattr(self._datamodule, "batch_size", None) or self._num_microbatches
        costs = network_costs(network, sequence_length)
        workload = Workload(max(1, rows // self._num_microbatches) * sequence_length)
        if self._blocks_per_stage is None:
            self._spans = partition(costs, self.layout, workload, self._balance)
        else:
            self._spans = given_partition(self._blocks_per_stage, self.layout, len(costs.blocks))
        if self.is_global_zero:
            Console().print(to_table(costs, self._spans, self.layout, workload))
        self._names = WholeNames.of(network, _PREFIX)
        self._tied = frozenset(f"{_PREFIX}{name}" for name in tied_parameters(network))
        keep_stages(network, [self._spans[s] for s in self.layout.stages_of(self._pipeline_rank)])

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        module = self.lightning_module
        if not isinstance(module, PipelinedModule):
            raise TypeError(
                f"PipelineStrategy cannot run {type(module).__name__}: it needs network,"
                " loss_sum_and_tokens, backward_start, log_step, log_evaluation, likeliest_tokens"
            )
        if self._names is None:  # the module was built elsewhere
            self.keep_own_part(module.network)
        if self._recompute is not None:
            recompute_blocks(module.network, Recompute(self._recompute))
        compiled = any(part._compiled_call_impl is not None for part in module.network.modules())
        if compiled and self._schedule.splits_backward:
            raise ValueError(
                f"model.compile: {self._schedule.value} takes the backward pass apart, which"
                " torch.compile does not allow; take 1F1B or Interleaved1F1B"
            )
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            # Else the stages would draw the same dropout masks; data has streams of its own.
            torch.manual_seed(torch.initial_seed() + self.global_rank)
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        self._runtime = self._made_runtime(module)
        self._is_in_window = False

    def _made_runtime(self, module: PipelinedModule) -> PipelineRuntime:
        context = self.precision_plugin.forward_context

        def loss(hidden: Tensor, labels: Tensor) -> LossSums:
            with context():
                return module.loss_sum_and_tokens(hidden, labels)

        own = self.layout.stages_of(self._pipeline_rank)
        return PipelineRuntime(
            self.layout,
            {stage: Stage(module.network, self._spans[stage], context) for stage in own},
            self._pipeline_group,
            self.root_device,
            module.network.config.hidden_size,
            loss,
        )

    @override
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        module, runtime = self._running()
        trainer = self._trainer
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not self._is_in_window:
            # Lightning would free them only after the schedule has made new ones.
            _assign_gradients((p, None) for p in parameters)
        self._is_in_window = True
        replicas = self.distributed_sampler_kwargs["num_replicas"]
        unit = torch.ones((), dtype=torch.float64)
        scale = module.backward_start(unit).item() / (trainer.accumulate_grad_batches * replicas)
        with _told_by_stages():
            sums = runtime.train(
                batch["input_ids"], batch["labels"], batch.get("position_ids"), scale,
                record=self._record_next,
            )  # fmt: skip
        self._record_next = False
        # Lightning sets gradients to zero between this step and its backward pass.
        self._fresh = [(p, p.grad) for p in parameters]
        _assign_gradients((p, None) for p in parameters)
        module.log_step(LossSums(*sums))
        start: Tensor = module.backward_start(sums.loss_sum)
        return start

    @override
    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Delivers the gradients that the schedule has made.

        The last call of a window adds them up over replicas and both copies of a tied embedding.
        """
        module, _ = self._running()
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        _assign_gradients(self._fresh)
        self._fresh = []
        if not self._is_mid_window:
            self._is_in_window = False
            self._reduce_gradients(module)
        return self.precision_plugin.post_backward(closure_loss, module)

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        self._is_mid_window = True
        try:
            yield
        finally:
            self._is_mid_window = False

    def _reduce_gradients(self, module: LightningModule) -> None:
        if self._ends is not None:
            named = module.named_parameters()
            tied = [p.grad for name, p in named if name in self._tied and p.grad is not None]
            sum_over(tied, self._ends)
        replicas = self._mesh_of("data_parallel")
        if replicas.size() > 1:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            sum_over(gradients, replicas.get_group())

    def gradient_norm(self, parameters: list[nn.Parameter]) -> Tensor:
        """Over all stages, tied weights once; the ranks of the pipeline call it together."""
        module, _ = self._running()
        elsewhere = {id(p) for p in module.parameters()} - {id(p) for p in self._own_names()}
        counted = [p.grad for p in parameters if p.grad is not None and id(p) not in elsewhere]
        square: Tensor = get_total_norm(counted, foreach=True).square().to(self.root_device)
        dist.all_reduce(square, group=self._pipeline_group)
        return square.sqrt()

    @override
    def validation_step(self, batch: Mapping[str, Any], *args: Any) -> None:
        module, runtime = self._running()
        with _told_by_stages():
            sums = runtime.evaluate(batch["input_ids"], batch["labels"], batch.get("position_ids"))
        module.log_evaluation(LossSums(*sums))

    @override
    def test_step(self, batch: Mapping[str, Any], *args: Any) -> None:
        self.validation_step(batch)

    @override
    def predict_step(self, batch: Mapping[str, Any], *args: Any) -> Tensor:
        module, runtime = self._running()

        def likeliest(hidden: Tensor) -> Tensor:
            with self.precision_plugin.forward_context():
                tokens: Tensor = module.likeliest_tokens(hidden)
                return tokens

        with _told_by_stages():
            return runtime.predict(batch["input_ids"], batch.get("position_ids"), likeliest)

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

    def record_next_step(self) -> None:
        """Lets the next training step note when each pass began and ended."""
        self._record_next = True

    def recorded_passes(self) -> list[Pass]:
        """Of this pipeline's ranks in the step that was recorded; they call it together."""
        _, runtime = self._running()
        return runtime.passes()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        if not self._saves:
            return {}
        module = self.lightning_module
        assert module is not None
        assert self._names is not None
        own, names = set(self._own_names().values()), self._names
        answered = {
            key: tensor
            for key, tensor in module.state_dict().items()
            if key in own or key not in names.first_name
        }
        gathered = gather_tensors(answered, self._pipeline_group, self.root_device)
        first_name = names.first_name
        return {key: gathered[first_name.get(key, key)] for key in names.state if gathered}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if not self._saves:
            return {}
        assert self._names is not None
        return gather_optimizer_state(
            _bare(optimizer), self._own_names(), self._names, self._pipeline_group,
            self.root_device,
        )  # fmt: skip

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None
        if self._names is None:
            assert isinstance(module, PipelinedModule)
            self.keep_own_part(module.network)
        assert self._names is not None
        state = checkpoint["state_dict"]
        if strict and (wrong := set(self._names.state) ^ set(state)):
            raise RuntimeError(
                f"{len(wrong)} weights are in the checkpoint or the network alone: {min(wrong)},"
                " ..."
            )
        own = {key: state[key] for key in module.state_dict() if key in state}
        module.load_state_dict(own, strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        module = self.lightning_module
        assert module is not None
        assert self._names is not None
        names = {p: name for name, p in module.named_parameters()}
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            own = own_optimizer_state(saved, optimizer, names, self._names, self._pipeline_group)
            optimizer.load_state_dict(own)

    @property
    def _saves(self) -> bool:
        return self._mesh_of("data_parallel").get_local_rank() == 0

    def _own_names(self) -> dict[nn.Parameter, str]:
        """Names of the parameters this rank answers for: of tied ones the first stage does."""
        assert self.lightning_module is not None
        is_other_end = self._pipeline_rank != self.layout.rank_of(0)
        return {
            p: name
            for name, p in self.lightning_module.named_parameters()
            if not (is_other_end and name in self._tied)
        }

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
    def _trainer(self) -> Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    @property
    def _datamodule(self) -> Any:
        return getattr(self._trainer, "datamodule", None)

    def _running(self) -> tuple[Any, PipelineRuntime]:
        assert self._runtime is not None, "the strategy is not set up"
        return self.lightning_module, self._runtime

    @override
    def on_exception(self, exception: BaseException) -> None:
        if any(sign in str(exception) for sign in _SIGNS_OF_A_LOST_RANK):
            exception.args = (
                f"rank {self.global_rank} lost another rank of the pipeline, which failed (its own"
                f" message tells why) or gave no answer for timeout_s {self._timeout_s:g}",
            )


@contextmanager
def _told_by_stages() -> Iterator[None]:
    """Raises what a stage raised, without torch's description of every tensor around it."""
    try:
        yield
    except RuntimeError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


def _assign_gradients(gradients: Iterable[tuple[nn.Parameter, Tensor | None]]) -> None:
    for parameter, gradient in gradients:
        parameter.grad = gradient


def _bare(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
