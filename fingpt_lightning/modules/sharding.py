"""Splitting a network over the ranks of a device mesh: FSDP2."""

import warnings

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers import PreTrainedModel

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def shard(module: LightningModule, network: PreTrainedModel) -> None:
    """Leaves each rank its share of every parameter of ``module``, if that has a device mesh.

    The matrices of a decoder block are one group, gathered when the block runs, forward and
    backward. All else is the root's group, gathered from the start of a step to the end of its
    backward pass: norms, positions, and the embedding with the head tied to it, which the loss
    reads outside of any ``forward``. So the root is the LightningModule, and its steps count as
    forward passes.

    Under bf16-mixed a block's matrices are gathered in bfloat16 and their gradients summed in
    float32. Autocast alone computes the same, but keeps a bfloat16 copy of every matrix from the
    forward pass to the backward pass, which is the memory that sharding is to save.

    All ranks of the mesh call this together, with equal weights.

    Args:
        module: Module as a trainer holds it, weights on any device; split over the axis
            ``data_parallel`` of its ``device_mesh``. Its class becomes a subclass.
        network: Part of ``module`` with the decoder blocks.
    """
    if module.device_mesh is None:
        return
    # torch 2.13 warns of what in-place additions to the residual stream would break; ours are not.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = module.device_mesh["data_parallel"]
    policy = MixedPrecisionPolicy()
    if isinstance(module.trainer.precision_plugin, MixedPrecision):
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    block_names = network._no_split_modules or ()
    for block in [part for part in network.modules() if type(part).__name__ in block_names]:
        # Without the norms, which autocast computes in float32 from float32 weights.
        matrices = [part for part in block.children() if any(p.ndim > 1 for p in part.parameters())]
        fully_shard(matrices, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh)
    for step in _STEPS:
        register_fsdp_forward_method(module, step)
