"""A training step on tensors that have shapes and no numbers, to count what it would hold."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from fingpt_lightning.profiling.memory import LiveTensorBytes


class StepBytes(NamedTuple):
    """Bytes that a step holds beside weights and optimizer state.

    Attributes:
        activations: Bytes alive when the backward pass starts and not when the step began.
        loss: Most bytes that the loss over the vocabulary holds while it is computed, beyond what
            was alive when it began.
        peak: Most bytes at any time, gradients included.
    """

    activations: int
    loss: int
    peak: int


def with_more_blocks(two: StepBytes, three: StepBytes, num_blocks: int) -> StepBytes:
    """The step of a network with ``num_blocks`` equal blocks, from those with two and three.

    >>> with_more_blocks(StepBytes(10, 4, 20), StepBytes(13, 4, 22), 40).activations
    124
    """
    return StepBytes(*(a + (num_blocks - 2) * (b - a) for a, b in zip(two, three, strict=True)))


def fake_parameters(
    network: nn.Module,
    mode: FakeTensorMode,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
) -> None:
    """Gives a network fake parameters and buffers in place of its own, ties kept.

    Args:
        network: Network on any device, the meta device too; changed in place.
        mode: Fake mode of its tensors.
        dtype: Dtype of parameters of floating-point numbers; None keeps theirs.
        device: Device whose kernels a step is to be counted with.
    """
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            is_cast = dtype is not None and tensor.is_floating_point()
            own = torch.empty_strided(
                tensor.shape,
                tensor.stride(),
                dtype=dtype if is_cast else tensor.dtype,
                device=device,
            )
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(own, tensor.requires_grad) if is_parameter else own
        return made[id(tensor)]

    with mode:
        for module in network.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = fake(tensor)  # type: ignore[assignment]


def fake_batch(batch: Any, mode: FakeTensorMode, device: torch.device | str = "cpu") -> Any:
    """The batch with fake tensors of the same shapes, on a device, in place of its own."""

    def fake(leaf: Any) -> Any:
        return mode.from_tensor(leaf).to(device) if isinstance(leaf, Tensor) else leaf

    with mode:
        return tree_map(fake, batch)


def count_step(
    hidden_states: Callable[[], Tensor],
    loss: Callable[[Tensor], Tensor],
    mode: FakeTensorMode,
    context: AbstractContextManager[Any],
) -> StepBytes:
    """Runs forward and backward pass on fake tensors: their device's kernels, but no numbers.

    Args:
        hidden_states: Forward pass of the body.
        loss: Function from its result to the loss of the backward pass.
        mode: Fake mode of all tensors.
        context: Context of the forward pass, such as autocast.
    """
    with mode, LiveTensorBytes() as count:
        peaks = [0]
        before_loss = 0

        def noted(hidden: Tensor) -> Tensor:
            nonlocal before_loss
            peaks.append(count.peak_bytes)
            before_loss = count.peak_bytes = count.live_bytes
            return hidden

        with context:
            # No name for the hidden states: the backward pass may not need them.
            start = loss(noted(hidden_states()))
        of_loss, activations = count.peak_bytes - before_loss, count.live_bytes
        start.backward()
        peak = max(*peaks, count.peak_bytes)
    return StepBytes(activations, of_loss, peak)
