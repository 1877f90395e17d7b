"""Runs code on the emulated device and notes what it would do to a real one.

Tensors are fake: they have a device, a dtype and a shape. Operators are dispatched as on CUDA, so
one that mixes devices or dtypes raises as it would there, under autograd and autocast too. What
depends on numbers is answered with some: every flag is true, every number 1, half of a mask is set;
whole numbers in a list count from 0, as those of an order do.

Only for processes of `building.run_on_cuda`, which it changes for good.
"""

import contextlib
import sys
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import bitsandbytes.nn
import bitsandbytes.nn.modules
import safetensors.torch
import torch
import transformers.masking_utils
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ROOT = Path(__file__).parents[3]
_aten = torch.ops.aten
_MEMORY_BYTES = 139 * 2**30
_VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "expand",
    "lift_fresh", "permute", "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unfold", "unsqueeze", "view",
    # Neither do these start a kernel.
    "device", "empty", "empty_like", "empty_strided", "is_same_size", "new_empty",
    "new_empty_strided", "resize_", "sym_size",
}  # fmt: skip
_WAITS = {"_local_scalar_dense", "equal", "masked_select", "nonzero", "unique_dim", "_unique2"}
"""Operators whose result, or its size, the host has to know."""


@dataclass
class Ledger:
    """What happened on the emulated device, by kind and line of this repository (else library).

    Args:
        waits: Times that the host waited for the device.
        blocking_copies: Copies between host and device that the host waited for.
        copies: Copies between host and device that it did not wait for.
        operators: Operators that start a kernel, by name.
        attention: Kernels of attention, by name.
        restored_random_states: Times that the state of the device's random numbers was set.
    """

    waits: Counter[str] = field(default_factory=Counter)
    blocking_copies: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    attention: Counter[str] = field(default_factory=Counter)
    restored_random_states: int = 0

    def clear(self) -> None:
        """Forgets everything."""
        self.__init__()  # type: ignore[misc]


class _Watch(TorchDispatchMode):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ledger = ledger

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        on_device = any(map(_is_on_device, tree_leaves((args, kwargs))))
        if name in _WAITS and on_device:
            self._ledger.waits[_at(name)] += 1
            return _answer(name, args)
        if name == "_pin_memory":
            return args[0]
        if name == "nonzero":  # on the host, where it has to be
            return _answer(name, args)
        if name == "_local_scalar_dense" and _has_no_number(args[0]):
            return _number(args[0])
        if name == "index" and any(map(_is_mask, args[1])) and on_device:
            self._ledger.waits[_at("index by a mask")] += 1
            mask = next(filter(_is_mask, args[1]))
            return args[0].new_empty(_half(mask), *args[0].shape[mask.ndim :])
        if name in ("_to_copy", "copy_"):
            self._note_copy(name, args, kwargs)
        result = func(*args, **kwargs)
        if name not in _VIEWS and (on_device or any(map(_is_on_device, tree_leaves(result)))):
            self._ledger.operators[name] += 1
        return result

    def _note_copy(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name == "copy_":
            to, source = args[0].device.type, args[1]
            is_async = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        else:
            source = args[0]
            to = torch.device(kwargs.get("device") or source.device).type
            is_async = kwargs.get("non_blocking")
        if to != source.device.type:
            noted = self._ledger.copies if is_async else self._ledger.blocking_copies
            noted[_at(f"{source.device.type} to {to}")] += 1


def _is_on_device(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == "cuda"


def _has_no_number(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.constant is None


def _is_mask(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _half(mask: Tensor) -> int:
    return max(1, mask.numel() // 2)


def _number(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return True
    if not tensor.is_floating_point():
        return 1
    # A gradient scaler takes the step where its count of infinities is 0.
    is_of_scaler = any("grad_scaler" in f.filename for f in traceback.extract_stack(limit=8))
    return 0.0 if is_of_scaler else 1.0


def _answer(name: str, args: tuple[Any, ...]) -> Any:
    match name:
        case "_local_scalar_dense":
            return _number(args[0])
        case "equal":
            return True
        case "nonzero":
            size = _half(args[0]), args[0].ndim
            return torch.empty(size, dtype=torch.long, device=args[0].device)
        case "_unique2":
            inverse = args[0].new_empty(args[0].shape, dtype=torch.long)
            return args[0].new_empty(_half(args[0])), inverse, inverse.new_empty(0)
        case "masked_select":
            return args[0].new_empty(_half(args[1]))
        case _:
            raise NotImplementedError(f"{name} has no answer on the emulated device yet")


def _at(what: str) -> str:
    """The kind and the innermost line of this repository, else of a library, that led to it."""
    frames = [f for f in traceback.extract_stack(limit=70) if f.filename != __file__]
    own = [f for f in frames if _is_own(f.filename)]
    frame = (own or [f for f in frames if "/torch/" not in f.filename] or frames)[-1]
    name = frame.filename.removeprefix(f"{_ROOT}/").rpartition("site-packages/")[-1]
    return f"{what} at {name}:{frame.lineno}: {frame.line}"


def _is_own(filename: str) -> bool:
    return filename.startswith(f"{_ROOT}/") and not (
        "site-packages" in filename or "/tests/support/" in filename
    )


class _Event:
    """An event after which all is done."""

    ledger: Ledger

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        self.ledger.waits[_at("Event.synchronize")] += 1


def _replaced(ledger: Ledger) -> dict[str, Any]:
    """What torch.cuda answers, by name."""
    properties = types.SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, total_memory=_MEMORY_BYTES,
        multi_processor_count=132, warp_size=32, L2_cache_size=60 * 2**20,
    )  # fmt: skip

    def synchronize(*_: Any, **__: Any) -> None:
        ledger.waits[_at("torch.cuda.synchronize")] += 1

    def set_rng_state(*_: Any, **__: Any) -> None:
        ledger.restored_random_states += 1

    def nothing(*_: Any, **__: Any) -> None:
        pass

    _Event.ledger = ledger
    return {
        "_is_compiled": lambda: True, "_lazy_init": nothing, "is_available": lambda: True,
        "is_initialized": lambda: True, "_initialized": True, "device_count": lambda: 1,
        "current_device": lambda: 0, "set_device": nothing, "device": contextlib.nullcontext,
        "get_device_name": lambda *_: properties.name,
        "get_device_capability": lambda *_: (properties.major, properties.minor),
        "get_device_properties": lambda *_: properties,
        "is_bf16_supported": lambda *_, **__: True,
        "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0, "max_memory_reserved": lambda *_: 0,
        "mem_get_info": lambda *_: (_MEMORY_BYTES, _MEMORY_BYTES), "empty_cache": nothing,
        "reset_peak_memory_stats": nothing, "utilization": lambda *_: 50,
        "manual_seed": nothing, "manual_seed_all": nothing,
        "get_rng_state": lambda *_: torch.get_rng_state(), "set_rng_state": set_rng_state,
        "get_rng_state_all": list, "set_rng_state_all": nothing,
        "synchronize": synchronize, "Event": _Event,
    }  # fmt: skip


def _attend(ledger: Ledger, on_cpu: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Attention by the kernel that CUDA takes, which a CPU build would not choose."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not _is_on_device(query):
            return on_cpu(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                enable_gqa=enable_gqa,
            )  # fmt: skip
        if torch.is_autocast_enabled("cuda"):
            wanted = torch.get_autocast_dtype("cuda")
            query, key, value = (x.to(wanted) for x in (query, key, value))
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.to(wanted)
        inputs = [x for x in (query, key, value, attn_mask) if x is not None]
        if not all(map(_is_on_device, inputs)):
            raise RuntimeError(f"attention mixes {[str(x.device) for x in inputs]}")
        if not query.dtype == key.dtype == value.dtype:
            raise RuntimeError(f"attention mixes {query.dtype}, {key.dtype}, {value.dtype}")
        if enable_gqa:
            per_key = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(per_key, 1) for x in (key, value))
        is_half = query.dtype in (torch.bfloat16, torch.float16)
        if attn_mask is None and is_half:
            ledger.attention["flash"] += 1
            flash = _aten._scaled_dot_product_flash_attention
            made = flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
            return cast("Tensor", made)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            hidden = attn_mask.logical_not()
            attn_mask = torch.zeros_like(hidden, dtype=query.dtype).masked_fill(hidden, -torch.inf)
        if attn_mask is not None:
            if attn_mask.dtype != query.dtype:
                raise RuntimeError(f"the mask is {attn_mask.dtype}, the query {query.dtype}")
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        if query.dtype == torch.float64:
            ledger.attention["math"] += 1
            written_out = _aten._scaled_dot_product_attention_math
            made = written_out(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)[0]
            return cast("Tensor", made)
        ledger.attention["efficient"] += 1
        needs_grad = query.requires_grad or key.requires_grad
        efficient = _aten._scaled_dot_product_efficient_attention
        made = efficient(
            query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale
        )[0]
        return cast("Tensor", made)

    return attend


def _params_4bit(
    data: Tensor,
    requires_grad: bool = False,
    quant_state: Any = None,
    module: Any = None,
    bnb_quantized: bool = False,
    **_: Any,
) -> nn.Parameter:
    """A plain parameter with what bitsandbytes' own class holds, which cannot be fake."""
    parameter = nn.Parameter(data, requires_grad=False)
    parameter.__dict__ |= {
        "quant_state": quant_state, "bnb_quantized": bnb_quantized, "module": module,
    }  # fmt: skip
    if module is not None:
        module.quant_state = quant_state
    return parameter


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """``Module._apply``, which would put a fake tensor into a real parameter."""
    for part in module.modules() if recurse else [module]:
        for name, parameter in part._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    moved = function(parameter)
                if moved is not parameter:
                    part._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = function(buffer)
    return module


def _deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """A copy, which torch makes by way of a storage that a fake tensor has not."""
    if id(tensor) not in memo:
        copied = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
    copy: Tensor = memo[id(tensor)]
    return copy


def _tolist(tensor: Tensor) -> Any:
    """Numbers in lists, which torch refuses to make of a fake tensor."""
    if not tensor.ndim:
        return _number(tensor)
    if tensor.ndim == 1 and tensor.dtype == torch.long:
        return list(range(len(tensor)))
    return [_tolist(part) for part in tensor.unbind()]


def emulate_cuda() -> Ledger:
    """Has this process's torch find the device; returns what is noted of it from now on."""
    ledger = Ledger()
    for name, value in _replaced(ledger).items():
        setattr(torch.cuda, name, value)
    # Nothing here is meant to be replaced, so types would refuse it.
    core: Any = torch._C
    amp: Any = torch.cuda.amp.common
    functional: Any = nn.functional
    fake: Any = FakeTensor
    mode: Any = FakeTensorMode
    masks: Any = transformers.masking_utils
    bnb: Any = bitsandbytes.nn
    core._cuda_getDeviceCount = lambda: 1
    amp.amp_definitely_not_available = lambda: False
    functional.scaled_dot_product_attention = _attend(
        ledger, functional.scaled_dot_product_attention
    )
    nn.Module._apply = _apply  # type: ignore[method-assign]
    fake.__deepcopy__ = _deepcopy
    fake.tolist = _tolist
    mode.avoid_device_init = property(lambda _: True)
    # As outside of fake tensors, where it would ask for the numbers of a mask.
    masks.is_tracing = lambda *_, **__: False
    bnb.Params4bit = bnb.modules.Params4bit = _params_4bit
    bnb.modules.fix_4bit_weight_quant_state_from_module = lambda _: None
    return ledger


@contextlib.contextmanager
def on_cuda(ledger: Ledger) -> Iterator[None]:
    """Within it tensors are fake and what happens to the device is noted."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Watch(ledger):
        yield


@contextlib.contextmanager
def ones_on_disk() -> Iterator[None]:
    """Within it files of fake tensors are written, with ones, and read.

    Modules that are imported within it write as ever.
    """
    save_file, asarray = safetensors.torch.save_file, torch.asarray

    def save_ones(tensors: dict[str, Tensor], *args: Any) -> None:
        with unset_fake_temporarily():
            ones = {name: torch.ones(tuple(x.shape), dtype=x.dtype) for name, x in tensors.items()}
            save_file(ones, *args)

    def read(*args: Any, **kwargs: Any) -> Tensor:
        with unset_fake_temporarily():
            return asarray(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(torch, "asarray", read))
        for module in list(sys.modules.values()):
            if vars(module).get("save_file") is save_file and module is not safetensors.torch:
                stack.enter_context(patch.object(module, "save_file", save_ones))
        yield
