"""What goes into each linear layer of a network on some text: second moments, block by block.

Axes: N rows, T tokens, D width, I in_features of a layer.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from fingpt_lightning.low_rank.decomposition import ShiftedMoments
from fingpt_lightning.models.block_calls import (
    BlockCall,
    block_outputs,
    blocks_of,
    first_batch,
    next_batches,
)
from fingpt_lightning.models.families import family_of
from fingpt_lightning.models.quantization.layers import is_linear


class InputMoments(NamedTuple):
    """Second moments of the inputs of some layers.

    Args:
        groups: Name of the moments of each layer; layers that read the same tensor share one.
        moments: C = X X' / n over all n tokens, in float64, by that name.
    """

    groups: dict[str, str]
    moments: dict[str, Float[Tensor, "I I"]]


class ReachedLayers(NamedTuple):
    """Layers that read the same tensor, when all that comes before them has been changed.

    Args:
        block: Block to change, a copy of the network's.
        layers: Names of the layers in the block, by their names in the network.
        moments: Moments of the layers' inputs; None where they were not wanted.
    """

    block: nn.Module
    layers: dict[str, str]
    moments: ShiftedMoments | None


class ChangedBlock(NamedTuple):
    """A block whose layers have all been changed, and what it was to put out.

    Args:
        name: Name of the block in the network.
        block: Block to change further, a copy of the network's.
        calls: Its calls in the network that is changed, a batch of rows each.
        targets: Outputs of the network's own block for the same rows, in the network as it is.
    """

    name: str
    block: nn.Module
    calls: list[BlockCall]
    targets: list[Tensor]


class _Reached(Exception):
    pass


def input_moments(
    network: PreTrainedModel,
    ids: Int[Tensor, "N T"],
    batch_rows: int = 4,
    *,
    refresh: bool = False,
) -> Iterator[InputMoments]:
    """The second moments of each block's linear layers, one block after the other, then the head's.

    All rows go through a block before any goes on, so that the moments of one block are held at a
    time, beside the hidden states of all rows: N T D numbers. Products are made in the network's
    dtype and summed over batches in float64.

    Args:
        network: Whole network in evaluation mode.
        ids: Tokens in rows of equal length.
        batch_rows: Number of rows that go through a block at a time.
        refresh: Whether later blocks read the outputs that a block has after its moments were
            taken, for callers that change it then; it is run twice.

    Cost: one forward pass without the head, and 2 I^2 operations per token for each distinct input.
    """
    name, blocks = blocks_of(network)
    batches = [first_batch(network, part) for part in ids.split(batch_rows)]
    for index, block in enumerate(blocks):
        sums = _Sums(f"{name}.{index}")
        with sums.watching(block):
            outputs = block_outputs(block, index, batches)
        yield sums.means(ids.numel())
        if refresh:
            outputs = block_outputs(block, index, batches)
        batches = next_batches(outputs, batches)
    family = family_of(network)
    norm = network.get_submodule(family.norm)
    sums = _Sums("")
    with torch.no_grad():
        for batch in batches:
            sums.add(family.head, norm(batch.hidden))
    yield sums.means(ids.numel())


def shifted_moments(
    network: PreTrainedModel,
    ids: Int[Tensor, "N T"],
    is_wanted: Callable[[Sequence[str]], bool],
    batch_rows: int = 4,
    finish: Callable[[ChangedBlock], None] = lambda _: None,
) -> Iterator[ReachedLayers]:
    """Layer after layer, what it reads in the network, and what in one that is changed on the way.

    Whoever takes a group of layers changes them in its block before the next: what later layers
    read comes through all that has been changed by then. The network itself stays as it is.

    Args:
        network: Network as in `input_moments`.
        ids: Tokens in rows of equal length.
        is_wanted: Function from a layer's name to whether its moments are wanted.
        batch_rows: Number of rows that go through a block at a time.
        finish: Function that may change a block once more when all its layers have been taken.

    Memory: the hidden states of all rows three times, a copy of a block, three moments.

    Cost: for each block two passes, and a part of two for each group of layers, about seven in all.
    """
    name, blocks = blocks_of(network)
    whole = [first_batch(network, part) for part in ids.split(batch_rows)]
    changed = whole
    for index, block in enumerate(blocks):
        own = copy.deepcopy(block)
        for group in _groups(block, whole[0].call(index)):
            layers = {f"{name}.{index}.{local}": local for local in group}
            moments = None
            if is_wanted(list(layers)):
                reads = (
                    (
                        _input(block, group[0], before.call(index)),
                        _input(own, group[0], now.call(index)),
                    )
                    for before, now in zip(whole, changed, strict=True)
                )
                moments = _shifted(reads, ids.numel())
            yield ReachedLayers(own, layers, moments)
        targets = block_outputs(block, index, whole)
        calls = [batch.call(index) for batch in changed]
        finish(ChangedBlock(f"{name}.{index}", own, calls, targets))
        changed = next_batches(block_outputs(own, index, changed), changed)
        whole = next_batches(targets, whole)


def _groups(block: nn.Module, call: BlockCall) -> list[list[str]]:
    """The linear layers of a block in the order they are reached, those of one input together."""
    groups: list[list[str]] = []
    last: list[Tensor] = []

    def reached(name: str, x: Tensor) -> None:
        if last and last[-1] is x:
            groups[-1].append(name)
        else:
            groups.append([name])
        last.append(x)

    hidden, args, kwargs = call
    with _watching(block, reached), torch.no_grad():
        block(hidden, *args, **kwargs)
    return groups


@contextmanager
def _watching(block: nn.Module, reached: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Reports the name of each linear layer that a block reaches, and its input."""
    with ExitStack() as stack:
        for name, module in block.named_modules():
            if is_linear(module):
                hook = module.register_forward_pre_hook(
                    lambda _, args, name=name: reached(name, args[0])
                )
                stack.callback(hook.remove)
        yield


def _input(block: nn.Module, name: str, call: BlockCall) -> Tensor:
    """What one of its layers reads, as a matrix of rows."""
    hidden, args, kwargs = call
    found: Tensor = _call_of(block.get_submodule(name), lambda: block(hidden, *args, **kwargs))[0]
    return found.reshape(-1, found.shape[-1])


def _shifted(reads: Iterator[tuple[Tensor, Tensor]], num_tokens: int) -> ShiftedMoments:
    sums: list[Tensor] = []
    for before, now in reads:
        products = [(x.T @ y).double() for x, y in ((before, before), (before, now), (now, now))]
        sums = [a + b for a, b in zip(sums, products, strict=True)] if sums else products
    return ShiftedMoments(*(total / num_tokens for total in sums))


class _Sums:
    """Sums X X' of the layers of a module."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._groups: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._last: tuple[Tensor, str] | None = None

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """Takes in what the linear layers of a block read."""
        with _watching(block, lambda name, x: self.add(f"{self._prefix}.{name}", x)):
            yield
        self._last = None

    def add(self, name: str, x: Tensor) -> None:
        """Adds what a layer reads, unless the layer before has read the same tensor."""
        if self._last is not None and self._last[0] is x:
            self._groups[name] = self._last[1]
            return
        self._last = (x, name)
        self._groups[name] = name
        x_NI = x.reshape(-1, x.shape[-1])
        product = (x_NI.T @ x_NI).double()
        self._sums[name] = product if name not in self._sums else self._sums[name].add_(product)

    def means(self, num_tokens: int) -> InputMoments:
        """Moments of all that was added."""
        moments = {name: total / num_tokens for name, total in self._sums.items()}
        return InputMoments(self._groups, moments)


@torch.no_grad()
def _call_of(module: nn.Module, run: Callable[[], object]) -> BlockCall:
    """The arguments of a module's call, in a run that ends there."""
    found: list[BlockCall] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[0], args[1:], kwargs))
        raise _Reached

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _Reached:
        pass
    finally:
        hook.remove()
    return found[0]
