"""Where the memory of a training step is: by storage, by role and by process."""

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

_PROCESS = Path("/proc/self")


class LiveTensorBytes(TorchDispatchMode):
    """Counts the bytes of the tensor storages that were allocated under it and still live.

    The CPU's stand-in for the CUDA allocator's counters. A storage counts from the operation that
    made it until its death, also after the mode has been left; views and in-place operations add
    nothing. Memory that a kernel takes and frees inside one operation is not seen. Code under
    ``torch.compile`` runs uncompiled below a dispatch mode, and stays so: do not mix them.

    Cost: some microseconds of Python per operation; results are those of the same kernels.

    >>> with LiveTensorBytes() as count:
    ...     x = torch.zeros(7, 11)
    ...     y = (x + 1).T
    ...     del x
    >>> count.live_bytes, count.peak_bytes
    (308, 616)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        # torch.tensor() allocates out of sight and shows its storage here, as an argument, first.
        fresh = func is torch.ops.aten.lift_fresh.default
        given = () if fresh else (storage._cdata for storage in _storages((args, kwargs)))
        self._count(_storages(out), frozenset(given))
        return out

    def _count(self, storages: Iterable[torch.UntypedStorage], given: frozenset[int]) -> None:
        for storage in storages:
            key = storage._cdata
            if key not in self._sizes:
                if key in given:
                    continue
                self._sizes[key] = 0
                weakref.finalize(storage, self._forget, key).atexit = False
            # Not only at birth: an in-place operation may have resized it.
            self.live_bytes += storage.nbytes() - self._sizes[key]
            self._sizes[key] = storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)


class ModuleMemory(NamedTuple):
    """Bytes that a module and its optimizer hold on this process."""

    weights: int
    gradients: int
    optimizer: int


def module_memory(module: nn.Module, optimizer: Optimizer | None = None) -> ModuleMemory:
    """Bytes of parameters with buffers, of gradients, and of the optimizer's state.

    Each storage counts once, so tied weights and views do; of a sharded tensor the local shard.
    The scales of weights that bitsandbytes quantized count as weights.
    """
    parameters = list(module.parameters())
    scales = [scale for parameter in parameters for scale in _scales(parameter)]
    return ModuleMemory(
        weights=storage_bytes([*parameters, *module.buffers(), *scales]),
        gradients=storage_bytes(p.grad for p in parameters if p.grad is not None),
        optimizer=0 if optimizer is None else storage_bytes(_tensors(optimizer.state)),
    )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each storage once.

    >>> x = torch.zeros(7, 11)
    >>> storage_bytes([x, x[0], x.T])
    308
    """
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum({s._cdata: s.nbytes() for s in _storages(local)}.values())


def peak_rss_bytes() -> int:
    """The most physical memory this process held since the last `reset_peak_rss`.

    Where the peak cannot be reset, that is since the process began.
    """
    if (status := _PROCESS / "status").exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # only on Unix

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_rss() -> bool:
    """Lets the peak of `peak_rss_bytes` begin anew from what the process holds now.

    Returns:
        Whether it was done: only Linux can do it, and some containers forbid it.

    Source: https://man7.org/linux/man-pages/man5/proc_pid_clear_refs.5.html
    """
    try:
        with (_PROCESS / "clear_refs").open("w", encoding="utf-8") as clear_refs:
            clear_refs.write("5")
    except OSError:
        return False
    return True


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf.is_meta:
            yield leaf.untyped_storage()


def _scales(parameter: nn.Parameter) -> Iterator[Tensor]:
    """What bitsandbytes keeps beside an NF4 weight, in objects that no module lists."""
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from _tensors(vars(state))
        state = getattr(state, "state2", None)


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)
