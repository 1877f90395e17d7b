"""Low-rank adapters beside frozen linear layers: LoRA, rsLoRA and DoRA.

Axes: I in_features, O out_features, R rank.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fingpt_lightning.low_rank.frozen_products import frozen_linear


@dataclass(frozen=True)
class AdapterOptions:
    """What kind of adapters a network gets.

    Args:
        rank: R of every adapter, at least 1; it may exceed what a layer's sizes can use.
        alpha: The adapter is weighed by ``alpha / rank``; None is twice the rank.
        dropout: Probability with which an adapter's input features are dropped in training.
        rslora: Weigh by ``alpha / sqrt(rank)``, so that large ranks keep learning.
        dora: Learn the length of each row of the weight apart from its direction.

    Raises:
        ValueError: A value outside its range.

    Source: https://arxiv.org/abs/2106.09685 (LoRA), https://arxiv.org/abs/2312.03732 (rsLoRA),
    https://arxiv.org/abs/2402.09353 (DoRA).
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank {self.rank} is below 1")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha {self.alpha} is not above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is outside [0, 1)")

    @property
    def scale(self) -> float:
        """The factor on the product of the adapter's matrices.

        >>> AdapterOptions(rank=4, alpha=8.0).scale, AdapterOptions(rank=4, rslora=True).scale
        (2.0, 4.0)
        """
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class FrozenBase(NamedTuple):
    """The base of a laid-out network: frozen, perhaps quantized, with adapters.

    Args:
        bytes_per_number: Bytes per number of weights that are not quantized, and of activations.
        bytes_per_matrix_number: Bytes per number of the matrices of the blocks.
        adapters: Trained numbers beside each layer that is adapted, by the layer's name.
    """

    bytes_per_number: float
    bytes_per_matrix_number: float
    adapters: Mapping[str, int]


class AdaptedLinear(nn.Module):
    """A frozen linear map and a trained one of low rank beside it: y = W x + b + s B A x.

    With DoRA, y = (m / |W + s B A|) (W x + s B A x) + b, where the length of each row of the
    matrix counts as a constant in the backward pass. A new adapter changes nothing: B is zero.

    The products run in the dtype of the input, thin ones too; A, B and m are kept in float32 (in
    float64 under a float64 input), which is what the optimizer needs.

    Args:
        base_layer: W and b, dense or quantized; its parameters are frozen here.
        in_features: I.
        out_features: O.
        options: Options of the adapter.
        dtype: Dtype of A, B and m.
        device: Device of A, B and m.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        in_features: int,
        out_features: int,
        options: AdapterOptions,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.in_features, self.out_features, self.options = in_features, out_features, options
        self.lora_A = nn.Parameter(
            torch.empty(options.rank, in_features, dtype=dtype, device=device)
        )
        self.lora_B = nn.Parameter(
            torch.zeros(out_features, options.rank, dtype=dtype, device=device)
        )
        self.lora_magnitude_vector: nn.Parameter | None = None
        self._squares: Tensor | None = None
        self.enabled = True
        self._down = SharedDown([self])
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @torch.no_grad()
    def start_dora(self, weight: Float[Tensor, "O I"]) -> None:
        """Sets the lengths to those of the rows of W, with which DoRA starts.

        Args:
            weight: W; where the base is quantized, the matrix that it multiplies with.
        """
        dtype = torch.promote_types(weight.dtype, self.lora_A.dtype)
        squares_O = weight.to(dtype).square().sum(1)
        self.lora_magnitude_vector = nn.Parameter(squares_O.sqrt().to(self.lora_A.dtype))
        self._squares = squares_O

    @property
    def bias(self) -> Tensor | None:
        """The base's b."""
        last = self.base_layer[-1] if isinstance(self.base_layer, nn.Sequential) else None
        return cast("Tensor | None", getattr(last or self.base_layer, "bias", None))

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        """Cost: 2 R (I + O) floating-point operations per row beside those of the base."""
        if not self.enabled:
            return cast("Tensor", self.base_layer(x))
        y_NO = self._base_product(x.reshape(-1, self.in_features))
        h_NR = self._down(self, x).reshape(-1, self.options.rank).to(y_NO.dtype)
        # In place, since no product's backward pass reads its own result; not into a view, for
        # which autograd would make more copies than that saves. A compiler decides that itself.
        in_place = not torch.compiler.is_compiling() and y_NO._base is None
        add = y_NO.addmm_ if in_place else y_NO.addmm
        y_NO = add(h_NR, self.lora_B.to(y_NO.dtype).T, alpha=self.options.scale)
        if self.lora_magnitude_vector is not None:
            factor_O = (self.lora_magnitude_vector / self._row_lengths(x.dtype)).to(y_NO.dtype)
            bias = self.bias
            y_NO = y_NO * factor_O
            if bias is not None:
                y_NO = y_NO + bias * (1 - factor_O)
        return y_NO.view(*x.shape[:-1], self.out_features)

    def _base_product(self, x_NI: Tensor) -> Tensor:
        layer = self.base_layer
        if type(layer) is nn.Linear:
            return frozen_linear(x_NI, layer.weight, layer.bias)
        return cast("Tensor", layer(x_NI))

    @torch.no_grad()
    def _row_lengths(self, input_dtype: torch.dtype) -> Float[Tensor, "O"]:
        """|W + s B A| by row, without ever making W: W A' is the base applied to A."""
        assert self._squares is not None
        dtype = torch.promote_types(self.lora_A.dtype, input_dtype)
        wa_RO = self.base_layer(self.lora_A.to(input_dtype)).to(dtype)
        if self.bias is not None:
            wa_RO = wa_RO - self.bias.to(dtype)
        a_RI, b_OR = self.lora_A.to(dtype), self.lora_B.to(dtype) * self.options.scale
        gram_RR = a_RI @ a_RI.T
        squares_O = self._squares.to(dtype) + (b_OR * (2 * wa_RO.T + b_OR @ gram_RR)).sum(1)
        lengths_O: Tensor = squares_O.clamp_min(torch.finfo(dtype).tiny).sqrt()
        return lengths_O

    @torch.no_grad()
    def merged_weight(self, weight: Float[Tensor, "O I"]) -> Float[Tensor, "O I"]:
        """The weight of the one dense layer that does the same, in the adapter's dtype.

        Args:
            weight: W; where the base is quantized, the matrix that it multiplies with.
        """
        dtype = self.lora_A.dtype
        merged_OI: Tensor = weight.to(dtype) + self.options.scale * (self.lora_B @ self.lora_A)
        if self.lora_magnitude_vector is None:
            return merged_OI
        lengths_O: Tensor = merged_OI.norm(dim=1)
        return merged_OI * (self.lora_magnitude_vector / lengths_O).unsqueeze(1)

    def extra_repr(self) -> str:
        """The sizes, for ``print(network)``."""
        return f"{self.in_features}, {self.out_features}, {self.options}"


class SharedDown:
    """The products A x of adapters that read the same x, as one product of their stacked As.

    The first layer that is called makes all; each takes its own, once. Dropout is shared too.
    In compiled code each makes its own and draws its own dropout: results that pass from one call
    to the next are out of a compiler's sight.

    Args:
        layers: Adapters, which use this from now on.
    """

    def __init__(self, layers: Sequence[AdaptedLinear]) -> None:
        self.layers = list(layers)
        self._key: list[Any] = []
        self._parts: dict[int, Tensor] = {}
        for layer in layers:
            layer._down = self

    def __call__(
        self, layer: AdaptedLinear, x: Float[Tensor, "*batch I"]
    ) -> Float[Tensor, "*batch R"]:
        """``layer``'s A times x, dropped out in training."""
        if torch.compiler.is_compiling():
            dropped = F.dropout(x, layer.options.dropout, layer.training)
            return F.linear(dropped, layer.lora_A.to(x.dtype))
        key = [torch.is_grad_enabled(), layer.training, 0 if x.is_inference() else x._version]
        key += [other.lora_A._version for other in self.layers]
        # Between two calls that get the same tensor, only a change of the As counts.
        is_known = bool(self._key) and self._key[0] is x and self._key[1:] == key
        if not is_known or id(layer) not in self._parts:
            stacked_RI = torch.cat([other.lora_A for other in self.layers])
            dropped = F.dropout(x, layer.options.dropout, layer.training)
            products = F.linear(dropped, stacked_RI.to(x.dtype))
            ranks = [other.options.rank for other in self.layers]
            ids = map(id, self.layers)
            self._parts = dict(zip(ids, products.split(ranks, -1), strict=True))
            self._key = [x, *key]
        part = self._parts.pop(id(layer))
        if not self._parts:
            self._key = []
        return part

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a network has nothing half done.
        return self.__dict__ | {"_key": [], "_parts": {}}
