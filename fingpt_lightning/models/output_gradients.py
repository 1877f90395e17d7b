"""Gradients of the loss at the outputs of each linear layer: second moments, block by block.

Axes: N rows, T tokens, D width, O out_features of a layer, C tokens of a chunk, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from fingpt_lightning.models.block_calls import (
    BlockBatch,
    block_outputs,
    blocks_of,
    first_batch,
    next_batches,
)
from fingpt_lightning.models.families import family_of, logits_of
from fingpt_lightning.models.quantization.layers import is_linear

_CHUNK = 128
"""Number of tokens whose logits are held at a time."""


class BackwardState(NamedTuple):
    """How far a backward pass has come.

    Args:
        block: Index of the block that it has left.
        gradients: Gradients of the loss at the inputs of that block.
    """

    block: int
    gradients: Float[Tensor, "N T D"]


class GradientMoments(NamedTuple):
    """Second moments of the gradients at the outputs of the linear layers of a block.

    Args:
        moments: G = E[g g'] over all tokens, in float64, by the names of the layers.
        state: State of the backward pass after the block.
    """

    moments: dict[str, Float[Tensor, "O O"]]
    state: BackwardState


def gradient_moments(
    network: PreTrainedModel,
    ids: Int[Tensor, "N T"],
    seed: int,
    batch_rows: int = 4,
    start: BackwardState | None = None,
) -> Iterator[GradientMoments]:
    """The curvature of the loss at the outputs of each block's linear layers, last block first.

    The loss of a row is the sum over its positions of the negative log-likelihood of a token that
    is drawn from the network's own prediction there. The second moments of its gradients are then
    those of the Fisher information, which is the Hessian of the divergence KL(network || changed
    network) at no change. With C the second moments of a layer's inputs, a small change E of its
    weight raises the mean divergence per token by about tr(G E C E') / 2, in nats, where gradients
    and inputs of a token are taken as independent and those of two tokens as uncorrelated (K-FAC).

    A backward pass is run through one block at a time, whose activations are computed anew, so that
    the moments and activations of one block are held at a time.

    Args:
        network: Whole network in evaluation mode.
        ids: Tokens in rows of equal length.
        seed: Seed of the drawn tokens.
        batch_rows: Number of rows that go through a block at a time.
        start: State of an earlier pass with the same arguments, which this one continues.

    Raises:
        FloatingPointError: A gradient is not finite; the message names the block.

    Memory: the hidden states of all rows before each block, L N T D numbers, on the CPU.

    Cost: about three forward passes, and 2 O^2 operations per token for each layer.

    Source: https://arxiv.org/abs/1503.05671 (K-FAC: true Fisher by drawn labels);
    https://arxiv.org/abs/2311.00636 (its form for weights shared by positions, "expand").
    """
    name, blocks = blocks_of(network)
    end = len(blocks) if start is None else start.block
    batches = [first_batch(network, part) for part in ids.split(batch_rows)]
    reached: list[list[Tensor]] = []
    for index in range(end):
        reached.append([batch.hidden.cpu() for batch in batches])
        if index + 1 < end or start is None:
            batches = next_batches(block_outputs(blocks[index], index, batches), batches)
    if start is None:
        draws = torch.rand(
            ids.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        gradients = [
            _last_gradients(network, batch.hidden, part)
            for batch, part in zip(batches, draws.split(batch_rows), strict=True)
        ]
    else:
        gradients = list(start.gradients.split(batch_rows))
    for index in reversed(range(end)):
        sums = _Sums(f"{name}.{index}")
        with sums.watching(blocks[index]):
            gradients = [
                _gradient(blocks[index], index, batch, hidden, gradient)
                for batch, hidden, gradient in zip(batches, reached.pop(), gradients, strict=True)
            ]
        moments = {layer: total / ids.numel() for layer, total in sums.totals.items()}
        if not all(moment.isfinite().all() for moment in moments.values()):
            raise FloatingPointError(
                f"{name}.{index}: the gradients of the loss on the calibration text are not finite"
            )
        yield GradientMoments(moments, BackwardState(index, torch.cat(gradients)))


def _gradient(
    block: nn.Module, index: int, batch: BlockBatch, hidden: Tensor, gradient: Tensor
) -> Float[Tensor, "N T D"]:
    """The gradient at a block's input, of that at its output."""
    device = batch.hidden.device
    _, args, kwargs = batch.call(index)
    leaf = hidden.to(device).detach().requires_grad_()
    with torch.enable_grad():
        output = block(leaf, *args, **kwargs)
    found = output[0] if isinstance(output, tuple) else output
    (before,) = torch.autograd.grad(found, leaf, gradient.to(device))
    return before.cpu()


def _last_gradients(
    network: PreTrainedModel, hidden: Float[Tensor, "N T D"], draws: Float[Tensor, "N T"]
) -> Float[Tensor, "N T D"]:
    """Gradients at what the last block puts out, with labels drawn from the prediction."""
    norm = network.get_submodule(family_of(network).norm)
    gradients = []
    parts = zip(hidden.flatten(0, 1).split(_CHUNK), draws.flatten().split(_CHUNK), strict=True)
    for part, uniform in parts:
        leaf = part.detach().requires_grad_()
        with torch.enable_grad():
            logits = logits_of(network, norm(leaf))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            labels = drawn_labels(logits.detach(), uniform.to(logits.device))
            loss = functional.cross_entropy(logits, labels, reduction="sum")
        gradients += torch.autograd.grad(loss, leaf)
    return torch.cat(gradients).view_as(hidden).cpu()


def drawn_labels(logits: Float[Tensor, "C V"], uniform: Float[Tensor, "C"]) -> Int[Tensor, "C"]:
    """One label per row, drawn from the softmax of its logits.

    Args:
        logits: Logits.
        uniform: A uniform draw from [0, 1) for each row, in float64: unlike those of
            ``torch.multinomial``, the labels do not depend on how rows are batched.
    """
    summed_CV = logits.double().softmax(-1).cumsum(-1)
    found = torch.searchsorted(summed_CV, uniform[:, None] * summed_CV[:, -1:], right=True)
    return found[:, 0].clamp_max(logits.shape[1] - 1)


class _Sums:
    """Sums g g' of the gradients g at the outputs of the linear layers of a block."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.totals: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """Takes in the gradients of all backward passes through the block."""
        with ExitStack() as stack:
            for name, module in block.named_modules():
                if is_linear(module):
                    hook = partial(self._watch, f"{self._prefix}.{name}")
                    stack.callback(module.register_forward_hook(hook).remove)
            yield

    def _watch(self, name: str, _: nn.Module, __: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._add, name))

    def _add(self, name: str, gradient: Tensor) -> None:
        g_NO = gradient.reshape(-1, gradient.shape[-1])
        product = (g_NO.T @ g_NO).double()
        self.totals[name] = product if name not in self.totals else self.totals[name].add_(product)
