from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fingpt_lightning.reporting.search import Point, frontier, importances

POINTS = st.lists(
    st.builds(Point, st.integers(0, 99), st.floats(1, 9), st.floats(1, 9)), min_size=1, max_size=20
)


@given(POINTS)
def test_no_point_beats_one_of_the_frontier_and_each_other_point_is_beaten(
    points: list[Point],
) -> None:
    best = frontier(points)
    assert best

    def beats(a: Point, b: Point) -> bool:
        as_good = a.compression_ratio >= b.compression_ratio and a.loss <= b.loss
        return as_good and (a.compression_ratio, a.loss) != (b.compression_ratio, b.loss)

    assert not any(beats(other, point) for other in points for point in best)
    places = {(point.compression_ratio, point.loss) for point in best}
    for point in points:
        if (point.compression_ratio, point.loss) not in places:
            assert any(beats(other, point) for other in best)


TRIALS = st.lists(
    st.tuples(
        st.fixed_dictionaries(
            {"rank": st.sampled_from([1, 2, 4]), "rate": st.floats(0, 1), "kind": st.text("ab")}
        ),
        st.floats(-9, 9),
    ),
    max_size=15,
)


@given(TRIALS)
def test_importances_are_shares_and_do_not_depend_on_the_order(
    trials: list[tuple[dict[str, Any], float]],
) -> None:
    found = importances(trials)
    assert all(0 <= share <= 1 for share in found.values())
    assert importances(trials[::-1]) == pytest.approx(found)


def test_the_parameter_that_decides_is_the_most_important() -> None:
    trials = [
        ({"rank": rank, "rate": rate, "same": 1}, 10.0 / rank + 0.001 * rate)
        for rank in (1, 2, 4)
        for rate in (1, 2, 3)
    ]
    found = importances(trials)
    assert list(found) == ["rank", "rate"]
    assert found["rank"] > 0.8
    assert found["rate"] < 0.1


def test_a_best_value_in_the_middle_counts_too() -> None:
    trials = [({"rate": rate}, abs(rate - 5.0)) for rate in range(12)]
    assert importances(trials)["rate"] > 0.3


def test_few_trials_have_no_importances() -> None:
    assert importances([({"rank": rank % 2}, float(rank)) for rank in range(3)]) == {}
