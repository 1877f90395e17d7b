"""The settings for training low-rank layers, which of them fit each other, and named recipes."""

from collections.abc import Mapping
from typing import Any

from fingpt_lightning.low_rank import Initialization
from fingpt_lightning.low_rank.linear import FACTOR_ACTIVATIONS
from fingpt_lightning.modules.ranges import (
    check_above_0,
    check_below_1,
    check_from_0,
    check_from_1_or_share,
)
from fingpt_lightning.terminal.messages import check_choice, nearest

PLAIN: Mapping[str, Any] = {
    "initialization": "svd", "factor_activation": "none", "factor_expansion": 0.0,
    "self_guided": 0.0, "factor_decay": "factors", "optimizer": "adamw",
    "embedding_optimizer": "adamw", "spectron_adjust_lr": "none",
}  # fmt: skip
"""The settings of low-rank layers that are trained as dense layers would be."""
FACTOR_DECAYS = ("factors", "product")
SCHEDULES = ("cosine", "linear", "wsd")
EMBEDDING_OPTIMIZERS = ("adamw", "same", "mixed")
LR_ADJUSTMENTS = ("none", "original")
FACTOR_OPTIMIZERS = ("spectron", "lora_muon")
"""Optimizers with a rule of their own for factors, each with settings that begin with its name."""
OPTIMIZERS = ("adamw", "adamw_8bit", *FACTOR_OPTIMIZERS)
RECIPES = ("narrow",)
DEFAULTS: Mapping[str, Any] = {
    "embedding_rank": None, "head_map": "shared", "learning_rate": 0.0006, "optimizer": "adamw",
    "embedding_optimizer": "adamw", "embedding_learning_rate": None,
    "spectron_learning_rate": 0.07, "spectron_dense": False,
}  # fmt: skip
"""The settings whose null a recipe decides, and what it stands for without one."""
_NARROW_EMBEDDING_RANK = 0.875
_NARROW_TRAINING: Mapping[str, Any] = {
    "optimizer": "spectron", "spectron_dense": True, "spectron_learning_rate": 0.025,
    "embedding_optimizer": "mixed", "embedding_learning_rate": 0.064, "learning_rate": 0.008,
}  # fmt: skip


def with_recipe(
    recipe: str | None, settings: Mapping[str, Any], *, head_is_tied: bool
) -> dict[str, Any]:
    """The settings of `DEFAULTS` with a value in the place of each null that is decided.

    What is given stays. ``narrow`` is the best of docs/benchmarks/same_size_quality.json; its rates
    are those of its optimizer, and go with no other.

    Args:
        recipe: One of `RECIPES`; None takes `DEFAULTS`.
        settings: Values of the keys of `DEFAULTS`; None where a value is not given.
        head_is_tied: Whether the head of the dense network shares the embedding's table.
    """
    decided: dict[str, Any] = {}
    if recipe == "narrow":
        decided["embedding_rank"] = _NARROW_EMBEDDING_RANK
        if head_is_tied:  # else it has factors of its own
            decided["head_map"] = "own"
        if settings["optimizer"] in (None, _NARROW_TRAINING["optimizer"]):
            decided |= _NARROW_TRAINING
    given = {key: value for key, value in settings.items() if value is not None}
    return {**DEFAULTS, **decided, **given}


def check_recipe_name(
    recipe: str | None, compression: float | None, rank_overrides: object
) -> None:
    """Raises unless a named recipe has what it needs, and nothing that contradicts it.

    Raises:
        ValueError: It is unknown, has no compression to reach, or does not have the layers that
            ``rank_overrides`` names.
    """
    if recipe is None:
        return
    check_choice("recipe", recipe, RECIPES)
    if compression is None:
        raise ValueError(
            f"recipe {recipe} chooses the width by a total compression: set compression, such as"
            " 2.64"
        )
    if rank_overrides:
        raise ValueError(
            f"rank_overrides {rank_overrides}: recipe {recipe} keeps the blocks dense; leave"
            " rank_overrides at null"
        )


def check_recipe(settings: Mapping[str, Any]) -> None:
    """Raises unless the settings of a `LowRankPretraining` fit each other.

    Args:
        settings: Values of the keys of `PLAIN`, of ``quantization_aware``, ``weight_decay`` and
            ``embedding_learning_rate``, and of what belongs to each of `FACTOR_OPTIMIZERS`.

    Raises:
        ValueError: One is unknown or out of range, or two exclude each other.
    """
    _check_words(settings)
    _check_factor_optimizer(settings)
    _check_expansion(settings)
    _check_activation(settings)
    self_guided = settings["self_guided"]
    if not 0 <= self_guided <= 1:
        raise ValueError(f"self_guided {self_guided} is outside [0, 1]")


def _check_words(settings: Mapping[str, Any]) -> None:
    for name, known in (
        ("initialization", tuple(Initialization)),
        ("factor_activation", FACTOR_ACTIVATIONS),
        ("factor_decay", FACTOR_DECAYS),
        ("optimizer", OPTIMIZERS),
        ("embedding_optimizer", EMBEDDING_OPTIMIZERS),
        ("spectron_adjust_lr", LR_ADJUSTMENTS),
    ):
        if (value := settings[name]) not in known:
            hint = nearest(value, known)
            raise ValueError(f"{name} {value!r} is none of {', '.join(known)}{hint}")


def _check_factor_optimizer(settings: Mapping[str, Any]) -> None:
    optimizer = settings["optimizer"]
    for name in FACTOR_OPTIMIZERS:
        rate, momentum, dense = (f"{name}_{key}" for key in ("learning_rate", "momentum", "dense"))
        check_above_0(**{rate: settings[rate]})
        check_below_1(**{momentum: settings[momentum]})
        if settings[dense] and optimizer != name:
            raise ValueError(f"{dense} has no effect with optimizer {optimizer}: set {name}")
    adjustment = settings["spectron_adjust_lr"]
    if adjustment != "none" and optimizer != "spectron":
        raise ValueError(
            f"spectron_adjust_lr {adjustment} has no effect with optimizer {optimizer}: set"
            " spectron"
        )
    of_embedding = settings["embedding_optimizer"]
    if of_embedding != "adamw" and optimizer not in FACTOR_OPTIMIZERS:
        raise ValueError(
            f"embedding_optimizer {of_embedding} has no effect with optimizer {optimizer}: set"
            f" {' or '.join(FACTOR_OPTIMIZERS)}"
        )
    if settings["embedding_learning_rate"] is not None:
        check_above_0(embedding_learning_rate=settings["embedding_learning_rate"])
    if optimizer != "lora_muon":
        return
    rate, decay = settings["lora_muon_learning_rate"], settings["weight_decay"]
    if rate * decay >= 1:
        raise ValueError(
            f"lora_muon_learning_rate {rate} times weight_decay {decay} is not below 1: lower one"
        )
    if settings["factor_activation"] != "none":
        raise ValueError(
            "optimizer lora_muon bounds the step of up down, which with factor_activation"
            f" {settings['factor_activation']} is not the weight: set spectron or adamw"
        )


def _check_expansion(settings: Mapping[str, Any]) -> None:
    factor_expansion = settings["factor_expansion"]
    check_from_0(factor_expansion=factor_expansion)
    if not factor_expansion:
        return
    if settings["factor_activation"] != "none":
        raise ValueError(
            f"factor_expansion {factor_expansion} cannot be folded behind factor_activation"
            f" {settings['factor_activation']}: set one of them"
        )
    if settings["factor_decay"] == "product":
        raise ValueError(
            f"factor_decay product decays up down, which factor_expansion {factor_expansion} makes"
            " a part of the weight: set one of them"
        )
    if settings["quantization_aware"] is not None:
        raise ValueError(
            f"quantization_aware {settings['quantization_aware']} rounds up as it is stored, of"
            f" which factor_expansion {factor_expansion} is a part by then: set one of them"
        )


def _check_activation(settings: Mapping[str, Any]) -> None:
    activation = settings["factor_activation"]
    if activation == "none":
        return
    if settings["quantization_aware"] is not None:
        raise ValueError(
            f"quantization_aware {settings['quantization_aware']} is for an export that"
            f" factor_activation {activation} does not have: set one of them"
        )
    if settings["self_guided"]:
        raise ValueError(
            f"self_guided {settings['self_guided']} sets a dense weight beside each low-rank"
            f" layer, and none does what one with factor_activation {activation} does: set one of"
            " them"
        )


def check_schedule(schedule: str, warmup: int | float, cooldown: int | float | None) -> None:
    """Raises unless the settings of a learning-rate schedule fit each other.

    Raises:
        ValueError: The schedule is unknown, or the cooldown is out of range or has no effect.
    """
    if schedule not in SCHEDULES:
        hint = nearest(schedule, SCHEDULES)
        raise ValueError(f"schedule {schedule!r} is none of {', '.join(SCHEDULES)}{hint}")
    if cooldown is None:
        return
    check_from_1_or_share("the steps", cooldown=cooldown)
    if schedule != "wsd":
        raise ValueError(f"cooldown {cooldown} has no effect with schedule {schedule}: set wsd")
    if isinstance(cooldown, float) and isinstance(warmup, float) and warmup + cooldown > 1:
        raise ValueError(f"warmup {warmup} and cooldown {cooldown} are more than the whole run")


def moves_dense_alike(settings: Mapping[str, Any]) -> bool:
    """Whether the optimizer of factors moves the dense matrices of the blocks, too."""
    return bool(settings.get(f"{settings['optimizer']}_dense", False))


def low_rank_changes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ``settings`` that differ from `PLAIN` and have no effect on a dense network."""
    found = {
        key: settings[key]
        for key, plain in PLAIN.items()
        if settings[key] not in (plain, "adamw_8bit")
    }
    if moves_dense_alike(settings):
        found.pop("optimizer", None)
    return found
