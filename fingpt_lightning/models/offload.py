"""Keeping the inputs of recomputed blocks in the host's memory until the backward pass."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def offload_block_inputs(network: PreTrainedModel) -> None:
    """Has each decoder block keep its input on the host, and compute all else again.

    Gradients stay equal to the bit. The device holds one block's activations at a time.

    Cost: beside that of recomputing, two copies each way of every block's input a step.

    Args:
        network: Network of transformers, on any device; on the CPU it only recomputes.
    """
    for block in network.modules():
        if isinstance(block, GradientCheckpointingLayer):
            block.gradient_checkpointing = True
            block.__dict__["_gradient_checkpointing_func"] = _run


def _run(block: Callable[..., Any], hidden: Tensor, *args: Any) -> Any:
    device = hidden.device

    def from_host(hidden_on_host: Tensor) -> Any:
        return block(hidden_on_host.to(device), *args)

    # What a checkpoint keeps is the argument, so the copy on the device ends with the block.
    return checkpoint(from_host, hidden.to("cpu"), use_reentrant=False)
