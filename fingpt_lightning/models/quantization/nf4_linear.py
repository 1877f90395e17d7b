"""bitsandbytes' NF4 layer, right for rows of any length. Importing this takes a second."""

from typing import Any

import bitsandbytes.nn
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fingpt_lightning.models.quantization.frozen_matrix import product
from fingpt_lightning.models.quantization.rounding import NF4_BLOCK, NF4Matrix, nf4_rows, nf4_values

_bnb: Any = bitsandbytes.nn  # annotated in part, and wrongly
_Linear4bit: Any = _bnb.Linear4bit


class NF4Linear(_Linear4bit):  # type: ignore[misc]
    """A ``Linear4bit`` of bitsandbytes that is a `FrozenMatrix` too."""

    @property
    def _matrix(self) -> NF4Matrix:
        return NF4Matrix(self.weight.data, self.weight.quant_state)

    def values(
        self, dtype: torch.dtype, first: int = 0, end: int | None = None
    ) -> Float[Tensor, "O I"]:
        """See `FrozenMatrix`."""
        return nf4_values(self._matrix, dtype, first, end)

    def rows(self, ids: Int[Tensor, "N"], dtype: torch.dtype) -> Float[Tensor, "N I"]:
        """See `FrozenMatrix`."""
        return nf4_rows(self._matrix, ids, dtype)

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        """The product of bitsandbytes where it has one.

        On no device has 0.50.2 a kernel for rows that blocks do not divide: on the CPU it is wrong
        (see `nf4_values`), on CUDA it dequantizes the weight, as we do, and warns of it. In float64
        it refuses on CUDA, and leaves numbers unfilled on the CPU.
        """
        if self.in_features % NF4_BLOCK or x.dtype == torch.float64:
            return product(x, self, self.bias)
        made: Tensor = super().forward(x)
        return made
