"""How fast training is, and how near to the limit of the device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.console import Console
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from callbacks.progress import TrainingProgress
from callbacks.recording import Budgeted, Cadence, num_tokens, over_ranks
from fingpt_lightning.metric_keys import (
    THROUGHPUT_GPU_UTILIZATION,
    THROUGHPUT_MFU,
    THROUGHPUT_STEP_TIME_S,
    THROUGHPUT_TOKENS_PER_S,
    THROUGHPUT_TRAINING_TIME_S,
)
from fingpt_lightning.profiling.throughput import measured_peak_flops_per_s
from fingpt_lightning.units import peak_flops_per_s

_COMPUTE_DTYPES = {
    "bf16-mixed": ("bf16", torch.bfloat16),
    "bf16-true": ("bf16", torch.bfloat16),
    "16-mixed": ("fp16", torch.float16),
    "16-true": ("fp16", torch.float16),
    "32-true": ("fp32", torch.float32),
    "64-true": ("fp64", torch.float64),
}


class ThroughputMonitor(Callback):
    """Logs the speed of training since the previous log.

    The clock runs over everything that a step needs, waiting for data included; it stands still
    while validating, while `FinancialEvaluation` runs, and while writing a checkpoint.

    Keys:

    - ``throughput/tokens_per_s``: supervised positions (label not -100), all ranks together.
    - ``throughput/step_time_s``: seconds per optimizer step, of the slowest rank.
    - ``throughput/training_time_s``: seconds this fit has trained so far, of the slowest rank; the
      first steps, which the other figures leave out, are in it.
    - ``throughput/mfu``: the share of the devices' peak that went into useful work: tokens per
      second times training FLOP per token, over devices times peak. Not logged for a module without
      ``budget()``.
    - ``throughput/gpu_utilization_percent``: share of the last second with a kernel running, as
      NVML reports it, mean over ranks. Logged on CUDA with ``pynvml`` installed.

    In a module of your own the tokens of a batch are what its ``num_tokens(batch)`` says, else
    the positions of ``batch["labels"]`` that are not -100.

    Cost: one comparison over the labels per batch; at a log, validation or checkpoint one device
    sync; at a log small all-reduces.

    Args:
        every_n_steps: Optimizer steps from log to log; null takes the trainer's
            ``log_every_n_steps``.
        peak_tflops: Peak of one device, in TFLOP/s, above 0. Null looks the device up, and
            where it is unknown (CPUs) measures it when training starts, and reports it.
        warmup_steps: Optimizer steps at the start that are not counted.

    Raises:
        ValueError: A value outside its range.
        TypeError: The module has no ``num_tokens(batch)`` and its batches have no ``labels``.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        peak_tflops: float | None = None,
        warmup_steps: int = 2,
    ) -> None:
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(f"peak_tflops={peak_tflops} is outside (0, inf)")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps} is below 0")
        self._cadence = Cadence(every_n_steps)
        self._peak_tflops = peak_tflops
        self._warmup_steps = warmup_steps
        self._warmup_left = warmup_steps
        self._device = torch.device("cpu")
        self._flops_per_token: int | None = None
        self._peak_flops_per_s: float | None = None
        self._running_since_s: float | None = None
        self._elapsed_s = 0.0
        self._training_time_s = 0.0
        self._num_steps = 0
        self._num_tokens: Tensor | int = 0
        self._run_tokens = 0.0
        self._run_time_s = 0.0
        self._before_state_dict: RemovableHandle | None = None

    @property
    def run_tokens_per_s(self) -> float | None:
        """The mean rate over all logged steps of the run; None before the first log."""
        return self._run_tokens / self._run_time_s if self._run_time_s else None

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Within it nothing counts as training; for callbacks that do other work in a step."""
        was_running = self._running_since_s is not None
        self._pause()
        yield
        if was_running:
            self._resume()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._device = trainer.strategy.root_device
        self._cadence.start(trainer)
        self._warmup_left = self._warmup_steps
        self._run_tokens = self._run_time_s = self._training_time_s = 0.0
        self._begin_window()
        if isinstance(pl_module, Budgeted):
            self._flops_per_token = pl_module.budget().training_flops_per_token
            self._peak_flops_per_s = self._find_peak(trainer)
        elif self._peak_tflops is not None:
            rank_zero_warn(
                f"ThroughputMonitor(peak_tflops={self._peak_tflops}) has no effect:"
                f" {type(pl_module).__name__} has no budget()"
            )

        # Each checkpoint requests the state first; the callbacks' own hook comes later, and not
        # at all where only weights are saved. A closure, because copies of the module share it.
        def pause(*_: Any) -> None:
            self._pause()

        self._before_state_dict = pl_module.register_state_dict_pre_hook(pause)  # type: ignore[no-untyped-call]

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._resume()

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        stepped = self._cadence.stepped(trainer)
        # Also while warming up, so that batches without labels are refused at the first one.
        supervised = num_tokens(pl_module, batch)
        if self._warmup_left > 0:
            self._warmup_left -= stepped
            if self._warmup_left == 0:
                self._pause()
                self._begin_window()
                self._resume()
            return
        self._num_tokens = self._num_tokens + supervised
        self._num_steps += stepped
        if stepped and self._cadence.is_due(trainer):
            self._pause()
            self._log(trainer, pl_module)
            self._begin_window()
            self._resume()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()
        self._remove_hook()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._remove_hook()

    def _find_peak(self, trainer: Trainer) -> float | None:
        precision = str(trainer.precision)
        if self._peak_tflops is not None:
            return self._peak_tflops * 1e12
        if precision not in _COMPUTE_DTYPES:
            return None
        name, dtype = _COMPUTE_DTYPES[precision]
        if self._device.type == "cuda":
            if name == "fp32" and torch.get_float32_matmul_precision() != "highest":
                name = "tf32"
            listed = peak_flops_per_s(torch.cuda.get_device_name(self._device), name)
            if listed is not None:
                return listed
        measured = measured_peak_flops_per_s(self._device, dtype)
        _print(
            trainer,
            f"{THROUGHPUT_MFU} is relative to {measured / 1e12:.3g} TFLOP/s, the"
            f" rate of {name} matrix products measured on this {self._device.type} just now; its"
            " data sheet's peak is not known here (peak_tflops sets it)",
        )
        return measured

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = [self._elapsed_s, self._training_time_s]
        slowest_s, training_time_s = over_ranks(trainer, seconds, "max")
        num_tokens = over_ranks(trainer, [int(self._num_tokens)], "sum")[0]
        utilization = over_ranks(trainer, [_gpu_utilization_percent(self._device)], "mean")[0]
        assert slowest_s is not None
        assert training_time_s is not None
        assert num_tokens is not None
        # Ranks that share a replica of the model (a pipeline's stages) see the same tokens.
        replicas = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        num_tokens *= replicas / trainer.world_size
        self._run_tokens += num_tokens
        self._run_time_s += slowest_s
        tokens_per_s = num_tokens / slowest_s
        metrics = {
            THROUGHPUT_TOKENS_PER_S: tokens_per_s,
            THROUGHPUT_STEP_TIME_S: slowest_s / self._num_steps,
            THROUGHPUT_TRAINING_TIME_S: training_time_s,
        }
        if self._flops_per_token is not None and self._peak_flops_per_s is not None:
            peak = self._peak_flops_per_s * trainer.world_size
            metrics[THROUGHPUT_MFU] = tokens_per_s * self._flops_per_token / peak
        if utilization is not None:
            metrics[THROUGHPUT_GPU_UTILIZATION] = utilization
        self._cadence.log(trainer, pl_module, metrics)

    def _begin_window(self) -> None:
        self._running_since_s = None
        self._elapsed_s = 0.0
        self._num_steps = 0
        self._num_tokens = 0

    def _resume(self) -> None:
        if self._running_since_s is None:
            self._running_since_s = time.perf_counter()

    def _pause(self) -> None:
        if self._running_since_s is not None:
            self._synchronize()
            passed_s = time.perf_counter() - self._running_since_s
            self._elapsed_s += passed_s
            self._training_time_s += passed_s
            self._running_since_s = None

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _remove_hook(self) -> None:
        if self._before_state_dict is not None:
            self._before_state_dict.remove()
            self._before_state_dict = None


@rank_zero_only
def _print(trainer: Trainer, line: str) -> None:
    # Like the tables of the run, not through Lightning's log, which the command line silences.
    bar = trainer.progress_bar_callback
    if isinstance(bar, TrainingProgress) and bar.is_enabled:
        bar.print(line)  # above the bar, not inside of it
    else:
        Console().print(line, soft_wrap=True, markup=False, highlight=False)


def _gpu_utilization_percent(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    try:
        return float(torch.cuda.utilization(device))
    except Exception as error:
        # pynvml missing, or NVML refusing (a slice of a device has no such figure). The class of
        # NVML's errors cannot be named here: it comes with pynvml.
        if isinstance(error, ImportError | RuntimeError) or "nvml" in type(error).__module__:
            return None
        raise
