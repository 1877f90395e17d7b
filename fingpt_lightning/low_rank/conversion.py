"""One call that makes the linear layers of any module low-rank, in place."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fingpt_lightning.low_rank.adapters import AdaptedLinear
from fingpt_lightning.low_rank.factorize import Factors, factorize
from fingpt_lightning.low_rank.initialization import Initialization, initial_factors
from fingpt_lightning.low_rank.linear import LowRankLinear
from fingpt_lightning.low_rank.rank import Rank, resolve_rank
from fingpt_lightning.terminal.messages import nearest

ALL_LINEAR = "all-linear"


class LowRankReport(NamedTuple):
    """What `make_low_rank` did.

    Args:
        ranks: Rank of each layer that became low-rank, by its full name.
        kept: Why each of the other linear layers stayed as it was, by its full name.
        parameters_before: Numbers of all parameters of the network, shared ones counted once.
        parameters_after: The same afterwards.
    """

    ranks: dict[str, int]
    kept: dict[str, str]
    parameters_before: int
    parameters_after: int


@torch.no_grad()
def make_low_rank(
    network: nn.Module,
    rank: Rank | Mapping[str, Rank] = 0.25,
    names: str | Sequence[str] = ALL_LINEAR,
    *,
    initialization: str = "svd",
    generator: torch.Generator | None = None,
) -> LowRankReport:
    """Makes linear layers of a network low-rank, in place. Make the optimizer afterwards.

    Each ``torch.nn.Linear`` and each ``Conv1D`` of transformers that is chosen becomes a
    `LowRankLinear`, with the bias that it had, on its device, in its dtype, trained or frozen as
    it was. A layer whose factors would not be smaller than its weight stays dense.

    ``all-linear`` with one rank passes over the head of a transformers network and over layers
    that cannot be replaced: quantized ones, those under adapters, those that share their weight
    (a head tied to its embedding), those whose weight is computed or sharded, that have hooks, or
    whose parent reads their weight itself (``torch.nn.MultiheadAttention``). A layer that is
    named, in ``names`` or in a mapping of ranks, and cannot be replaced is refused. Where anything
    is refused, nothing is replaced.

    Args:
        network: Any module that is not a linear layer itself. A layer on the meta device becomes
            factors on the meta device.
        rank: An int is the rank of every layer, a float in (0, 1] the share r / min(in, out). A
            mapping from names, as in ``names``, to such numbers chooses these layers; of several
            entries that fit a layer the last one counts, and None keeps it dense.
        names: ``all-linear``; or full names, ends of full names such as ``c_fc``, or patterns
            such as ``*.mlp.*``.
        initialization: ``svd`` for the factors nearest to the present weight; ``cola`` or
            ``orthogonal`` for factors drawn anew (see `Initialization`), the latter at the scale
            of the present weight.
        generator: Source of the draws, on the layers' device; None takes torch's own.

    Raises:
        ValueError: A name fits no linear layer, a rank does not fit its layer, or a layer cannot
            be replaced; the message names it and gives the reason.

    Cost: with ``svd`` an eigendecomposition of a min(in, out) square matrix for each layer.

    Source: https://arxiv.org/abs/2402.13533, section 3; Eckart and Young (1936) for ``svd``.

    >>> network = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))
    >>> report = make_low_rank(network, rank=8)
    >>> report.ranks, report.kept
    ({'0': 8}, {'2': 'factors of rank 8 are not smaller than 48 x 4'})
    >>> report.parameters_before, report.parameters_after
    (3316, 1140)
    """
    if initialization not in list(Initialization):
        hint = nearest(initialization, Initialization)
        known = ", ".join(Initialization)
        raise ValueError(f"initialization {initialization!r} is none of {known}{hint}")
    if _is_linear(network):
        raise ValueError(
            f"the network is itself a {type(network).__name__}, which cannot be replaced in place;"
            " take LowRankLinear.from_dense"
        )
    before = _num_parameters(network)
    layers = _linear_layers(network)
    ranks, kept = _choose(network, layers, rank, names)
    start = Initialization(initialization)
    for name in ranks:
        _check_numbers(name, _weight(layers[name].module), start)
    for name, columns in ranks.items():
        pair = _pair(layers[name].module, columns, start, generator)
        for place in layers[name].names:
            network.set_submodule(place, pair)
    _leave_fast_paths(network)
    if not ranks:
        warnings.warn(
            f"make_low_rank with rank {rank!r} changed nothing: {_shown(kept)}", stacklevel=2
        )
    return LowRankReport(ranks, kept, before, _num_parameters(network))


class _Layer(NamedTuple):
    """A linear layer and all the names that it has in the network."""

    module: nn.Module
    names: list[str]


def _choose(
    network: nn.Module,
    layers: Mapping[str, _Layer],
    rank: Rank | Mapping[str, Rank],
    names: str | Sequence[str],
) -> tuple[dict[str, int], dict[str, str]]:
    """The ranks of the layers to replace, and why the others stay."""
    wanted = ["*"] if names == ALL_LINEAR else [names] if isinstance(names, str) else list(names)
    rules = rank if isinstance(rank, Mapping) else {"*": rank}
    is_named = names != ALL_LINEAR or isinstance(rank, Mapping)
    if not layers:
        raise ValueError("the network has no torch.nn.Linear or Conv1D layer")
    for setting, patterns in (("names", wanted), ("rank", rules)):
        for pattern in patterns:
            if not any(_fits(layer, pattern) for layer in layers.values()):
                raise ValueError(f"{setting} {pattern!r} {_no_fit(network, layers, pattern)}")
    obstacles = _obstacles(network, layers)
    head = _head(network)
    ranks: dict[str, int] = {}
    kept: dict[str, str] = {}
    for name, layer in layers.items():
        own = [value for pattern, value in rules.items() if _fits(layer, pattern)]
        if not own or not any(_fits(layer, pattern) for pattern in wanted):
            kept[name] = "not named"
        elif own[-1] is None:
            kept[name] = "its rank is None"
        elif not is_named and layer.module is head:
            kept[name] = "it is the head; name it to make it low-rank"
        elif name in obstacles:
            if is_named:
                raise ValueError(f"{name} cannot become low-rank: {obstacles[name]}")
            kept[name] = obstacles[name]
        else:
            columns = _columns(name, own[-1], _sizes(layer.module), is_named)
            if columns is None:
                size = "{} x {}".format(*_sizes(layer.module))
                kept[name] = f"factors of rank {own[-1]} are not smaller than {size}"
            else:
                ranks[name] = columns
    return ranks, kept


def _columns(name: str, rank: Rank, sizes: tuple[int, int], is_named: bool) -> int | None:
    if not is_named and isinstance(rank, int) and rank > min(sizes):
        return None  # one rank for all is not meant for the smallest
    try:
        return resolve_rank(rank, *sizes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _linear_layers(network: nn.Module) -> dict[str, _Layer]:
    found: dict[nn.Module, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if _is_linear(module):
            found.setdefault(module, []).append(name)
    return {names[0]: _Layer(module, names) for module, names in found.items()}


def _obstacles(network: nn.Module, layers: Mapping[str, _Layer]) -> dict[str, str]:
    """Why some layers cannot be replaced."""
    owners: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    under_adapters = {
        part
        for module in network.modules()
        if isinstance(module, AdaptedLinear)
        for part in module.modules()
    }
    found: dict[str, str] = {}
    for name, (module, names) in layers.items():
        weight = module._parameters.get("weight")
        own = {f"{place}.weight" for place in names}
        others = [other for other in owners.get(id(weight), []) if other not in own]
        if module in under_adapters:
            found[name] = "it is under an adapter; merge or remove the adapters first"
        elif weight is not None and not weight.is_floating_point():
            found[name] = f"it is quantized ({type(module).__name__}); start from the model before"
        elif not _is_plain(module):
            found[name] = f"it is a {type(module).__name__}, whose forward pass is its own"
        elif weight is None:
            found[name] = "its weight is computed, by a parametrization or weight_norm"
        elif isinstance(weight, DTensor):
            found[name] = "its weight is sharded; call make_low_rank before"
        elif others:
            found[name] = f"it shares its weight with {others[0].removesuffix('.weight')}"
        elif any(getattr(module, hooks) for hooks in _HOOKS):
            found[name] = "it has hooks, which would be lost; register them afterwards"
    return found


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _head(network: nn.Module) -> nn.Module | None:
    """The output layer of a transformers network."""
    get = getattr(network, "get_output_embeddings", None)
    return cast("nn.Module | None", get()) if callable(get) else None


def _fits(layer: _Layer, pattern: str) -> bool:
    return any(
        name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)
        for name in layer.names
    )


def _no_fit(network: nn.Module, layers: Mapping[str, _Layer], pattern: str) -> str:
    """Why a name fits no linear layer."""
    for name, module in network.named_modules():
        if name and _fits(_Layer(module, [name]), pattern):
            if isinstance(module, LowRankLinear):
                return f"is low-rank already, with rank {module.rank}"
            break
    ends = dict.fromkeys(name.rpartition(".")[2] for name in layers)
    hint = nearest(pattern, [*ends, *layers])
    return f"fits no linear layer; there are {_listed(ends)}, or all as {ALL_LINEAR}{hint}"


def _listed(names: Iterable[str], most: int = 12) -> str:
    shown = list(names)
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")


def _shown(kept: Mapping[str, str]) -> str:
    name, reason = next(iter(kept.items()))
    return f"{len(kept)} linear layers stay as they are, such as {name} ({reason})"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer that stores its weight transposed."""
    kind = type(module)  # named, since transformers may not be installed here
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def _weight(layer: nn.Module) -> Tensor:
    """``out_features x in_features``."""
    weight = cast("Tensor", layer.weight)
    return weight.T if _is_conv1d(layer) else weight


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """In and out features."""
    out_features, in_features = _weight(layer).shape
    return in_features, out_features


def _check_numbers(name: str, weight: Tensor, initialization: Initialization) -> None:
    if weight.is_meta or initialization is Initialization.COLA:
        return
    if not weight.isfinite().all():
        raise ValueError(f"{name}: the weight has numbers that are not finite")
    if initialization is Initialization.ORTHOGONAL and not weight.any():
        raise ValueError(f"{name}: the weight is 0 throughout, which gives orthogonal no scale")


def _pair(
    layer: nn.Module,
    rank: int,
    initialization: Initialization,
    generator: torch.Generator | None,
) -> LowRankLinear:
    weight = _weight(layer)
    out_features, in_features = weight.shape
    with torch.device("meta"):
        pair = LowRankLinear(in_features, out_features, rank, bias=False)
    if weight.is_meta:
        factors = Factors(weight.new_empty(out_features, rank), weight.new_empty(rank, in_features))
    elif initialization is Initialization.SVD:
        factors = factorize(weight, rank)
    else:
        std = float(weight.double().square().mean().sqrt())
        factors = initial_factors(
            initialization, in_features, out_features, rank, std, generator, weight.device
        )
    is_trained = cast("Tensor", layer.weight).requires_grad
    pair.up = nn.Parameter(factors.up.to(weight.dtype), is_trained)
    pair.down = nn.Parameter(factors.down.to(weight.dtype), is_trained)
    pair.bias = cast("nn.Parameter | None", layer.bias)
    return pair.train(layer.training)


def _leave_fast_paths(network: nn.Module) -> None:
    """Keeps torch's encoder off the kernel that reads its layers' dense weights in evaluation."""
    for module in network.modules():
        if any(isinstance(part, LowRankLinear) for part in module.modules()):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            elif isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False


def _num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
