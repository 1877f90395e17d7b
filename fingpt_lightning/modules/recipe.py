"""The settings for training low-rank layers, and which of them fit each other."""

from collections.abc import Mapping
from typing import Any

from fingpt_lightning.low_rank import Initialization
from fingpt_lightning.low_rank.linear import FACTOR_ACTIVATIONS
from fingpt_lightning.modules.ranges import check_above_0, check_from_0
from fingpt_lightning.terminal.messages import nearest

PLAIN: Mapping[str, Any] = {
    "initialization": "svd", "factor_activation": "none", "factor_expansion": 0.0,
    "self_guided": 0.0, "factor_decay": "factors", "optimizer": "adamw",
}  # fmt: skip
"""The settings of low-rank layers that are trained as dense layers would be."""
FACTOR_DECAYS = ("factors", "product")
OPTIMIZERS = ("adamw", "adamw_8bit", "spectron")


def check_recipe(
    initialization: str,
    factor_activation: str,
    factor_expansion: float,
    self_guided: float,
    factor_decay: str,
    optimizer: str,
    spectron_learning_rate: float,
    spectron_dense: bool = False,
    quantization_aware: str | None = None,
) -> None:
    """Raises unless the settings of a `LowRankPretraining` fit each other.

    Raises:
        ValueError: One is unknown or out of range, or two exclude each other.
    """
    for name, value, known in (
        ("initialization", initialization, tuple(Initialization)),
        ("factor_activation", factor_activation, FACTOR_ACTIVATIONS),
        ("factor_decay", factor_decay, FACTOR_DECAYS),
        ("optimizer", optimizer, OPTIMIZERS),
    ):
        if value not in known:
            hint = nearest(value, known)
            raise ValueError(f"{name} {value!r} is none of {', '.join(known)}{hint}")
    check_above_0(spectron_learning_rate=spectron_learning_rate)
    if spectron_dense and optimizer != "spectron":
        raise ValueError(f"spectron_dense has no effect with optimizer {optimizer}: set spectron")
    check_from_0(factor_expansion=factor_expansion)
    if factor_expansion and factor_activation != "none":
        raise ValueError(
            f"factor_expansion {factor_expansion} cannot be folded behind factor_activation"
            f" {factor_activation}: set one of them"
        )
    if factor_expansion and factor_decay == "product":
        raise ValueError(
            f"factor_decay product decays up down, which factor_expansion {factor_expansion} makes"
            " a part of the weight: set one of them"
        )
    if quantization_aware is not None:
        if factor_expansion:
            raise ValueError(
                f"quantization_aware {quantization_aware} rounds up as it is stored, of which"
                f" factor_expansion {factor_expansion} is a part by then: set one of them"
            )
        if factor_activation != "none":
            raise ValueError(
                f"quantization_aware {quantization_aware} is for an export that factor_activation"
                f" {factor_activation} does not have: set one of them"
            )
    if not 0 <= self_guided <= 1:
        raise ValueError(f"self_guided {self_guided} is outside [0, 1]")
    if self_guided and factor_activation != "none":
        raise ValueError(
            f"self_guided {self_guided} sets a dense weight beside each low-rank layer, and none"
            f" does what one with factor_activation {factor_activation} does: set one of them"
        )


def low_rank_changes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ``settings`` that differ from `PLAIN` and have no effect without low-rank layers."""
    found = {
        key: settings[key]
        for key, plain in PLAIN.items()
        if settings[key] not in (plain, "adamw_8bit")
    }
    if settings["spectron_dense"]:
        found.pop("optimizer", None)
    return found
