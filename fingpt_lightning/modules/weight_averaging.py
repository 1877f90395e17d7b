"""What Lightning's callbacks that average weights need of our modules, and where they cannot be."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_swa_avg_fn


def prepare_averaging(module: LightningModule) -> None:
    """Fits callbacks of the attached trainer that average weights to a module; else does nothing.

    To be called at each ``configure_model``, which `WeightAveraging` calls before it copies the
    module: numbers that are equal then stay equal to the bit. Averaging would round frozen weights,
    and take codes of 4 and 8 bits for numbers. An average that begins later than the run is the
    trained weights until then.

    Raises:
        ValueError: A callback averages what it cannot see all of, or what changes under it.
    """
    trainer = module._trainer
    for callback in [] if trainer is None else trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        if isinstance(callback, StochasticWeightAveraging):
            raise ValueError(
                f"callback {name} copies the module before its network is built; take"
                " lightning.pytorch.callbacks.WeightAveraging"
            )
        if not isinstance(callback, WeightAveraging):
            continue
        assert trainer is not None
        if module.device_mesh is not None or getattr(module, "partial_network", None) is not None:
            raise ValueError(
                f"callback {name} averages a whole network, of which trainer.strategy"
                f" {type(trainer.strategy).__name__} gives each process a part; take ddp or one"
                " device"
            )
        for key in ("self_guided", "quantization_aware"):
            if module.hparams.get(key):
                raise ValueError(
                    f"callback {name} averages the weights of every step alike, which"
                    f" model.{key} {module.hparams[key]} changes in between; leave one of them out"
                )
        _keep_equal_numbers(callback)
        if isinstance(callback.should_update, _FollowUntilFirst):
            # A callback of an earlier fit follows the module of this one; a twin that is only timed
            # is not the trainer's.
            if trainer.lightning_module is module:
                callback.should_update.follow(module)
        else:
            callback.should_update = _FollowUntilFirst(callback, module)  # type: ignore[method-assign]


def _keep_equal_numbers(callback: WeightAveraging) -> None:
    # Lightning 2.6 hands these on to torch's AveragedModel, and there is no other place to set
    # which weights take part.
    settings = callback._kwargs
    multiple = settings.get("multi_avg_fn")
    if multiple is not None and not isinstance(multiple, _MultipleUnlessEqual):
        settings["multi_avg_fn"] = _MultipleUnlessEqual(multiple)
    single = settings.get("avg_fn")
    if multiple is None and not isinstance(single, _UnlessEqual):
        settings["avg_fn"] = _UnlessEqual(single or get_swa_avg_fn())


class _FollowUntilFirst:
    """``should_update`` of a callback whose average is the trained weights until its first update.

    Lightning 2.6 leaves the average at the initial weights where the callback starts later, as with
    ``update_starting_at_step``: validated, stored, and kept by a run that ends before.
    """

    def __init__(self, callback: WeightAveraging, module: LightningModule) -> None:
        self._callback, self._module = callback, module
        self._should_update = callback.should_update

    def follow(self, module: LightningModule) -> None:
        """Follows the weights of another module."""
        self._module = module

    def __call__(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if self._should_update(step_idx=step_idx, epoch_idx=epoch_idx):
            return True
        average = self._callback._average_model
        if step_idx is not None and average is not None and not average.n_averaged:
            self._follow(average.module)
        return False

    @torch.no_grad()
    def _follow(self, average: nn.Module) -> None:
        for ours, theirs in zip(average.parameters(), self._module.parameters(), strict=True):
            if theirs.requires_grad:
                ours.copy_(theirs)
        buffers = zip(average.buffers(), self._module.buffers(), strict=True)
        for averaged, current in buffers:
            averaged.copy_(current)


class _UnlessEqual:
    """An averaging function that leaves a tensor alone where both are equal."""

    def __init__(self, average: Callable[[Tensor, Tensor, Any], Tensor]) -> None:
        self._average = average

    def __call__(self, averaged: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
        if torch.equal(averaged, current):
            return averaged
        return self._average(averaged, current, num_averaged)


class _MultipleUnlessEqual:
    """The same of one that takes lists of tensors and changes the first."""

    def __init__(self, average: Callable[[list[Tensor], list[Tensor], Any], None]) -> None:
        self._average = average

    def __call__(
        self, averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor | int
    ) -> None:
        unequal = [(a, c) for a, c in zip(averaged, current, strict=True) if not torch.equal(a, c)]
        if unequal:
            self._average([a for a, _ in unequal], [c for _, c in unequal], num_averaged)
