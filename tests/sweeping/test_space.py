import itertools
import math
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fingpt_lightning.sweeping.space import (
    Choices,
    Range,
    grid_points,
    nested,
    read_parameters,
    sample_points,
    short_names,
)


def _one(leaf: Any) -> Choices | Range:
    (found,) = read_parameters({"p": leaf}).values()
    return found


@pytest.mark.parametrize(
    ("leaf", "samples"),
    [
        ({"value": None}, [None]),
        ({"values": [4, None, [1, 2]]}, [4, None, [1, 2]]),
        ({"min": 1, "max": 4}, [1, 3, 4]),
        ({"min": 1, "max": 2.0}, [1, 1.5, 2]),
        ({"distribution": "uniform", "min": 0, "max": 1}, [0, 0.5, 1]),
        ({"distribution": "int_uniform", "min": 0, "max": 1}, [0, 1]),
        ({"distribution": "log_uniform_values", "min": 0.01, "max": 1}, [0.01, 0.1, 1]),
        ({"distribution": "q_uniform", "min": 0.05, "max": 0.5, "q": 0.1}, [0.1, 0.3, 0.5]),
        ({"distribution": "q_uniform", "min": 7, "max": 34, "q": 8}, [8, 24, 32]),
        # A list of all would not fit into memory.
        ({"min": 0, "max": 10**15}, [0, 5 * 10**14, 10**15]),
    ],
)
def test_a_range_is_checked_at_both_ends_and_in_the_middle(leaf: Any, samples: list[Any]) -> None:
    found = _one(leaf).samples()
    for value, expected in zip(found, samples, strict=True):
        assert value == (pytest.approx(expected) if isinstance(expected, float) else expected)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (3, "parameter p: 3 has neither value"),
        ({}, "parameter p has neither value nor values nor min and max"),
        ({"values": []}, "parameter p: values is empty"),
        ({"values": [1, 1]}, "parameter p: values has 1 twice"),
        ({"vales": [1]}, "parameter p has no setting 'vales'; did you mean values?"),
        ({"min": 3, "max": 1}, "min 3 is not below max 1"),
        ({"min": "1e-3", "max": 1}, "min '1e-3' is not a number; write it as 0.001"),
        ({"distribution": "normal", "mu": 0}, "distribution 'normal' is none of constant"),
        ({"distribution": "log_uniform_value", "min": 1}, "did you mean log_uniform_values?"),
        ({"distribution": "q_uniform", "min": 1, "max": 2, "q": 0}, "q 0 is not above 0"),
        ({"distribution": "q_uniform", "min": 1, "max": 2, "q": 9}, "no multiple of q 9"),
        ({"distribution": "log_uniform_values", "min": 0, "max": 2}, "min 0 of log_uniform"),
        ({"distribution": "int_uniform", "min": 0.5, "max": 2}, "must be whole numbers"),
        ({"distribution": "categorical"}, "parameter p has no values"),
        ({"values": [1, 2], "probabilities": [0.1, 0.9]}, "probabilities is not supported"),
        (
            {"distribution": "uniform", "min": 0.0, "max": 0.4, "q": 0.1},
            "parameter p: uniform takes min and max, not q; did you mean distribution: q_uniform?",
        ),
        ({"min": 1, "max": 4, "q": 2}, "int_uniform takes min and max, not q; did you mean"),
        ({"value": 1, "values": [2]}, "parameter p: constant takes value, not values"),
        ({"values": [1], "max": 2}, "parameter p: categorical takes values, not max"),
        (
            {"parameters": {"a": {"value": 1}}, "values": [1]},
            "parameter p: values beside parameters has no effect",
        ),
    ],
)
def test_a_wrong_parameter_is_named(leaf: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        read_parameters({"p": leaf})


def test_no_parameter_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"model\.parameters is empty"):
        read_parameters({"model": {"parameters": {}}})


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_grid_is_every_point_once_the_last_parameter_first(sizes: list[int]) -> None:
    content = {f"p{axis}": {"values": list(range(size))} for axis, size in enumerate(sizes)}
    points = grid_points(read_parameters(content))
    assert [tuple(point.values()) for point in points] == list(
        itertools.product(*(range(size) for size in sizes))
    )
    assert all(list(point) == list(content) for point in points)


def test_a_grid_has_the_steps_of_a_range_but_no_continuum() -> None:
    parameters = read_parameters(
        {
            "a": {"min": 1, "max": 3},
            "b": {"distribution": "q_uniform", "min": 0, "max": 0.3, "q": 0.1},
        }
    )
    points = grid_points(parameters)
    assert [point["b"] for point in points[:4]] == [0, 0.1, 0.2, 0.3]
    assert len(points) == 12
    with pytest.raises(ValueError, match="parameter c: a grid needs value, values or steps"):
        grid_points(read_parameters({"c": {"min": 0.5, "max": 1.0}}))


def test_a_grid_without_end_is_refused_before_it_is_made() -> None:
    content = {"a": {"min": 0, "max": 10**9}, "b": {"values": [1, 2]}}
    with pytest.raises(ValueError, match="a grid of 2,000,000,002 trials is beyond 100,000"):
        grid_points(read_parameters(content))


@given(low=st.integers(-5, 5), span=st.integers(1, 9), size=st.integers(1, 5))
def test_samples_show_every_value_and_both_ends(low: int, span: int, size: int) -> None:
    values = [f"v{index}" for index in range(size)]
    content = {"a": {"min": low, "max": low + span}, "b": {"values": values}, "c": {"value": 1}}
    points = sample_points(read_parameters(content))
    assert {point["b"] for point in points} == set(values)
    assert {low, low + span} <= {point["a"] for point in points}
    assert len(points) <= 1 + 2 + size


@pytest.mark.parametrize(
    ("leaf", "is_right"),
    [
        ({"min": 2, "max": 9}, lambda x: isinstance(x, int) and 2 <= x <= 9),
        ({"min": 0.5, "max": 2.5}, lambda x: 0.5 <= x <= 2.5),
        (
            {"distribution": "log_uniform_values", "min": 1e-4, "max": 0.1},
            lambda x: 1e-4 <= x <= 0.1,
        ),
        (
            {"distribution": "q_uniform", "min": 0.1, "max": 0.5, "q": 0.1},
            lambda x: x in (0.1, 0.2, 0.3, 0.4, 0.5),
        ),
        ({"values": [None, 1, 1.0, True, [2], "a"]}, lambda x: x in (None, 1, [2], "a")),
    ],
)
def test_what_is_drawn_is_in_the_space_and_restored_from_the_storage(
    leaf: Any, is_right: Any
) -> None:
    distribution = _one(leaf)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    drawn = []
    for _ in range(40):
        trial = study.ask()
        value = distribution.suggest(trial, "p")
        drawn.append(value)
        assert is_right(value)
        restored = distribution.restored(trial.params["p"])
        assert (type(restored), restored) == (type(value), value)
    assert len({repr(value) for value in drawn}) > 3
    if "log" in str(leaf):
        assert sum(math.log(value) < math.log(0.1 * 1e-4) / 2 for value in drawn) > 8


def test_one_and_one_point_zero_and_true_are_three_values() -> None:
    choices = Choices((1, 1.0, True))
    stored = [choices.stored(value) for value in choices.values]
    assert stored == [1, "1.0", "true"]
    assert [repr(choices.restored(value)) for value in stored] == ["1", "1.0", "True"]


def test_names_with_dots_are_mappings_of_mappings() -> None:
    point = {"a.b": 1, "a.c.d": None, "e": [2]}
    assert nested(point, list(point)) == {"a": {"b": 1, "c": {"d": None}}, "e": [2]}
    assert short_names(["m.rank", "d.rank", "d.seed"]) == {
        "m.rank": "m.rank",
        "d.rank": "d.rank",
        "d.seed": "seed",
    }
