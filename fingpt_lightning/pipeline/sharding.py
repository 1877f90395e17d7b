"""FSDP2 inside a pipeline: weights are gathered once per batch, whatever its microbatches."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


@contextmanager
def gathered(module: nn.Module, trains: bool = False) -> Iterator[None]:
    """Has a sharded module's weights whole within; no other module is changed.

    All ranks of a stage enter it together. Forward and backward passes within move no weights.

    Args:
        module: Root of the modules that FSDP2 shards.
        trains: Whether gradients are computed within: at the end they are averaged over the ranks
            and added to those of each one's share.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    root = module._get_fsdp_state()
    root._lazy_init()  # or the first block to run would take itself for the root
    module.set_reshard_after_forward(False)
    _set_is_last(module, False)
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    with torch.inference_mode(False):  # weights first gathered in it cannot be trained
        for part in parts:
            part.unshard()
    try:
        yield
        if trains:
            # As in torch 2.13's PipelineStage.perform_reduce_grad, which knows one root a stage and
            # no head behind it.
            _set_is_last(module, True)
            for state in root._state_ctx.all_states:
                for group in state._fsdp_param_groups:
                    group.post_backward()
            root._root_post_backward_final_callback()
    finally:
        for part in parts:
            part.reshard()


def keep_sums_in_reduce_dtype(module: nn.Module) -> None:
    """Moves gradients that are to be summed in a higher dtype than their own to where they are.

    torch 2.13 does it behind each backward pass, but not where gradients of weights are computed
    apart: those of several microbatches would be added up in bfloat16.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            for group in part._get_fsdp_state()._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    parameter.accumulate_unsharded_grad_if_needed()
                    parameter.to_accumulated_grad_if_needed()


def own_share(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, on the same storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def joined(tensor: Tensor) -> Tensor:
    """All of a tensor, detached; the ranks that share it call this together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(value: Any, like: Tensor) -> Any:
    """This rank's share of a value that was saved whole, if that is of a sharded tensor's shape."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        share = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
        return share.clone()  # in memory of its own
    return value


def _set_is_last(module: FSDPModule, is_last: bool) -> None:
    module.set_is_last_backward(is_last)
    module.set_requires_gradient_sync(is_last)
    module.set_reshard_after_backward(is_last)
