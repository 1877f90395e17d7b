"""Compiling the decoder blocks of a network."""

from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_blocks(network: PreTrainedModel, **options: Any) -> None:
    """Lets torch.compile fuse what lies between the products of each decoder block.

    Blocks are alike, so one is compiled and all share its code, within a minute and for the
    shapes that come. Equal to the plain way to rounding. On the CPU a C++ compiler is needed.

    A block is one graph, whatever its layers: low-rank, quantized or adapted. Over packed rows it
    is two, before attention and after it.

    Args:
        network: Network of transformers.
        options: Options of torch.compile, such as ``mode``.

    Source: https://docs.pytorch.org/tutorials/recipes/regional_compilation.html
    """
    for block in network.modules():
        if isinstance(block, GradientCheckpointingLayer):
            block.compile(**options)
