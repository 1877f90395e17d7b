"""Many adapters on one base: loaded and unloaded while it runs, mixed in one batch.

Axes: B rows, T tokens, I in_features, O out_features, R rank, K ranks of several clients, C
clients and the base.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from fingpt_lightning.low_rank.adapters import AdapterOptions
from fingpt_lightning.models.adapting import (
    adapted_layers,
    dense_weight,
    ends_features,
    linear_names,
)
from fingpt_lightning.models.formats.peft_adapter import check_place, read_adapter
from fingpt_lightning.terminal.messages import nearest


class LayerAdapter(NamedTuple):
    """One client's factors A and B at one layer: y = factor (W x + scale B A x) + (1 - factor) b.

    ``factor`` is None except with DoRA, whose row lengths are divided out once, when it is loaded.
    """

    down: Float[Tensor, "R I"]
    up: Float[Tensor, "O R"]
    scale: float
    factor: Float[Tensor, "O"] | None

    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        factor = 0 if self.factor is None else self.factor.nbytes
        return self.down.nbytes + self.up.nbytes + factor


_MOST_STACKED = 8
"""Clients whose factors are stacked: each row is multiplied by all of them, and keeps its own."""


_MOST_COPIES = 4
"""Rows per client up to which each row has a copy of its factors, where there are many clients."""


class _Active(NamedTuple):
    """What a layer adds in the current batch, in the network's dtype, with the scale in ``up``.

    With an axis of rows where rows differ, without one where all rows have the same client.
    """

    down: Tensor
    up: Tensor
    factor: Tensor | None


class _Stack(NamedTuple):
    """The factors of several clients below each other; K is the sum of their ranks.

    ``factor`` has a row per client, and a last one of ones.
    """

    clients: tuple[str, ...]
    ranks: tuple[int, ...]
    down: Float[Tensor, "K I"]
    up: Float[Tensor, "O K"]
    factor: Float[Tensor, "C O"] | None


class _Stacked(NamedTuple):
    """A stack, which of its ranks are not those of each row, and the client of each row."""

    stack: _Stack
    is_foreign: Tensor
    clients: Tensor


class _Groups(NamedTuple):
    """The rows of each client in a batch of so many, and what is added to them."""

    num_rows: int
    parts: tuple[tuple[Tensor, _Active], ...]


class RowClients:
    """The clients of a batch's rows, for all layers.

    Args:
        names: Names of the rows' clients.
        clients: Names in the order of stacks.
        device: Device of the network.
    """

    def __init__(
        self, names: Sequence[str | None], clients: tuple[str, ...], device: torch.device
    ) -> None:
        self.names, self.clients = names, clients
        places = {name: place for place, name in enumerate(clients)}
        found = [len(clients) if name is None else places[name] for name in names]
        self.client_B = torch.tensor(found, device=device)
        self._is_foreign: dict[tuple[int, ...], Tensor] = {}

    def is_foreign(self, ranks: tuple[int, ...]) -> Bool[Tensor, "B K"]:
        """Which ranks of a stack are those of other rows' clients."""
        if ranks not in self._is_foreign:
            owners = [place for place, rank in enumerate(ranks) for _ in range(rank)]
            owner_K = torch.tensor(owners, device=self.client_B.device)
            self._is_foreign[ranks] = self.client_B[:, None] != owner_K
        return self._is_foreign[ranks]


class RoutedLinear(nn.Module):
    """A linear layer that adds to each row the output of that row's adapter.

    Args:
        base_layer: Layer of the base: dense, low-rank or quantized.
        in_features: I.
        out_features: O.
    """

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int) -> None:
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base_layer, in_features, out_features
        self.adapters: dict[str, LayerAdapter] = {}
        self.active: _Active | _Stacked | _Groups | None = None
        self._stack: _Stack | None = None

    @property
    def bias(self) -> Tensor | None:
        """The base's b."""
        last = self.base_layer[-1] if isinstance(self.base_layer, nn.Sequential) else None
        return cast("Tensor | None", getattr(last or self.base_layer, "bias", None))

    def forward(self, x: Float[Tensor, "B T I"]) -> Float[Tensor, "B T O"]:
        """Cost: 2 R (I + O) floating-point operations per token beside those of the base.

        R is the sum of the ranks where the factors of several clients are stacked.
        """
        y: Tensor = self.base_layer(x)
        if self.active is None:
            return y
        if isinstance(self.active, _Active) and self.active.down.ndim == 2:
            return self._added(self.active, x, y)
        # Tokens of a packed sequence are so many rows of one token.
        shape, num_rows = y.shape, self._num_rows()
        if len(x) == 1 and x.shape[1] == num_rows:
            x, y = x.transpose(0, 1), y.transpose(0, 1)
        if num_rows != len(x):
            raise ValueError(f"a batch of {len(x)} rows with adapters for {num_rows}")
        if isinstance(self.active, _Stacked):
            y = self._with_own(self.active, x, y)
        elif isinstance(self.active, _Groups):
            for rows, active in self.active.parts:
                y = y.index_copy(0, rows, self._added(active, x[rows], y[rows]))
        else:
            y = self._added(self.active, x, y)
        return y.reshape(shape)

    def _num_rows(self) -> int:
        if isinstance(self.active, _Groups):
            return self.active.num_rows
        assert self.active is not None
        return len(self.active[1] if isinstance(self.active, _Stacked) else self.active.down)

    def _with_own(self, active: _Stacked, x: Tensor, y: Tensor) -> Tensor:
        """Adds to each row what its own client gives, from the products with all clients."""
        stack, is_foreign_BK, client_B = active
        given_BTK = F.linear(x.flatten(0, 1), stack.down).view(*x.shape[:2], -1)
        # Not a product with zero: another client's may be infinite.
        own_BTK = given_BTK.masked_fill_(is_foreign_BK[:, None], 0)
        made = y.flatten(0, 1).addmm_(own_BTK.flatten(0, 1), stack.up.T).view(y.shape)
        if stack.factor is None:
            return made
        return self._scaled(made, stack.factor[client_B][:, None])

    def _added(self, active: _Active, x: Tensor, y: Tensor) -> Tensor:
        down, up, factor = active
        if down.ndim == 2:
            y = y + F.linear(F.linear(x, down), up)
        else:
            y = torch.baddbmm(y, torch.bmm(x, down.mT), up.mT)
        return y if factor is None else self._scaled(y, factor)

    def _scaled(self, y: Tensor, factor: Tensor) -> Tensor:
        y = y * factor
        return y if self.bias is None else y + self.bias * (1 - factor)

    def activate(self, batch: RowClients, dtype: torch.dtype) -> None:
        """Prepares for a batch: one name per row, or one for all."""
        names = batch.names
        there = [self.adapters.get(name) if name is not None else None for name in names]
        clients = {name: adapter for name, adapter in zip(names, there, strict=True) if adapter}
        if not clients:
            self.active = None
        elif len(names) == 1:
            (adapter,) = clients.values()
            self.active = _ready(adapter, dtype)
        elif len(batch.clients) <= _MOST_STACKED and (stack := self._stacked(batch, dtype)):
            self.active = _Stacked(stack, batch.is_foreign(stack.ranks), batch.client_B)
        elif len(names) <= _MOST_COPIES * len(clients):
            self.active = self._copies(there, dtype)
        else:
            parts = []
            for name, adapter in clients.items():
                rows = [row for row, of_row in enumerate(names) if of_row == name]
                parts.append(
                    (torch.tensor(rows, device=adapter.down.device), _ready(adapter, dtype))
                )
            self.active = _Groups(len(names), tuple(parts))

    def deactivate(self) -> None:
        """Answers as the base, and frees what was made for a batch."""
        self.active = self._stack = None

    def _stacked(self, batch: RowClients, dtype: torch.dtype) -> _Stack | None:
        """The factors of the batch's clients; None where one is not finite."""
        if self._stack is not None and self._stack.clients == batch.clients:
            return self._stack
        of_clients = [self.adapters.get(name) for name in batch.clients]
        there = [adapter for adapter in of_clients if adapter is not None]
        up = torch.cat([adapter.up.to(dtype) * adapter.scale for adapter in there], 1)
        if not up.isfinite().all():  # zero times an infinity would be every row's NaN
            return None
        factor = None
        if any(adapter.factor is not None for adapter in there):
            factor = up.new_ones(len(of_clients) + 1, self.out_features)
            for place, adapter in enumerate(of_clients):
                if adapter is not None and adapter.factor is not None:
                    factor[place] = adapter.factor
        ranks = tuple(0 if adapter is None else len(adapter.down) for adapter in of_clients)
        down = torch.cat([adapter.down.to(dtype) for adapter in there])
        self._stack = _Stack(batch.clients, ranks, down, up, factor)
        return self._stack

    def _copies(self, there: Sequence[LayerAdapter | None], dtype: torch.dtype) -> _Active:
        """The factors of each row, padded to one rank."""
        rank = max(len(adapter.down) for adapter in there if adapter is not None)
        device = next(adapter.down.device for adapter in there if adapter is not None)
        rows = len(there)
        down_BRI = torch.zeros(rows, rank, self.in_features, dtype=dtype, device=device)
        up_BOR = torch.zeros(rows, self.out_features, rank, dtype=dtype, device=device)
        has_factor = any(a is not None and a.factor is not None for a in there)
        factor_B1O = torch.ones(rows, 1, self.out_features, dtype=dtype, device=device)
        for row, adapter in enumerate(there):
            if adapter is None:
                continue
            own = len(adapter.down)
            down_BRI[row, :own] = adapter.down
            up_BOR[row, :, :own] = adapter.up.to(dtype) * adapter.scale
            if adapter.factor is not None:
                factor_B1O[row, 0] = adapter.factor
        return _Active(down_BRI, up_BOR, factor_B1O if has_factor else None)


def _ready(adapter: LayerAdapter, dtype: torch.dtype) -> _Active:
    """One client's part for all rows that it has."""
    factor = None if adapter.factor is None else adapter.factor.to(dtype)
    return _Active(adapter.down.to(dtype), adapter.up.to(dtype) * adapter.scale, factor)


class AdapterBank:
    """The adapters of one base, by the names of their clients.

    A further client costs the bytes of its adapter. While a batch runs, it also holds a copy in the
    network's dtype for each of its clients, or for each of its rows where there are many clients.

    Args:
        network: Base network, quantized or not, in evaluation mode and without adapters. Its layers
            are wrapped in place when the first adapter for them is loaded.

    Raises:
        ValueError: It has adapters of its own.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        if adapted_layers(network):
            raise ValueError("the network has an adapter already; merge it or load the base alone")
        self._network = network
        self._linear = set(linear_names(network))
        self._layers: dict[str, RoutedLinear] = {}
        self._names: dict[str, int] = {}
        self._stacked: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The clients that are loaded, in the order of loading."""
        return list(self._names)

    @property
    def _device(self) -> torch.device:
        return self._network.device

    def num_bytes(self, name: str) -> int:
        """Bytes of a client's adapter in memory."""
        self.check(name)
        return self._names[name]

    def check(self, name: str) -> None:
        """Raises unless a client is loaded.

        Raises:
            ValueError: It is not loaded; the message has the nearest name.
        """
        if name not in self._names:
            there = ", ".join(self._names) or "none"
            hint = nearest(name, self._names)
            raise ValueError(f"adapter {name!r} is not loaded; there are {there}{hint}")

    @torch.no_grad()
    def load(self, name: str, folder: str | Path) -> None:
        """Loads a client's adapter.

        Args:
            name: Name that is new to the bank.
            folder: Folder of an adapter in PEFT's format, or a checkpoint of adapters.

        Raises:
            FileNotFoundError: The folder has no adapter.
            ValueError: The name is taken, or the adapter does not fit the base.
        """
        if name in self._names:
            raise ValueError(f"adapter {name!r} is loaded already; unload it first")
        folder = Path(folder).expanduser()
        config, layers = read_adapter(folder)
        device = self._device
        made: dict[str, tuple[RoutedLinear, LayerAdapter]] = {}
        for layer_name, parts in layers.items():
            layer = self._routed(layer_name, folder)
            sizes = (parts["lora_A"].shape[1], parts["lora_B"].shape[0])
            if sizes != (layer.in_features, layer.out_features):
                raise ValueError(
                    f"{folder}: {layer_name} is {layer.in_features} x {layer.out_features} in the"
                    f" base, {sizes[0]} x {sizes[1]} in the adapter"
                )
            down, up = (parts[part].to(device, copy=True) for part in ("lora_A", "lora_B"))
            options = config.options_of(layer_name)
            factor = _factor(layer, down, up, parts.get("lora_magnitude_vector"), options)
            made[layer_name] = layer, LayerAdapter(down, up, options.scale, factor)
        for layer_name, (layer, adapter) in made.items():
            if layer_name not in self._layers:
                self._network.set_submodule(layer_name, layer)
                self._layers[layer_name] = layer
            layer.adapters[name] = adapter
        self._names[name] = sum(adapter.num_bytes() for _, adapter in made.values())

    def unload(self, name: str) -> None:
        """Removes a client's adapter and frees its memory.

        Raises:
            ValueError: It is not loaded.
        """
        self.check(name)
        self.deactivate()
        for layer in self._layers.values():
            layer.adapters.pop(name, None)
        del self._names[name]

    @contextmanager
    def rows(self, names: str | Sequence[str | None] | None) -> Iterator[None]:
        """Within it each row of a batch is answered by its own client's adapter.

        Args:
            names: One name per row, None for the base; or one for all rows of any batch.

        Raises:
            ValueError: A name is not loaded.
        """
        try:
            self.activate([names] if names is None or isinstance(names, str) else names)
            yield
        finally:
            self.deactivate()

    def activate(self, names: Sequence[str | None]) -> None:
        """Has each row be answered by its own client's adapter, until others are activated.

        What stays the same from batch to batch is kept, which `rows` frees.

        Args:
            names: One name per row, None for the base; one alone, or all the same, for all rows of
                any batch. The tokens of a packed sequence count as rows.

        Raises:
            ValueError: A name is not loaded.
        """
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        for name in wanted:
            self.check(name)
        if len(set(names)) == 1:
            names = names[:1]
        else:
            kept = [name for name in self._stacked if name not in wanted]
            more = kept if len(wanted) + len(kept) <= _MOST_STACKED else []
            self._stacked = tuple(sorted([*wanted, *more]))
        batch = RowClients(names, self._stacked if len(names) > 1 else tuple(wanted), self._device)
        for layer in self._layers.values():
            layer.activate(batch, self._network.dtype)

    def deactivate(self) -> None:
        """Answers as the base, and frees the copies that were made for batches."""
        self._stacked = ()
        for layer in self._layers.values():
            layer.deactivate()

    def _routed(self, name: str, folder: Path) -> RoutedLinear:
        if name in self._layers:
            return self._layers[name]
        if name not in self._linear:
            check_place(name, self._network, folder)
            raise ValueError(f"{folder}: the base has no layer {name} that can be adapted")
        layer = self._network.get_submodule(name)
        return RoutedLinear(layer, *ends_features(layer)).train(layer.training)


def _factor(
    layer: RoutedLinear,
    down: Tensor,
    up: Tensor,
    magnitude: Tensor | None,
    options: AdapterOptions,
) -> Tensor | None:
    if magnitude is None:
        return None
    weight = dense_weight(layer.base_layer).to(down.dtype) + options.scale * (up @ down)
    factor: Tensor = magnitude.to(down) / weight.norm(dim=1)
    return factor
