import math

import pytest

from fingpt_lightning.cli.early_options import read_table
from fingpt_lightning.cli.errors import ConfigError
from fingpt_lightning.cli.trainer_numbers import check_trainer_numbers


@pytest.mark.parametrize(
    ("key", "taken", "refused"),
    [
        ("trainer.max_steps", (-1, 0, 7), {-2: "trainer.max_steps -2 is below -1"}),
        ("trainer.devices", (-1, 1, 8), {0: "0 is below 1; -1 takes all", -2: "-2 is below 1"}),
        ("trainer.num_nodes", (1,), {0: "trainer.num_nodes 0 is below 1"}),
        ("trainer.accumulate_grad_batches", (1, 4), {0: "0 is below 1", -2: "-2 is below 1"}),
        ("trainer.check_val_every_n_epoch", (1,), {0: "0 is below 1"}),
        (
            "trainer.gradient_clip_val",
            (0, 0.5, math.inf),
            {-1.0: "-1.0 is below 0", math.nan: "nan is not a number"},
        ),
        (
            "trainer.limit_val_batches",
            (0, 3, 0.0, 0.5, 1.0, 2.0),
            {
                -1: "-1 is below 0",
                1.5: "1.5 is outside [0, 1] (a share of the batches)",
                math.inf: "inf is outside [0, 1]",
            },
        ),
        (
            "trainer.val_check_interval",
            (1, 50, 0.5, 1.0),
            {0: "0 is below 1", -0.1: "-0.1 is outside (0, 1]", 1.5: "1.5 is outside (0, 1]"},
        ),
        ("seed_everything", (0, 2**32 - 1, True), {-1: "outside [0, 2**32)", 2**32: "outside"}),
        ("last_checkpoint.every_n_train_steps", (1,), {0: "0 is below 1"}),
    ],
)
def test_numbers_out_of_range_are_named(
    key: str, taken: tuple[float, ...], refused: dict[float, str]
) -> None:
    for value in (*taken, None, "auto", False):
        check_trainer_numbers({key: value})
    for value, message in refused.items():
        with pytest.raises(ConfigError) as error:
            check_trainer_numbers({key: value})
        assert message in str(error.value)
        assert str(error.value).startswith(f"{key} ")


def test_a_number_of_another_group_is_left_alone() -> None:
    check_trainer_numbers({"max_steps": -9, "model.max_steps": -9, "trainer.logger.max_steps": -9})


def test_every_number_of_the_table_has_a_range() -> None:
    table = read_table()
    assert table is not None
    numbers = [key for key, option in table.options.items() if {"int", "float"} & set(option.kinds)]
    assert len(numbers) > 15
    for key in numbers:
        with pytest.raises(ConfigError):
            check_trainer_numbers({key: -5})
