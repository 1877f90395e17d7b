"""Checkpoints of a network that is spread over the ranks of a pipeline, in one device's format."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from fingpt_lightning.pipeline import joined, split_like


@dataclass(frozen=True)
class WholeNames:
    """The names of a whole module, of which each rank holds a part.

    Args:
        parameters: Names of parameters in the order of ``named_parameters``.
        state: Keys of the state dict, in order.
        first_name: Parameter that a key of the state dict means, where it is another's alias.
    """

    parameters: tuple[str, ...]
    state: tuple[str, ...]
    first_name: Mapping[str, str]

    @classmethod
    def gather(
        cls, module: nn.Module, part_index: Callable[[str], int], group: dist.ProcessGroup
    ) -> "WholeNames":
        """The names of all ranks of the group, which call this together.

        Args:
            module: Part of the whole on this rank.
            part_index: Function from a name to the index of its part, in the order of the network.
            group: Group whose parts make the whole.
        """
        names = {id(p): name for name, p in module.named_parameters()}
        first_name = {
            name: names[id(p)] for name, p in module.named_parameters(remove_duplicate=False)
        }
        own = cls(tuple(names.values()), tuple(module.state_dict()), first_name)
        by_rank = [own] * dist.get_world_size(group)
        dist.all_gather_object(by_rank, own, group=group)
        return cls(
            _merged([of_rank.parameters for of_rank in by_rank], part_index),
            _merged([of_rank.state for of_rank in by_rank], part_index),
            {key: name for of_rank in by_rank for key, name in of_rank.first_name.items()},
        )

    def sorted(self, names: Iterable[str]) -> list[str]:
        """Each of some names once, in the order of the whole module."""
        position = {name: index for index, name in enumerate(self.parameters)}
        return sorted(set(names), key=position.__getitem__)


def gather_tensors(
    own: Mapping[str, Tensor], group: dist.ProcessGroup, device: torch.device, saves: bool = True
) -> dict[str, Tensor]:
    """The tensors of all ranks in the host memory of the group's first, one on its way at a time.

    All ranks of all pipelines call it together; the others get an empty dict.

    Args:
        own: Tensors of this rank, none of whose names is another rank's too.
        group: Group whose tensors are wanted: the ranks of a pipeline.
        device: Device from which the group's backend sends.
        saves: Whether this pipeline is the one to gather; the others give it their shares.
    """
    if not saves:
        for tensor in own.values():
            joined(tensor)
        return {}
    is_first = dist.get_rank(group) == 0
    described: list[dict[str, tuple[torch.Size, torch.dtype]]] = [{}] * dist.get_world_size(group)
    dist.gather_object(
        {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()},
        described if is_first else None,
        group=group,
        group_dst=0,
    )
    if not is_first:
        for tensor in own.values():
            dist.send(joined(tensor).to(device).contiguous(), group=group, group_dst=0)
        return {}
    whole = {name: joined(tensor).cpu() for name, tensor in own.items()}
    for source, of_source in enumerate(described[1:], 1):
        for name, (shape, dtype) in of_source.items():
            tensor = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(tensor, group=group, group_src=source)
            whole[name] = tensor.cpu()
    return whole


def gather_optimizer_state(
    optimizer: Optimizer,
    own_names: Mapping[nn.Parameter, str],
    names: WholeNames,
    group: dist.ProcessGroup,
    device: torch.device,
    saves: bool = True,
) -> dict[str, Any]:
    """The optimizer's state as held on one device, on the group's first rank; elsewhere empty.

    Args:
        optimizer: Optimizer of this rank's parameters.
        own_names: Names of the parameters whose state this rank answers for.
        names: Names of the whole module.
        group: All ranks of the pipeline; those of all pipelines call it together.
        device: Device from which the group's backend sends.
        saves: Whether this pipeline is the one to gather; the others give it their shares.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for parameter, name in own_names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                plain.setdefault(name, {})[key] = value
    groups = _whole_groups(optimizer, own_names, names, group)
    plain_by_rank: list[dict[str, dict[str, Any]]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(plain_by_rank, plain, group=group)
    gathered = gather_tensors(tensors, group, device, saves)
    if dist.get_rank(group) != 0 or not saves:
        return {}
    by_name: dict[str, dict[str, Any]] = {}
    for of_rank in plain_by_rank:
        by_name |= of_rank
    for label, tensor in gathered.items():
        name, _, key = label.rpartition("/")
        by_name.setdefault(name, {})[key] = tensor
    ids = {name: index for index, name in enumerate(name for part in groups for name in part)}
    settings = optimizer.state_dict()["param_groups"]
    return {
        "state": {ids[name]: state for name, state in by_name.items()},
        "param_groups": [
            {**group_settings, "params": [ids[name] for name in part]}
            for group_settings, part in zip(settings, groups, strict=True)
        ],
    }


def own_optimizer_state(
    saved: Mapping[str, Any],
    optimizer: Optimizer,
    own_names: Mapping[nn.Parameter, str],
    names: WholeNames,
    group: dist.ProcessGroup,
) -> dict[str, Any]:
    """This rank's part of a saved state of one device, ready to be loaded.

    Args:
        saved: State of the whole optimizer.
        optimizer: Optimizer of this rank's parameters.
        own_names: Names of all these parameters.
        names: Names of the whole module.
        group: All ranks of the pipeline, which call it together.

    Raises:
        ValueError: The state is of other groups of parameters.
    """
    groups = _whole_groups(optimizer, own_names, names, group)
    saved_sizes = [len(part["params"]) for part in saved["param_groups"]]
    if saved_sizes != [len(part) for part in groups]:
        raise ValueError(
            f"the checkpoint's optimizer has groups of {saved_sizes} parameters, this run's of"
            f" {[len(part) for part in groups]}"
        )
    saved_ids = {
        name: index
        for part, saved_part in zip(groups, saved["param_groups"], strict=True)
        for name, index in zip(part, saved_part["params"], strict=True)
    }
    own = optimizer.state_dict()["param_groups"]
    own_ids = (index for part in own for index in part["params"])
    parameters = (p for part in optimizer.param_groups for p in part["params"])
    states = {
        index: {key: split_like(value, p) for key, value in state.items()}
        for index, p in zip(own_ids, parameters, strict=True)
        if (state := saved["state"].get(saved_ids[own_names[p]])) is not None
    }
    return {
        "state": states,
        "param_groups": [
            {**saved_part, "params": part["params"]}
            for part, saved_part in zip(own, saved["param_groups"], strict=True)
        ],
    }


def _merged(by_rank: Sequence[Sequence[str]], part_index: Callable[[str], int]) -> tuple[str, ...]:
    """Each name once, by part; within a part in the order of the ranks that have it."""
    places: dict[str, tuple[int, int]] = {}
    for names in by_rank:
        for index, name in enumerate(names):
            # Either end has a copy of a tied embedding, but the other end's has fewer before it.
            places[name] = max((part_index(name), index), places.get(name, (-1, -1)))
    return tuple(sorted(places, key=places.__getitem__))


def _whole_groups(
    optimizer: Optimizer,
    own_names: Mapping[nn.Parameter, str],
    names: WholeNames,
    group: dist.ProcessGroup,
) -> list[list[str]]:
    """The names of each group of parameters, over all ranks, in the order of one device."""
    own = [
        [own_names[p] for p in part["params"] if p in own_names] for part in optimizer.param_groups
    ]
    by_rank: list[list[list[str]]] = [[]] * dist.get_world_size(group)
    dist.all_gather_object(by_rank, own, group=group)
    return [
        names.sorted(name for of_rank in parts for name in of_rank)
        for parts in zip(*by_rank, strict=True)
    ]
