"""Steps whose numbers are not finite: found, named, and not taken."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from fingpt_lightning.low_rank.factor_optimizer import FactorOptimizer


class StepFigure(NamedTuple):
    """A number of a step that has to be finite.

    Args:
        key: Key under which it is logged.
        value: Number on any device.
        step: Step and place in the data, in words.
    """

    key: str
    value: Tensor
    step: str


class FiniteSteps:
    """Ends a run at the first step with a number that is not finite, its weights as before.

    Where the numbers are on a CUDA device the host does not wait for them, if the optimizer can
    skip a step by itself (its ``found_inf``, as behind a gradient scaler): the device skips it, and
    the host reads of it when it has handed the device the next step's passes.
    """

    def __init__(self) -> None:
        self._figures: list[StepFigure] = []
        self._unread: _Copy | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "FiniteSteps":
        # A copy of a module takes no part in the run.
        return FiniteSteps()

    def add(self, figure: StepFigure, *, is_late: bool) -> None:
        """Takes note of a step's number.

        Args:
            figure: Number of the step under way.
            is_late: Whether it is not to be read before `skip_unless_finite`, but after it.

        Raises:
            FloatingPointError: It is not finite.
        """
        if is_late:
            self._figures.append(figure)
        else:
            _raise_unless_finite([figure])

    def skip_unless_finite(self, optimizer: Optimizer) -> None:
        """Has the optimizer skip the step if a number that was noted late is not finite."""
        if not self._figures:
            return
        are_finite = torch.stack([f.value.isfinite().all() for f in self._figures]).all()
        optimizer.found_inf = are_finite.logical_not().float()  # type: ignore[attr-defined]
        self._unread = _Copy(are_finite)

    def read(self) -> None:
        """Reads of the step before, if that was not done yet.

        Raises:
            FloatingPointError: A number of it is not finite; the device has skipped it.
        """
        if self._unread is None:
            return
        if not self._unread.value():
            _raise_unless_finite(self._figures)
        self._figures, self._unread = [], None


def can_skip(optimizer: Optimizer, value: Tensor) -> bool:
    """Whether the device itself can leave a step out.

    Args:
        optimizer: Optimizer of the step.
        value: One of the numbers that the step depends on.
    """
    if value.device.type != "cuda" or not isinstance(optimizer, AdamW | FactorOptimizer):
        return False
    # Behind a gradient scaler neither is fused. A sharded parameter takes no plain flag.
    return all(
        group["fused"] and not any(isinstance(p, DTensor) for p in group["params"])
        for group in optimizer.param_groups
    )


class _Copy:
    """A flag on its way to the host, which waits for it where it is read."""

    def __init__(self, flag: Tensor) -> None:
        is_on_cuda = flag.device.type == "cuda"
        on_host: Tensor = torch.empty_like(flag, device="cpu", pin_memory=is_on_cuda)
        self._on_host = on_host.copy_(flag, non_blocking=True)
        self._event: Any = None
        if is_on_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def value(self) -> bool:
        if self._event is not None and not self._event.query():
            self._event.synchronize()
        return bool(self._on_host)


def _raise_unless_finite(figures: list[StepFigure]) -> None:
    for key, value, step in figures:
        if not torch.isfinite(value):
            raise FloatingPointError(
                f"{key} is {value.item()} at {step}; the weights of this step were not changed and"
                " the last checkpoint is good"
            )
