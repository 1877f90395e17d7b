"""What a W&B server does with a sweep file: its parameters become a list of trials."""

import itertools
import math
import random
from typing import Any, TypeAlias

Json: TypeAlias = dict[str, Any]
_Trial: TypeAlias = dict[tuple[str, ...], Any]

_SEED = 0
_UNCAPPED_TRIALS = 3


def plan_trials(config: Json) -> list[Json]:
    """Lays out every trial of a sweep, nested as its parameters are.

    ``grid`` is the product of all values. Every other method draws ``run_cap`` (or 3) trials at
    random from a fixed seed: it stands for ``random`` and ``bayes`` alike.

    Args:
        config: Content of a sweep file.

    Raises:
        ValueError: A grid parameter has neither ``value`` nor ``values``.
    """
    parameters = config.get("parameters", {})
    leaves = _flatten(parameters)
    run_cap = config.get("run_cap")
    if config.get("method") == "grid":
        flat_trials = _grid(leaves)[:run_cap]
    else:
        generator = random.Random(_SEED)
        flat_trials = [
            {name: _draw(leaf, generator) for name, leaf in leaves.items()}
            for _ in range(run_cap or _UNCAPPED_TRIALS)
        ]
    return [_nest(trial, parameters) for trial in flat_trials]


def _flatten(parameters: Json, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Json]:
    leaves: dict[tuple[str, ...], Json] = {}
    for name, parameter in parameters.items():
        if "parameters" in parameter:
            leaves |= _flatten(parameter["parameters"], (*prefix, name))
        else:
            leaves[*prefix, name] = parameter
    return leaves


def _nest(trial: _Trial, parameters: Json, prefix: tuple[str, ...] = ()) -> Json:
    return {
        name: _nest(trial, parameter["parameters"], (*prefix, name))
        if "parameters" in parameter
        else trial[*prefix, name]
        for name, parameter in parameters.items()
    }


def _choices(leaf: Json) -> list[Any] | None:
    if "values" in leaf:
        return list(leaf["values"])
    return [leaf["value"]] if "value" in leaf else None


def _grid(leaves: dict[tuple[str, ...], Json]) -> list[_Trial]:
    axes: list[list[Any]] = []
    for name, leaf in leaves.items():
        choices = _choices(leaf)
        if choices is None:
            raise ValueError(f"grid sweep: {'.'.join(name)} has neither value nor values")
        axes.append(choices)
    return [dict(zip(leaves, point, strict=True)) for point in itertools.product(*axes)]


def _draw(leaf: Json, generator: random.Random) -> Any:
    choices = _choices(leaf)
    if choices is not None:
        return generator.choice(choices)
    low, high = leaf["min"], leaf["max"]
    if leaf.get("distribution") == "log_uniform_values":
        return math.exp(generator.uniform(math.log(low), math.log(high)))
    if isinstance(low, int) and isinstance(high, int):
        return generator.randint(low, high)
    return generator.uniform(low, high)
