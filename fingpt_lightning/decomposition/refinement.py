"""A block's factors trained so that the block puts out what the dense one did.

Axes: N rows, T tokens, D width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from fingpt_lightning.decomposition.layer_files import (
    SafetensorsReader,
    read_tensors,
    result_file,
    write_tensors,
)
from fingpt_lightning.files import to_json
from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.low_rank.factorize import Factors
from fingpt_lightning.models.block_calls import BlockCall

LEARNING_RATE = 0.002
"""Step of a factor's entries at the start, in units of their root mean square."""
_LAST_RATE = 0.05
_CLIPPED_NORM = 1.0


class BlockErrors(NamedTuple):
    """Relative errors of a block's outputs on the calibration text, before and after.

    Root of the mean over tokens of |block'(y) - block(x)|^2 / |block(x)|^2, where x and y reach
    the block in the dense and in the low-rank network.
    """

    block: str
    before: float
    after: float


def refined_file(folder: Path, block: str) -> Path:
    """Where the refined factors of a block are kept."""
    return folder / "refined" / f"{block}.safetensors"


def read_errors(folder: Path, block: str) -> BlockErrors | None:
    """What a refinement came to, where it is finished."""
    file = refined_file(folder, block)
    if not file.is_file():
        return None
    with safe_open(file, "pt") as opened:
        before, after = map(float, opened.metadata()["note"].strip("[]").split(","))
    return BlockErrors(block, before, after)


def last_factors(folder: Path, name: str, block: str | None) -> Factors:
    """The factors that a layer has in the end: refined, where its block is.

    Args:
        folder: Folder of the results.
        name: Name of the layer.
        block: Name of its block; None where it is in none.
    """
    if block is not None and (file := refined_file(folder, block)).is_file():
        reader = SafetensorsReader({f"{name}.{part}": file for part in ("up", "down")})
        return Factors(reader.read(f"{name}.up"), reader.read(f"{name}.down"))
    tensors = read_tensors(result_file(folder, name))
    return Factors(tensors["up"], tensors["down"])


def refine_block(
    block: nn.Module,
    calls: Sequence[BlockCall],
    targets: Sequence[Tensor],
    num_steps: int,
    seed: int,
    show: Callable[[int], None] = lambda _: None,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[float, float]:
    """Takes Adam steps over the factors of a block; they stay as they were if that is better.

    The factors are rounded to ``dtype`` before they are compared, so that the better ones are
    those that give the smaller error as they are stored.

    A step takes one batch of rows, and the error of a token counts relative to the size of its
    target, since some tokens' states are hundreds of times larger than others'. The step size of
    a factor is `LEARNING_RATE` of the root mean square of its entries, and falls by half a cosine.

    Args:
        block: Block with `LowRankLinear` layers, which alone change.
        calls: Calls of the block, a batch of rows each, with what reaches it in the low-rank
            network.
        targets: Outputs of the dense block for the same rows, with what reaches that.
        num_steps: Number of steps, at least 1.
        seed: Seed of the order of the batches.
        show: Function that receives the number of finished steps.
        dtype: Dtype that the factors are stored in.

    Returns:
        Relative errors of the outputs before and after, as in `BlockErrors`.

    Raises:
        FloatingPointError: The block's outputs are not finite before a step is taken.

    Source: https://arxiv.org/abs/2604.02119 (AA-SVD), whose errors are not relative.
    """
    factors = [
        factor
        for layer in block.modules()
        if isinstance(layer, LowRankLinear)
        for factor in (layer.up, layer.down)
    ]
    with torch.no_grad():
        for factor in factors:
            factor.copy_(factor.to(dtype))
    before = _error(block, calls, targets)
    if not math.isfinite(before):
        raise FloatingPointError("its outputs are not finite on the calibration text")
    if not factors:
        return before, before
    start = [factor.detach().clone() for factor in factors]
    trained = {id(factor) for factor in factors}
    frozen = [p for p in block.parameters() if p.requires_grad and id(p) not in trained]
    for parameter in frozen:
        parameter.requires_grad_(False)
    groups = [{"params": [x], "lr": LEARNING_RATE * float(x.square().mean().sqrt())} for x in start]
    for group, factor in zip(groups, factors, strict=True):
        group["params"] = [factor.requires_grad_()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * step / num_steps)) / 2,
    )
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(num_steps):
        if not order:
            order = torch.randperm(len(calls), generator=generator).tolist()
        index = order.pop()
        loss = _squared_errors(_output(block, calls[index]), targets[index]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(factors, _CLIPPED_NORM)
        optimizer.step()
        schedule.step()
        show(step + 1)
    for parameter in (*frozen, *factors):
        parameter.requires_grad_(True)
        parameter.grad = None
    with torch.no_grad():
        for factor in factors:
            factor.copy_(factor.to(dtype))
    after = _error(block, calls, targets)
    if after < before:
        return before, after
    with torch.no_grad():
        for factor, old in zip(factors, start, strict=True):
            factor.copy_(old)
    return before, before


def write_refined(
    folder: Path,
    block: str,
    layers: Mapping[str, LowRankLinear],
    errors: tuple[float, float],
    dtype: torch.dtype,
) -> None:
    """Writes the factors of a block in one file, which is whole or not there.

    Args:
        folder: Folder of the results.
        block: Name of the block.
        layers: Its low-rank layers by their names in the network.
        errors: Result of `refine_block`.
        dtype: Dtype of the stored factors.

    Raises:
        FloatingPointError: A factor is not finite.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for part, factor in (("up", layer.up), ("down", layer.down)):
            tensors[f"{name}.{part}"] = factor.detach().to("cpu", dtype)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{name}: not finite after refinement; take fewer steps")
    write_tensors(refined_file(folder, block), tensors, to_json(list(errors)))


def _output(block: nn.Module, call: BlockCall) -> Tensor:
    hidden, args, kwargs = call
    out = block(hidden, *args, **kwargs)
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _squared_errors(output: Tensor, target: Tensor) -> Float[Tensor, "N T"]:
    sizes = target.square().sum(-1).clamp_min(1e-12)
    return (output - target).square().sum(-1) / sizes


@torch.no_grad()
def _error(block: nn.Module, calls: Sequence[BlockCall], targets: Sequence[Tensor]) -> float:
    total, number = 0.0, 0
    for call, target in zip(calls, targets, strict=True):
        errors = _squared_errors(_output(block, call), target)
        total, number = total + float(errors.double().sum()), number + errors.numel()
    return math.sqrt(total / number)
