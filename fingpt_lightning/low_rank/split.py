"""One linear layer as several, side by side."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn


class SplitLinear(nn.Module):
    """Linear layers that read the same input, in place of one that makes all their outputs.

    So each of them may be dense, or low-rank with a rank and a ``down`` of its own. What walks over
    a network's layers finds the parts, as those of a family whose layers are apart from the start.

    Args:
        parts: Layers by name, in the order of their outputs.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        """The outputs of all parts, one after the other. Cost: that of the parts."""
        return torch.cat([part(x) for part in self.children()], -1)
