"""Where the memory of training goes."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from callbacks.recording import Cadence, over_ranks
from fingpt_lightning.metric_keys import (
    MEMORY_ACTIVATIONS,
    MEMORY_GRADIENTS,
    MEMORY_OPTIMIZER,
    MEMORY_PEAK_ALLOCATED,
    MEMORY_PEAK_RESERVED,
    MEMORY_PEAK_RSS,
    MEMORY_WEIGHTS,
)
from fingpt_lightning.profiling.memory import (
    LiveTensorBytes,
    module_memory,
    peak_rss_bytes,
    reset_peak_rss,
)
from fingpt_lightning.units import MIB


class MemoryMonitor(Callback):
    """Logs the peak memory since the previous log and the parts of it that are accounted for.

    Every figure is the largest over all ranks; training results stay bit-equal.

    Keys, all in MiB:

    - ``memory/peak_allocated_mib``, ``memory/peak_reserved_mib``: CUDA's allocator, on CUDA.
    - ``memory/peak_rss_mib``: the process's physical memory, elsewhere. Where the system cannot
      reset that peak (anything but Linux), since the process began.
    - ``memory/weights_mib``: parameters and buffers, tied ones once.
    - ``memory/gradients_mib``: right before the optimizer step.
    - ``memory/optimizer_mib``: the optimizer's state.
    - ``memory/activations_mib``: what is alive when the backward pass starts and was not when the
      step began. On CUDA the allocator's difference in the logged step; elsewhere counted in the
      run's first step, and again in a logged step whose batch has other shapes. Not logged for
      modules under ``torch.compile`` elsewhere than on CUDA: counting would undo the compiling;
      nor in a pipeline, whose forward and backward passes take turns.

    Cost: at a log a walk over parameters and optimizer state, the counters' reads, two small
    all-reduces and one sync; at other steps nothing. A counted step on the CPU takes some
    microseconds more for each operation of its forward pass. The peak counters are reset at each
    log: `run_peak_bytes` has the run's.

    Args:
        every_n_steps: Optimizer steps from log to log; null takes the trainer's
            ``log_every_n_steps``.

    Raises:
        ValueError: ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        self._cadence = Cadence(every_n_steps)
        self._device = torch.device("cpu")
        self._run_peak_bytes = 0
        self._gradient_bytes: int | None = None
        self._activation_bytes: int | None = None
        self._may_count = True
        self._is_pipeline = False
        self._counted_shapes: list[torch.Size] | None = None
        self._count: LiveTensorBytes | None = None
        self._allocated_before: int | None = None

    def run_peak_bytes(self) -> int:
        """The highest ``peak_allocated`` (CUDA) or ``peak_rss`` of this rank since fit began."""
        current = (
            torch.cuda.max_memory_allocated(self._device)
            if self._device.type == "cuda"
            else peak_rss_bytes()
        )
        self._run_peak_bytes = max(self._run_peak_bytes, current)
        return self._run_peak_bytes

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._device = trainer.strategy.root_device
        self._cadence.start(trainer)
        self._run_peak_bytes = 0
        self._is_pipeline = getattr(pl_module, "partial_network", None) is not None
        self._may_count = not (_is_compiled(pl_module) or self._is_pipeline)
        self._gradient_bytes = self._activation_bytes = self._counted_shapes = None
        self._reset_peaks()

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        due = self._cadence.next_is_due(trainer)
        if self._device.type == "cuda":
            if due and not self._is_pipeline:
                self._allocated_before = torch.cuda.memory_allocated(self._device)
        elif self._may_count and (due or self._counted_shapes is None):
            shapes = [leaf.shape for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
            if shapes != self._counted_shapes:
                self._counted_shapes = shapes
                self._count = LiveTensorBytes()
                self._count.__enter__()  # type: ignore[no-untyped-call]

    @override
    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        # Between forward and backward, and before old gradients are freed; inside an accumulation
        # window there is only the next hook.
        self._end_of_forward()

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._end_of_forward()

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self._cadence.next_is_due(trainer):
            self._gradient_bytes = module_memory(pl_module).gradients

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._stop_counting()
        if not (self._cadence.stepped(trainer) and self._cadence.is_due(trainer)):
            return
        num_bytes: dict[str, int | None] = {
            **self._peaks(),
            MEMORY_WEIGHTS: module_memory(pl_module).weights,
            MEMORY_GRADIENTS: self._gradient_bytes,
            MEMORY_OPTIMIZER: sum(
                module_memory(pl_module, o).optimizer for o in trainer.optimizers
            ),
            MEMORY_ACTIVATIONS: self._activation_bytes,
        }
        largest = over_ranks(trainer, list(num_bytes.values()), "max")
        metrics = {
            key: value / MIB
            for key, value in zip(num_bytes, largest, strict=True)
            if value is not None
        }
        self._cadence.log(trainer, pl_module, metrics)
        self.run_peak_bytes()
        self._reset_peaks()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop_counting()

    def _end_of_forward(self) -> None:
        if self._allocated_before is not None:
            allocated = torch.cuda.memory_allocated(self._device)
            self._activation_bytes = allocated - self._allocated_before
            self._allocated_before = None
        if self._count is not None:
            self._activation_bytes = self._count.live_bytes
            self._stop_counting()

    def _stop_counting(self) -> None:
        self._allocated_before = None
        if self._count is not None:
            self._count.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._count = None

    def _peaks(self) -> dict[str, int]:
        if self._device.type != "cuda":
            return {MEMORY_PEAK_RSS: peak_rss_bytes()}
        return {
            MEMORY_PEAK_ALLOCATED: torch.cuda.max_memory_allocated(self._device),
            MEMORY_PEAK_RESERVED: torch.cuda.max_memory_reserved(self._device),
        }

    def _reset_peaks(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            reset_peak_rss()


def _is_compiled(module: LightningModule) -> bool:
    # Marks of torch.compile(module) and of module.compile().
    return any(
        hasattr(part, "_orig_mod") or part._compiled_call_impl is not None
        for part in module.modules()
    )
