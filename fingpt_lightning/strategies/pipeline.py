"""Pipelined model parallelism: the blocks of one network on several devices."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from transformers import PreTrainedModel
from typing_extensions import override

from fingpt_lightning.low_rank.adapters import FrozenBase
from fingpt_lightning.low_rank.cpu_products import faster_products
from fingpt_lightning.models import LossSums, Recompute, recompute_blocks
from fingpt_lightning.pipeline import (
    Balance,
    Pass,
    PipelineRuntime,
    Span,
    Stage,
    Workload,
    gathered,
    given_partition,
    keep_stages,
    network_costs,
    own_share,
    part_index,
    partition,
    split_like,
    sum_over,
    tied_parameters,
    to_table,
    unused_maps,
)
from fingpt_lightning.strategies.checkpoint_files import WholeCheckpoints
from fingpt_lightning.strategies.pipeline_checkpoint import (
    WholeNames,
    gather_optimizer_state,
    gather_tensors,
    own_optimizer_state,
)
from fingpt_lightning.strategies.pipeline_processes import PACKED_ROWS, PipelineProcesses

_PREFIX = "network."


@runtime_checkable
class PipelinedModule(Protocol):
    """What a module offers for its step to be run stage by stage."""

    network: PreTrainedModel

    def loss_sum_and_tokens(self, hidden: Tensor, labels: Tensor) -> LossSums:
        """Loss and tokens of one microbatch, from the last stage's hidden states."""

    def backward_start(self, loss_sum: Tensor) -> Tensor:
        """What the backward pass begins from."""

    def log_step(self, sums: LossSums) -> None:
        """Takes the sums of a training batch."""

    def log_evaluation(self, sums: LossSums) -> None:
        """Takes the sums of a batch of validation or test."""

    def block_predictions(self, batch: Any, sums: Tensor) -> list[Any]:
        """What is predicted for the rows of a batch, from their losses."""


class PipelineStrategy(PipelineProcesses):
    """Each rank keeps some decoder blocks; the microbatches of a batch follow each other through.

    ``data.batch_size`` is that of one pipeline, whose ranks all read the same batches. Losses and
    weights are those of one device; module, data, callbacks, clipping and accumulation stay as
    they are. Checkpoints are the one file of a run on one device, put together in the host memory
    of rank 0. Processes come from Lightning, torchrun or SLURM, as with DDP, from which this class
    has them; nothing of DDP's wrapper is left.

    Args:
        pipeline_size: Number of ranks of one pipeline; ``auto`` takes all that
            ``data_parallel_size`` leaves.
        data_parallel_size: Number of pipelines that each read their own data; ``auto`` takes all
            ranks that ``pipeline_size`` leaves: 1 where both are ``auto``.
        data_parallel: Share of a stage that each of its ranks holds: ``replicate``, all;
            ``shard``, a share of its weights, gradients and optimizer state each (FSDP2). Weights
            are gathered once per batch, and gradients are summed where they belong at its end.
        schedule: GPipe, 1F1B, Interleaved1F1B, InterleavedZeroBubble, ZBVZeroBubble or DualPipeV.
        num_microbatches: Number of parts of a batch, a divisor of ``data.batch_size``. ``auto``
            takes the largest, up to four per rank.
        num_virtual_stages: Number of stages of each rank; ``auto`` is 1 for GPipe and 1F1B, else 2.
        balance: Quantity to balance over the stages: time or memory.
        blocks_per_stage: Number of blocks of each stage, to cut by hand; null cuts by ``balance``.
        activation_checkpointing: Recomputation in place of the module's own ``recompute``; null
            leaves that.
        process_group_backend: Backend such as ``nccl`` or ``gloo``; null goes by the device.
        timeout_s: Seconds that a rank waits for another before it ends the run, once all are set
            up. One that dies, stops, hangs or is cut off is named, and all others end.
        start_timeout_s: Seconds that ranks may be apart until then: they start, meet, read data and
            load weights.

    Raises:
        ValueError: The ranks, blocks, microbatches or precision do not fit, or the module is not
            one that can be sharded. All but these and a wrong number of blocks is found before a
            process is started.
        TypeError: The module is not a `PipelinedModule`.
    """

    def __init__(
        self,
        pipeline_size: int | Literal["auto"] = "auto",
        data_parallel_size: int | Literal["auto"] = "auto",
        data_parallel: Literal["replicate", "shard"] = "replicate",
        schedule: str = "1F1B",
        num_microbatches: int | Literal["auto"] = "auto",
        num_virtual_stages: int | Literal["auto"] = "auto",
        balance: Literal["time", "memory"] = "time",
        blocks_per_stage: list[int] | None = None,
        activation_checkpointing: Literal["none", "block", "low_rank"] | None = None,
        process_group_backend: str | None = None,
        timeout_s: float | int = 1800,
        start_timeout_s: float | int = 1800,
    ) -> None:
        super().__init__(
            pipeline_size, data_parallel_size, data_parallel, schedule, num_microbatches,
            num_virtual_stages, process_group_backend, timeout_s, start_timeout_s,
        )  # fmt: skip
        self._balance, self._blocks_per_stage = Balance(balance), blocks_per_stage
        self._recompute = activation_checkpointing
        self._spans: list[Span] = []
        self._names: WholeNames | None = None
        self._tied: frozenset[str] = frozenset()
        self._not_run: frozenset[str] = frozenset()
        self._runtime: PipelineRuntime | None = None
        self._fresh: list[tuple[nn.Parameter, Tensor | None]] = []
        self._is_in_window = self._is_mid_window = False
        self._record_next = False

    def keep_own_part(self, network: PreTrainedModel, base: FrozenBase | None = None) -> None:
        """Takes out of a network what other ranks hold, and records which rank holds which part.

        Args:
            network: Network, best on the meta device: then this rank never holds more than its
                part.
            base: Description of the frozen base of a network that is laid out.
        """
        assert self.lightning_module is not None
        length = getattr(self._datamodule, "block_length", None) or 1024
        rows = getattr(self._datamodule, "batch_size", None) or self.layout.num_microbatches
        recompute = self._recompute_of(self.lightning_module)
        costs = network_costs(network, length, base, recompute in ("block", "offload"))
        workload = Workload(
            max(1, rows // self.layout.num_microbatches) * length,
            bytes_per_activation=4 if base is None else base.bytes_per_number,
            num_shards=self._mesh_of("data_parallel").size() if self._shards else 1,
        )
        if self._blocks_per_stage is None:
            self._spans = partition(costs, self.layout, workload, self._balance)
        else:
            self._spans = given_partition(self._blocks_per_stage, self.layout, len(costs.blocks))
        if self.is_global_zero:
            Console().print(to_table(costs, self._spans, self.layout, workload))
        self._tied = frozenset(f"{_PREFIX}{name}" for name in tied_parameters(network))
        spans = [self._spans[s] for s in self.layout.stages_of(self._pipeline_rank)]
        self._not_run = frozenset(f"{_PREFIX}{name}" for name in unused_maps(network, spans))
        keep_stages(network, spans)

    def _recompute_of(self, module: LightningModule) -> str | None:
        """What blocks compute again: the strategy's own setting, else the module's."""
        recompute: str | None = self._recompute or module.hparams.get("recompute")
        return recompute

    @override
    def setup_environment(self) -> None:
        assert self.lightning_module is not None
        is_selective = self._recompute_of(self.lightning_module) == Recompute.LOW_RANK
        if is_selective and self._schedule.splits_backward:  # before the ranks meet
            key = "model.recompute" if self._recompute is None else "activation_checkpointing"
            raise ValueError(
                f"{key} low_rank: {self._schedule.value} takes the backward pass apart, which"
                " torch's selective recomputation does not allow; take block, or 1F1B or"
                " Interleaved1F1B"
            )
        super().setup_environment()

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        module = self.lightning_module
        if not isinstance(module, PipelinedModule):
            raise TypeError(
                f"PipelineStrategy cannot run {type(module).__name__}: it needs network,"
                " loss_sum_and_tokens, backward_start, log_step, log_evaluation, block_predictions"
            )
        if not self._spans:  # the module was built elsewhere
            self.keep_own_part(module.network)
        if self._recompute is not None:
            recompute_blocks(module.network, self._recompute)
        compiled = any(part._compiled_call_impl is not None for part in module.network.modules())
        if compiled and self._schedule.splits_backward:
            raise ValueError(
                f"model.compile: {self._schedule.value} takes the backward pass apart, which"
                " torch.compile does not allow; take 1F1B or Interleaved1F1B"
            )
        if self._shards and not isinstance(module, FSDPModule):
            raise ValueError(
                f"data_parallel shard: {type(module).__name__} holds its stages whole, as one whose"
                " network was built before the trainer does; let configure_model shard it over"
                " device_mesh['data_parallel'], or take replicate"
            )
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            # Else the stages would draw the same dropout masks; data has streams of its own.
            torch.manual_seed(torch.initial_seed() + self.global_rank)
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        self._whole_names()
        self._runtime = self._made_runtime(module)
        self._is_in_window = False
        self.barrier()
        self.wait_less()

    def _made_runtime(self, module: PipelinedModule) -> PipelineRuntime:
        context = self.precision_plugin.forward_context

        def loss(hidden: Tensor, labels: Tensor) -> LossSums:
            with context():
                return module.loss_sum_and_tokens(hidden, labels)

        own = self.layout.stages_of(self._pipeline_rank)
        batch_size = getattr(self._datamodule, "batch_size", None)
        return PipelineRuntime(
            self.layout,
            {stage: Stage(module.network, self._spans[stage], context) for stage in own},
            self._made_passes(),
            self.root_device,
            module.network.config.hidden_size,
            loss,
            batch_size if isinstance(batch_size, int) else 0,
        )

    @override
    @faster_products()
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        module, runtime = self._running()
        trainer = self._trainer
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not self._is_in_window:
            # Lightning would free them only after the schedule has made new ones.
            _assign_gradients((p, None) for p in parameters)
        self._is_in_window = True
        # FSDP averages gradients over its ranks, where replicas add them up.
        replicas = 1 if self._shards else self.distributed_sampler_kwargs["num_replicas"]
        unit = torch.ones((), dtype=torch.float64)
        scale = module.backward_start(unit).item() / (trainer.accumulate_grad_batches * replicas)
        with _told_by_stages(), gathered(module, trains=True):
            sums = runtime.train(*_rows(batch), scale, record=self._record_next)
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
            sum_over([own_share(gradient) for gradient in tied], self._ends)
        replicas = self._mesh_of("data_parallel")
        if replicas.size() > 1 and not self._shards:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            sum_over(gradients, replicas.get_group())

    def gradient_norm(self, parameters: list[nn.Parameter]) -> Tensor:
        """Over all stages and shares, tied weights once; the ranks call it together."""
        module, _ = self._running()
        elsewhere = {id(p) for p in module.parameters()} - {id(p) for p in self._own_names()}
        gradients = [p.grad for p in parameters if p.grad is not None and id(p) not in elsewhere]
        counted = [own_share(gradient) for gradient in gradients]
        norm = get_total_norm(counted, foreach=True)
        # In one dtype: that of a rank where nothing is trained is not the others'.
        square: Tensor = norm.to(self.root_device, torch.float64).square()
        dist.all_reduce(square, group=self._pipeline_group)
        if self._shards:
            dist.all_reduce(square, group=self._mesh_of("data_parallel").get_group())
        return square.sqrt().to(norm.dtype if counted else square.dtype)

    @override
    @faster_products()
    def validation_step(self, batch: Mapping[str, Any], *args: Any) -> None:
        module, runtime = self._running()
        with _told_by_stages(), gathered(module):
            sums = runtime.evaluate(*_rows(batch))
        module.log_evaluation(LossSums(*sums))

    @override
    def test_step(self, batch: Mapping[str, Any], *args: Any) -> None:
        self.validation_step(batch)

    @override
    @faster_products()
    def predict_step(self, batch: Mapping[str, Any], *args: Any) -> list[Any]:
        module, runtime = self._running()
        with _told_by_stages(), gathered(module):
            sums = runtime.evaluate_rows(*_rows(batch))
        predicted: list[Any] = module.block_predictions(batch, sums)
        return predicted

    def record_next_step(self) -> None:
        """Lets the next training step note when each pass began and ended."""
        self._record_next = True

    def recorded_passes(self) -> list[Pass]:
        """Passes of this pipeline's ranks in the step that was recorded; they call it together."""
        _, runtime = self._running()
        return runtime.passes()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        module = self.lightning_module
        assert module is not None
        own, names = set(self._own_names().values()), self._whole_names()
        answered = {
            key: tensor
            for key, tensor in module.state_dict().items()
            if key in own or key not in names.first_name
        }
        whole = gather_tensors(answered, self._pipeline_group, self.root_device, self._saves)
        first_name = names.first_name
        return {key: whole[first_name.get(key, key)] for key in names.state if whole}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return gather_optimizer_state(
            _bare(optimizer), self._own_names(), self._whole_names(), self._pipeline_group,
            self.root_device, self._saves,
        )  # fmt: skip

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None
        if not self._spans:
            assert isinstance(module, PipelinedModule)
            self.keep_own_part(module.network)
        state = checkpoint["state_dict"]
        if strict and (wrong := set(self.state_names()) ^ set(state)):
            raise RuntimeError(
                f"{len(wrong)} weights are in the checkpoint or the network alone: {min(wrong)},"
                " ..."
            )
        held = module.state_dict()
        own = {key: split_like(state[key], like) for key, like in held.items() if key in state}
        module.load_state_dict(own, strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        module = self.lightning_module
        assert module is not None
        names, whole = {p: name for name, p in module.named_parameters()}, self._whole_names()
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            own = own_optimizer_state(saved, optimizer, names, whole, self._pipeline_group)
            optimizer.load_state_dict(own)

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(checkpoint_path)
        known = (TorchCheckpointIO, WholeCheckpoints)
        if type(self.checkpoint_io) not in known or not path.is_file():
            return super().load_checkpoint(checkpoint_path, weights_only)
        # A rank takes its part, and what it does not read is not in its memory.
        is_safe = True if weights_only is None else weights_only
        whole: dict[str, Any] = torch.load(path, "cpu", weights_only=is_safe, mmap=True)
        return whole

    def state_names(self) -> list[str]:
        """Keys of the whole module's state dict; the ranks of a pipeline call it together."""
        return list(self._whole_names().state)

    def parameters_changed(self) -> None:
        """Takes note that the module lost parameters; the ranks of a pipeline call it together."""
        self._names = None

    def own_parameters(self) -> list[nn.Parameter]:
        """The parameters that this rank answers for: of all stages together each is there once."""
        return list(self._own_names())

    def over_stages(self, counts: Sequence[int]) -> list[int]:
        """Counts added up over the stages; the ranks of a pipeline call it together."""
        summed = torch.tensor(counts, dtype=torch.int64, device=self.root_device)
        dist.all_reduce(summed, group=self._pipeline_group)
        return [int(count) for count in summed]

    def _whole_names(self) -> WholeNames:
        if self._names is None:
            module = self.lightning_module
            assert isinstance(module, PipelinedModule)
            network = module.network
            self._names = WholeNames.gather(
                module,
                lambda name: part_index(network, name.removeprefix(_PREFIX)),
                self._pipeline_group,
            )
        return self._names

    def _own_names(self) -> dict[nn.Parameter, str]:
        """Names of the parameters this rank answers for: of tied ones the first stage does.

        What it only holds beside its copy of a tied table is another rank's.
        """
        assert self.lightning_module is not None
        is_other_end = self._pipeline_rank != self.layout.rank_of(0)
        return {
            p: name
            for name, p in self.lightning_module.named_parameters()
            if not (is_other_end and name in self._tied) and name not in self._not_run
        }

    @property
    def _trainer(self) -> Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    def _running(self) -> tuple[Any, PipelineRuntime]:
        assert self._runtime is not None, "the strategy is not set up"
        return self.lightning_module, self._runtime


@contextmanager
def _told_by_stages() -> Iterator[None]:
    """Raises what a stage raised, without torch's description of every tensor around it."""
    try:
        yield
    except RuntimeError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


def _rows(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    if "packing" in batch:
        raise ValueError(f"a packed batch {PACKED_ROWS}")
    return batch["input_ids"], batch["labels"], batch.get("position_ids")


def _assign_gradients(gradients: Iterable[tuple[nn.Parameter, Tensor | None]]) -> None:
    for parameter, gradient in gradients:
        parameter.grad = gradient


def _bare(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
