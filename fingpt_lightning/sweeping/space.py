"""The parameters of a sweep and their possible values, as in W&B's file format."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from optuna.trial import Trial

from fingpt_lightning.terminal.messages import nearest

Point: TypeAlias = dict[str, Any]
"""A value for each parameter, by its name with dots."""

_Storable: TypeAlias = bool | int | float | str | None

SUPPORTED = (
    "constant", "categorical", "int_uniform", "uniform", "q_uniform", "log_uniform_values",
)  # fmt: skip
_KEYS_OF_KIND = {
    "constant": ("value",),
    "categorical": ("values",),
    "int_uniform": ("min", "max"),
    "uniform": ("min", "max"),
    "q_uniform": ("min", "max", "q"),
    "log_uniform_values": ("min", "max"),
}
_LEAF_KEYS = ("value", "values", "min", "max", "q", "distribution")
MAX_TRIALS = 100_000
"""Largest number of trials of a grid."""
_DECIMALS = 12
"""Digits to which a multiple of a step is rounded: 3 x 0.1 is 0.3."""


@dataclass(frozen=True)
class Choices:
    """One of some values, of any kind that JSON has.

    Attributes:
        values: Possible values, at least one, all different.
    """

    values: tuple[Any, ...]

    @property
    def is_constant(self) -> bool:
        """Whether there is nothing to choose."""
        return len(self.values) == 1

    def samples(self) -> list[Any]:
        """What is checked before a sweep starts: every value."""
        return list(self.values)

    @property
    def length(self) -> int:
        """Number of values."""
        return len(self.values)

    def grid(self) -> list[Any]:
        """Every value."""
        return list(self.values)

    def suggest(self, trial: Trial, name: str) -> Any:
        """A value that Optuna chooses."""
        return self.restored(trial.suggest_categorical(name, self._stored_values()))

    def stored(self, value: Any) -> _Storable:
        """What Optuna's storage holds for a value: itself, or its JSON where it cannot."""
        indices = [i for i, own in enumerate(self.values) if _is_same(own, value)]
        return self._stored_values()[indices[0]]

    def restored(self, stored: _Storable) -> Any:
        """The value that this stored value represents."""
        return self.values[self._stored_values().index(stored)]

    def _stored_values(self) -> list[_Storable]:
        found: list[_Storable] = []
        for value in self.values:
            plain = isinstance(value, bool | int | float | str | None)
            # 1 and 1.0 are equal to Optuna, but a rank of 1 is not a share of 1.0.
            found.append(value if plain and value not in found else json.dumps(value))
        return found

    def __str__(self) -> str:
        return ", ".join(shown(value) for value in self.values)


@dataclass(frozen=True)
class Range:
    """A number between two others.

    Attributes:
        low: Smallest number.
        high: Largest number.
        step: Distance of the numbers, from ``low`` on; None for all numbers.
        is_int: Whether they are integers.
        is_log: Whether their logarithms are spread evenly.
    """

    low: int | float
    high: int | float
    step: int | float | None = None
    is_int: bool = False
    is_log: bool = False

    is_constant = False

    def samples(self) -> list[int | float]:
        """What is checked before a sweep starts: both ends and the middle."""
        if self.step is not None:
            # Not of the list of all: it may not fit into memory.
            last = self._num_steps()
            found = [self._step(index) for index in (0, (last + 1) // 2, last)]
        elif self.is_log:
            found = [self.low, math.sqrt(self.low * self.high), self.high]
        else:
            found = [self.low, (self.low + self.high) / 2, self.high]
        return list(dict.fromkeys(found))

    @property
    def length(self) -> int | None:
        """Number of numbers; None where there are infinitely many."""
        return None if self.step is None else self._num_steps() + 1

    def grid(self) -> list[int | float] | None:
        """Every number, or None where there are infinitely many."""
        if self.step is None:
            return None
        return [self._step(index) for index in range(self._num_steps() + 1)]

    def suggest(self, trial: Trial, name: str) -> int | float:
        """A number that Optuna chooses."""
        if self.is_int:
            assert self.step is not None
            return trial.suggest_int(name, int(self.low), int(self.high), step=int(self.step))
        return self.restored(
            trial.suggest_float(name, self.low, self.high, step=self.step, log=self.is_log)
        )

    def restored(self, stored: int | float) -> int | float:
        """The number that this stored value represents."""
        return stored if self.step is None or self.is_int else round(stored, _DECIMALS)

    def stored(self, value: int | float) -> int | float:
        """What Optuna's storage holds for a number."""
        return value

    def __str__(self) -> str:
        kind = "log " if self.is_log else "whole, " if self.is_int else ""
        step = "" if self.step is None or self.step == 1 else f" in steps of {self.step:g}"
        return f"{kind}{self.low:g} to {self.high:g}{step}"

    def _num_steps(self) -> int:
        assert self.step is not None
        return round((self.high - self.low) / self.step)

    def _step(self, index: int) -> int | float:
        assert self.step is not None
        found = round(self.low + index * self.step, _DECIMALS)
        return int(found) if self.is_int else found


Distribution: TypeAlias = Choices | Range


def read_parameters(content: Any, prefix: str = "") -> dict[str, Distribution]:
    """The leaves of ``parameters`` of a sweep file, by name with dots, in the file's order.

    Args:
        content: Mapping; one with ``parameters`` in place of a distribution is read recursively.
        prefix: Name of the level above, with its dot.

    Raises:
        ValueError: A parameter is not valid; the message names it.
    """
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{prefix}parameters is empty")
    found: dict[str, Distribution] = {}
    for key, leaf in content.items():
        name = f"{prefix}{key}"
        if not isinstance(leaf, Mapping):
            raise ValueError(f"parameter {name}: {leaf!r} has neither value nor values nor min")
        if "parameters" in leaf:
            if beside := [key for key in leaf if key != "parameters"]:
                raise ValueError(f"parameter {name}: {beside[0]} beside parameters has no effect")
            found |= read_parameters(leaf["parameters"], f"{name}.")
        else:
            found[name] = _read_leaf(name, leaf)
    return found


def grid_points(parameters: Mapping[str, Distribution]) -> list[Point]:
    """Every trial of a grid; the last parameter changes first.

    Raises:
        ValueError: A parameter has infinitely many values, or there are more than `MAX_TRIALS`
            points.
    """
    num_trials = 1
    for name, distribution in parameters.items():
        length = distribution.length
        if length is None:
            raise ValueError(
                f"parameter {name}: a grid needs value, values or steps, not {distribution}"
            )
        num_trials *= length
    if num_trials > MAX_TRIALS:
        raise ValueError(
            f"a grid of {num_trials:,} trials is beyond {MAX_TRIALS:,}; method random draws some"
        )
    axes = [distribution.grid() or [] for distribution in parameters.values()]
    return [dict(zip(parameters, values, strict=True)) for values in itertools.product(*axes)]


def sample_points(parameters: Mapping[str, Distribution]) -> list[Point]:
    """Points that show each value, and both ends and the middle of each range, once or more.

    All parameters are in the middle but one at a time.
    """
    samples = {name: distribution.samples() for name, distribution in parameters.items()}
    middle = {name: values[len(values) // 2] for name, values in samples.items()}
    points = [middle]
    for name, values in samples.items():
        points += [middle | {name: value} for value in values if value is not middle[name]]
    return points


def nested(point: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A point as the mapping of mappings that a config is.

    Args:
        point: Values by name with dots.
        names: Names to include.

    >>> nested({"model.init_args.rank": 4, "seed": 1}, ["model.init_args.rank", "seed"])
    {'model': {'init_args': {'rank': 4}}, 'seed': 1}
    """
    found: dict[str, Any] = {}
    for name in names:
        *above, last = name.split(".")
        inner = found
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = point[name]
    return found


def shown(value: Any) -> str:
    """A value as it is written in the sweep file."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """The last part of each name, with as many parts before it as distinguish them.

    >>> short_names(["model.init_args.rank", "data.seed", "model.seed"])
    {'model.init_args.rank': 'rank', 'data.seed': 'data.seed', 'model.seed': 'model.seed'}
    """
    found = {}
    for name in names:
        parts = name.split(".")
        ends = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        found[name] = next(
            end
            for end in ends
            if end == name or sum(f".{other}".endswith(f".{end}") for other in names) == 1
        )
    return found


def _read_leaf(name: str, leaf: Mapping[str, Any]) -> Distribution:
    kind = leaf.get("distribution", _implied(leaf))
    if kind not in (*SUPPORTED, None):
        raise ValueError(
            f"parameter {name}: distribution {kind!r} is none of"
            f" {', '.join(SUPPORTED)}{nearest(str(kind), SUPPORTED)}"
        )
    if "probabilities" in leaf:
        raise ValueError(f"parameter {name}: categorical with probabilities is not supported")
    if unknown := [key for key in leaf if key not in _LEAF_KEYS]:
        raise ValueError(
            f"parameter {name} has no setting {unknown[0]!r}{nearest(str(unknown[0]), _LEAF_KEYS)}"
        )
    if kind is None:
        raise ValueError(f"parameter {name} has neither value nor values nor min and max")
    known = _KEYS_OF_KIND[kind]
    if beside := [key for key in leaf if key not in (*known, "distribution")]:
        instead = "; did you mean distribution: q_uniform?" if beside[0] == "q" else ""
        raise ValueError(
            f"parameter {name}: {kind} takes {' and '.join(known)}, not {beside[0]}{instead}"
        )
    if kind == "constant":
        return Choices((_given(name, leaf, "value"),))
    if kind == "categorical":
        return _choices(name, _given(name, leaf, "values"))
    return _range(name, kind, leaf)


def _implied(leaf: Mapping[str, Any]) -> str | None:
    """The distribution that W&B takes where none is named."""
    if "value" in leaf:
        return "constant"
    if "values" in leaf:
        return "categorical"
    ends = [leaf.get("min"), leaf.get("max")]
    if None in ends:
        return None
    return "int_uniform" if all(isinstance(end, int) for end in ends) else "uniform"


def _given(name: str, leaf: Mapping[str, Any], key: str) -> Any:
    if key not in leaf:
        raise ValueError(f"parameter {name} has no {key}")
    return leaf[key]


def _choices(name: str, values: Any) -> Choices:
    if not isinstance(values, list) or not values:
        raise ValueError(f"parameter {name}: values is empty")
    for index, value in enumerate(values):
        if any(_is_same(value, other) for other in values[:index]):
            raise ValueError(f"parameter {name}: values has {shown(value)} twice")
    return Choices(tuple(values))


def _range(name: str, kind: str, leaf: Mapping[str, Any]) -> Range:
    low, high = _given(name, leaf, "min"), _given(name, leaf, "max")
    step = leaf.get("q", 1)
    for key, number in (("min", low), ("max", high), ("q", step)):
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(
                f"parameter {name}: {key} {number!r} is not a number; write it as 0.001"
            )
    if not low < high:
        raise ValueError(f"parameter {name}: min {low:g} is not below max {high:g}")
    if kind == "int_uniform":
        if not (isinstance(low, int) and isinstance(high, int)):
            raise ValueError(f"parameter {name}: min {low} and max {high} must be whole numbers")
        return Range(low, high, 1, is_int=True)
    if kind == "q_uniform":
        return _stepped(name, low, high, step)
    if kind == "log_uniform_values":
        if low <= 0:
            raise ValueError(f"parameter {name}: min {low:g} of log_uniform_values is not above 0")
        return Range(float(low), float(high), is_log=True)
    return Range(float(low), float(high))


def _stepped(name: str, low: int | float, high: int | float, step: int | float) -> Range:
    if step <= 0:
        raise ValueError(f"parameter {name}: q {step:g} is not above 0")
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if first > last:
        raise ValueError(f"parameter {name}: no multiple of q {step:g} in [{low:g}, {high:g}]")
    ends = (round(first * step, _DECIMALS), round(last * step, _DECIMALS))
    return Range(*ends, step, is_int=isinstance(step, int))


def _is_same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)
