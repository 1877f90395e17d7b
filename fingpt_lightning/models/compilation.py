"""Compiling the decoder blocks of a network."""

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_blocks(network: PreTrainedModel) -> None:
    """Lets torch.compile fuse what lies between the products of each decoder block.

    Blocks are alike, so one is compiled and all share its code, within a minute and for the
    shapes that come. Equal to the plain way to rounding. On the CPU a C++ compiler is needed.

    Source: https://docs.pytorch.org/tutorials/recipes/regional_compilation.html
    """
    for block in network.modules():
        if isinstance(block, GradientCheckpointingLayer):
            block.compile()
