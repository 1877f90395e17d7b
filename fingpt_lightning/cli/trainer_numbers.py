"""The ranges of a run's numbers that belong to no class of ours, or to one that is made late.

Lightning takes some whatever they are: `accumulate_grad_batches: 0` ends the run in a division,
`gradient_clip_val: -1` clips nothing. Others it refuses when the Trainer is made.
"""

import math
from collections.abc import Mapping
from typing import Any

from fingpt_lightning.cli.errors import ConfigError

_LEAST: Mapping[str, int] = {
    "num_nodes": 1, "fast_dev_run": 0, "max_epochs": -1, "min_epochs": 0, "max_steps": -1,
    "min_steps": 0, "check_val_every_n_epoch": 1, "num_sanity_val_steps": -1,
    "log_every_n_steps": 0, "accumulate_grad_batches": 1, "gradient_clip_val": 0,
    "reload_dataloaders_every_n_epochs": 0, "limit_train_batches": 0, "limit_val_batches": 0,
    "limit_test_batches": 0, "limit_predict_batches": 0, "overfit_batches": 0,
    "val_check_interval": 1,
}  # fmt: skip
"""The smallest number of each setting of the Trainer."""
_SHARES = (
    "limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches",
    "overfit_batches", "val_check_interval",
)  # fmt: skip
"""Those of which a float is a share of the batches; a whole one above 1 is their number."""

_VALIDATED = ("check_val_every_n_epoch", "val_check_interval")


def check_trainer_numbers(values: Mapping[str, Any]) -> None:
    """Refuses numbers that a run cannot do with, or would do something else with.

    Args:
        values: Settings by dotted key; of those that are not numbers nothing is checked.

    Raises:
        ConfigError: A number is out of its range.
    """
    # What is left out here may stand in a block that is not read yet.
    every_n_epoch, interval = (values.get(f"trainer.{key}", 1) for key in _VALIDATED)
    interval = 1.0 if interval is None else interval  # as Lightning takes it
    if every_n_epoch is None and isinstance(interval, float) and interval <= 1:
        raise ConfigError(
            f"trainer.val_check_interval {interval} is a share of an epoch, and"
            " trainer.check_val_every_n_epoch null counts batches over all epochs: give a whole"
            " number of batches, or check_val_every_n_epoch 1"
        )
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        group, _, name = key.rpartition(".")
        if key == "seed_everything" and not 0 <= value < 2**32:
            raise ConfigError(f"{key} {value} is outside [0, 2**32)")
        if key == "trainer.devices" and value < 1 and value != -1:
            raise ConfigError(f"{key} {value} is below 1; -1 takes all devices")
        if key == "last_checkpoint.every_n_train_steps" and value < 1:
            raise ConfigError(f"{key} {value} is below 1")
        if group == "trainer" and name in _LEAST:
            _check(key, value, _LEAST[name], name in _SHARES)


def _check(key: str, value: int | float, least: int, may_be_share: bool) -> None:
    if math.isnan(value):
        raise ConfigError(f"{key} {value} is not a number")
    if may_be_share and isinstance(value, float):
        above = value > 0 if least else value >= 0
        if not (above and value <= 1) and not (value > 1 and value.is_integer()):
            bracket = "(" if least else "["
            raise ConfigError(f"{key} {value} is outside {bracket}0, 1] (a share of the batches)")
    elif value < least:
        raise ConfigError(f"{key} {value} is below {least}")
