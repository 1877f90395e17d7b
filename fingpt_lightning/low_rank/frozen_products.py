"""Products with frozen weights in float32, by the faster library wherever they are computed.

Axes: N rows, I in_features, O out_features.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fingpt_lightning.low_rank.cpu_products import faster_products, has_faster_products


def frozen_linear(
    x: Float[Tensor, "N I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None
) -> Float[Tensor, "N O"]:
    """``x weight' + bias`` for a weight and bias that are not trained.

    Equal to ``torch.nn.functional.linear`` to rounding; parameters that are trained after all go
    that way.
    """
    is_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    is_float32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not is_float32 or is_trained or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        return cast("Tensor", _frozen_linear(x, weight, bias))
    if has_faster_products():
        result: Tensor = _FrozenLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return result
    return F.linear(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        with faster_products():
            return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        with faster_products():
            return grad_out @ weight, None, None


# For compiled code, which cannot look into the choice between libraries.
@torch.library.custom_op("fingpt::frozen_linear", mutates_args=())
def _frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with faster_products():
        return F.linear(x, weight, bias)


@torch.library.custom_op("fingpt::frozen_linear_backward", mutates_args=())
def _frozen_linear_backward(grad_out: Tensor, weight: Tensor) -> Tensor:
    with faster_products():
        return grad_out @ weight


@_frozen_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@_frozen_linear_backward.register_fake
def _(grad_out: Tensor, weight: Tensor) -> Tensor:
    return grad_out.new_empty(*grad_out.shape[:-1], weight.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
    return _frozen_linear_backward(grad_out, *ctx.saved_tensors), None, None


_frozen_linear.register_autograd(_backward, setup_context=_setup_context)
