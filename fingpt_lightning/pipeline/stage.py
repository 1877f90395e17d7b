"""Cutting a transformers network into stages whose parameters keep their full names.

What a stage does not own becomes a module that hands its input on. The split is exact: the stages
in turn compute what the network computes.

Axes: B batch, T tokens, D width.
"""

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from fingpt_lightning.low_rank.adapters import FrozenBase
from fingpt_lightning.models.families import family_of, head_of
from fingpt_lightning.models.low_rank_config import has_own_head_map
from fingpt_lightning.pipeline.partition import Cost, NetworkCosts, Span


class PassThrough(nn.Module):
    """Stands for a part that another stage owns: returns its first argument."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """Whatever the part takes beside the hidden states is of no use."""
        return hidden


class NoPositions(nn.Module):
    """Stands for the embedding of positions, which the first stage has added already."""

    def forward(self, position_ids: Int[Tensor, "*batch"]) -> Float[Tensor, ""]:
        """A zero that takes the dtype of the other summand."""
        return torch.zeros((), device=position_ids.device)


def network_costs(
    network: PreTrainedModel,
    sequence_length: int,
    base: FrozenBase | None = None,
    keeps_inputs_alone: bool = False,
) -> NetworkCosts:
    """What each part of a network takes, from its weights; it may be on the meta device.

    A matrix of a block or of the head counts two operations per weight and token, and its result is
    an activation, twice where an elementwise function follows it; attention reads the whole
    sequence.

    Args:
        network: Network of a family in `FAMILIES`. Its frozen parts count the bytes they are stored
            in, packed where they are quantized.
        sequence_length: Tokens per sequence.
        base: Description of the frozen base of a network that is laid out.
        keeps_inputs_alone: Whether the backward pass computes all of a block again except its
            input.

    Raises:
        ValueError: The network's family is not supported.
    """
    family = family_of(network)
    width = network.config.hidden_size
    attention = Cost(flops_per_token=4 * sequence_length * width, activations_per_token=2 * width)
    front = [family.embedding, *family.front, *_given(family.positions)]
    stored = sum((_products(network.get_submodule(name), base) for name in front), Cost())
    back = [_products(network.get_submodule(name), base) for name in (family.norm, family.head)]
    blocks = []
    for index, block in enumerate(network.get_submodule(family.blocks).children()):
        cost = _products(block, base, is_block=True) + attention
        if base is not None:
            prefix = f"{family.blocks}.{index}."
            beside = sum(n for name, n in base.adapters.items() if name.startswith(prefix))
            cost += Cost(beside, 2 * beside)
        blocks.append(replace(cost, activations_per_token=width) if keeps_inputs_alone else cost)
    return NetworkCosts(
        # Looking a token up costs next to nothing.
        front=replace(stored, flops_per_token=0, activations_per_token=width),
        blocks=tuple(blocks),
        # The logits are never held whole.
        back=replace(sum(back, Cost()), activations_per_token=2 * width),
    )


def part_index(network: PreTrainedModel, name: str) -> int:
    """Where a parameter is: the index of its block, -1 before the blocks, their number behind."""
    family = family_of(network)
    if name.startswith(f"{family.blocks}."):
        return int(name.removeprefix(f"{family.blocks}.").partition(".")[0])
    is_behind = name.startswith(f"{family.norm}.") or family.is_head(name)
    return len(network.get_submodule(family.blocks)) if is_behind else -1  # type: ignore[arg-type]


def tied_parameters(network: PreTrainedModel) -> list[str]:
    """Names of the embedding's parameters that the head has too."""
    prefix = family_of(network).embedding
    embedding = network.get_submodule(prefix)
    of_head = {id(parameter) for parameter in head_of(network).parameters()}
    return [f"{prefix}.{n}" for n, p in embedding.named_parameters() if id(p) in of_head]


def unused_maps(network: PreTrainedModel, spans: Iterable[Span]) -> list[str]:
    """Names of parameters that a process holds beside its copy of a table and does not run.

    Where a factorized head has a map of its own beside the embedding's table, either end has both.
    """
    if not has_own_head_map(network.config):
        return []
    kept, family = list(spans), family_of(network)
    ends = {family.embedding: "is_first", family.head: "is_last"}
    return [f"{name}.up" for name, end in ends.items() if not any(getattr(s, end) for s in kept)]


def keep_stages(network: PreTrainedModel, spans: Iterable[Span]) -> None:
    """Takes out of a network what none of some stages owns, in place.

    Where head and embedding are tied, either end keeps both names of its copy. Do it on the meta
    device, and a process never holds more than its own part.
    """
    family = family_of(network)
    kept = list(spans)
    own_blocks = {block for span in kept for block in range(span.first, span.end)}
    has_front, has_back = (any(getattr(s, end) for s in kept) for end in ("is_first", "is_last"))
    is_tied = bool(tied_parameters(network))
    blocks = network.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    for index in range(len(blocks)):
        if index not in own_blocks:
            blocks[index] = PassThrough()
    keeps_both = is_tied and (has_front or has_back)
    if not (has_front or keeps_both):
        network.set_submodule(family.embedding, PassThrough())
    if not (has_back or keeps_both):
        network.set_submodule(family.head, PassThrough())
    if not has_front:
        for name in family.front:
            network.set_submodule(name, PassThrough())
        if family.positions is not None:
            network.set_submodule(family.positions, NoPositions())
    if not has_back:
        network.set_submodule(family.norm, PassThrough())


class Stage(nn.Module):
    """One stage of a network, with the network's own parameters.

    Args:
        network: Network, which may lack what other processes own.
        span: Part of the network that is this stage.
        forward_context: Context entered around each pass, for autocast.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        span: Span,
        forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__()
        self.span = span
        view = _view(network, [family_of(network).blocks])
        keep_stages(view, [span])
        self.body = view.base_model
        norm = f"{family_of(network).blocks}.{span.first}.{family_of(network).block_norm}"
        self.dtype = next(network.get_submodule(norm).parameters()).dtype
        self._forward_context = forward_context

    def forward(
        self,
        x: Int[Tensor, "B T"] | Float[Tensor, "B T D"],
        position_ids: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Tokens or the previous stage's result in, hidden states out, the last stage's normed."""
        given = {"input_ids": x} if self.span.is_first else {"inputs_embeds": x}
        with self._forward_context():
            output = self.body(**given, position_ids=position_ids, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        if self.span.is_last:
            return hidden
        # What travels between stages has one dtype, whatever autocast made of the last operation,
        # and is not a view: torch 2.13 detaches it in place where it takes the backward pass apart.
        hidden = hidden.to(self.dtype)
        return hidden.clone() if hidden._is_view() else hidden


def _view(module: nn.Module, paths: list[str]) -> Any:
    """A copy of a module and of what lies on some paths below it, sharing everything else."""
    copied = copy.copy(module)
    copied.__dict__["_modules"] = dict(module._modules)
    below: dict[str, list[str]] = {}
    for path in paths:
        name, _, rest = path.partition(".")
        below.setdefault(name, []).extend([rest] if rest else [])
    for name, paths_below in below.items():
        copied._modules[name] = _view(module.get_submodule(name), paths_below)
    return copied


def _given(name: str | None) -> list[str]:
    return [] if name is None else [name]


def _products(module: nn.Module, base: FrozenBase | None, is_block: bool = False) -> Cost:
    cost = Cost()
    for parameter in module.parameters():
        quantized = getattr(parameter, "quant_state", None)  # of bitsandbytes, which packs weights
        shape = parameter.shape if quantized is None else quantized.shape
        numbers, is_matrix = math.prod(shape), len(shape) > 1
        flops, results = (2 * numbers, 2 * max(shape)) if is_matrix else (0, 0)
        if base is not None:
            quantizes = is_block and is_matrix
            each = base.bytes_per_matrix_number if quantizes else base.bytes_per_number
            cost += Cost(numbers, flops, results, numbers, round(each * numbers))
        elif parameter.requires_grad:
            cost += Cost(numbers, flops, results)
        else:
            cost += Cost(numbers, flops, results, numbers, parameter.nbytes)
    return cost
