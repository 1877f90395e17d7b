"""Products with frozen weights in float32, on CPUs where torch's default library is slow at them.

torch multiplies float32 matrices with MKL, which on processors that are not Intel's leaves half of
AVX-512 unused. torch's other library, oneDNN, does not, but is used only where reduced precision
is allowed. So it is allowed for these products alone, and only where none is lost by it: where a
product that was tried came out as exact as MKL's.

Axes: N rows, I in_features, O out_features.
"""

import functools
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


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


@functools.cache
def has_faster_products() -> bool:
    """Whether oneDNN's float32 products are known to be faster here, and found to be exact."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or _vendor() == "GenuineIntel":
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(256, 512, generator=stream)
    weight = torch.randn(384, 512, generator=stream)
    truth = x.double() @ weight.double().T
    with _onednn():
        error = (x @ weight.T).double() - truth
    # Sixteen times float32's rounding; on processors with AMX it comes out at bfloat16's, 2**-9.
    return bool(error.norm() <= 2.0**-20 * truth.norm())


def _vendor() -> str:
    info = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not info.is_file():
        return "GenuineIntel"  # where nothing is known, torch's choice stands
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


@contextmanager
def _onednn() -> Iterator[None]:
    backend: Any = torch.backends.mkldnn
    settings = backend.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        with _onednn():
            return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        with _onednn():
            return grad_out @ weight, None, None


# For compiled code, which cannot look into the choice between libraries.
@torch.library.custom_op("fingpt::frozen_linear", mutates_args=())
def _frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with _faster():
        return F.linear(x, weight, bias)


@torch.library.custom_op("fingpt::frozen_linear_backward", mutates_args=())
def _frozen_linear_backward(grad_out: Tensor, weight: Tensor) -> Tensor:
    with _faster():
        return grad_out @ weight


def _faster() -> AbstractContextManager[None]:
    return _onednn() if has_faster_products() else nullcontext()


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
