"""Keeping the inputs of recomputed blocks in the host's memory until the backward pass."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


class _OnHost(NamedTuple):
    tensor: Tensor
    device: torch.device


def offload_block_inputs(network: PreTrainedModel) -> None:
    """Has each decoder block keep its input on the host, and compute all else again.

    Gradients stay equal to the bit. The device holds one block's activations at a time.

    Cost: beside that of recomputing, one copy each way of every block's input per step, between the
    device and pinned memory, for which the host does not wait.

    Args:
        network: Network of transformers, on any device; on the CPU it only recomputes.
    """
    for block in network.modules():
        if isinstance(block, GradientCheckpointingLayer):
            block.gradient_checkpointing = True
            block.__dict__["_gradient_checkpointing_func"] = _run


def _run(block: Callable[..., Any], hidden: Tensor, *args: Any) -> Any:
    shape = hidden.shape

    def to_host(kept: Tensor) -> Tensor | _OnHost:
        # Beside the input a block has arguments that all blocks share, such as masks.
        if kept.device.type == "cpu" or kept.shape != shape:
            return kept
        on_host = torch.empty_like(kept, device="cpu", pin_memory=True)
        # Both copies are on the stream that computes, so they are in order, and the allocators of
        # both memories know when each is done: nothing else has to wait, and the host does not.
        return _OnHost(on_host.copy_(kept, non_blocking=True), kept.device)

    # A checkpoint keeps its arguments as an operator keeps tensors for its backward pass. Given the
    # tensor of the device, it also keeps the device's random state, which dropout repeats.
    with saved_tensors_hooks(to_host, _to_device):
        return checkpoint(block, hidden, *args, use_reentrant=False)


def _to_device(kept: Tensor | _OnHost) -> Tensor:
    if isinstance(kept, _OnHost):
        return kept.tensor.to(kept.device, non_blocking=True)
    return kept
