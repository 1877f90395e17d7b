import pytest
from hypothesis import given
from hypothesis import strategies as st

from fingpt_lightning.low_rank import RankRule, resolve_rank
from fingpt_lightning.low_rank.rank import largest_rank

SIZES = st.integers(1, 300)


@given(in_features=SIZES, out_features=SIZES, share=st.floats(0, 1, exclude_min=True))
def test_a_pair_is_taken_only_where_it_is_smaller(
    in_features: int, out_features: int, share: float
) -> None:
    rank = resolve_rank(share, in_features, out_features)
    if rank is not None:
        assert 1 <= rank <= min(in_features, out_features)
        assert rank * (in_features + out_features) < in_features * out_features


@given(in_features=SIZES, out_features=SIZES)
def test_no_rank_is_dense(in_features: int, out_features: int) -> None:
    assert resolve_rank(None, in_features, out_features) is None


@given(
    in_features=SIZES, out_features=SIZES, share=st.floats(0, 1, exclude_min=True),
    multiple=st.integers(1, 40),
)  # fmt: skip
def test_a_rank_becomes_the_nearest_multiple_that_is_smaller_than_dense(
    in_features: int, out_features: int, share: float, multiple: int
) -> None:
    plain = resolve_rank(share, in_features, out_features)
    rank = resolve_rank(share, in_features, out_features, multiple)
    fit = range(multiple, largest_rank(in_features, out_features) + 1, multiple)
    if plain is None or not fit:
        assert rank == plain
    else:
        assert rank == min(reversed(fit), key=lambda fitting: abs(fitting - plain))


def test_a_rule_rounds_every_rank_to_its_multiples() -> None:
    rule = RankRule(0.3, {"*.c_fc": 15, "*.c_proj": None}, multiple=8)
    ranks = [rule.rank_of(f"h.0.{name}", 64, 64) for name in ("c_attn", "c_fc", "c_proj")]
    assert ranks == [16, 16, None]


def test_factors_of_the_size_of_the_layer_are_not_taken() -> None:
    assert resolve_rank(1, 6, 3) == 1
    assert resolve_rank(2, 6, 3) is None, "2 (6 + 3) numbers are those of 6 x 3"


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (769, r"rank 769 is outside \[1, 768\] for a layer of 768 x 2304"),
        (0, r"rank 0 is outside \[1, 768\]"),
        (1.5, r"rank ratio 1.5 is outside \(0, 1\]"),
    ],
)
def test_a_rank_out_of_range_is_refused(rank: int | float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_rank(rank, 768, 2304)


def test_the_last_fitting_pattern_wins() -> None:
    rule = RankRule(4, {"*.mlp.*": 0.5, "h.1.*": None})
    assert rule.rank_of("h.0.attn.c_attn", 16, 48) == 4
    assert rule.rank_of("h.0.mlp.c_fc", 16, 64) == 8
    assert rule.rank_of("h.1.mlp.c_fc", 16, 64) is None


def test_a_wrong_rank_names_its_layer() -> None:
    with pytest.raises(ValueError, match=r"h\.0\.attn: rank 99 is outside \[1, 16\]"):
        RankRule(99).rank_of("h.0.attn", 16, 48)


def test_patterns_that_fit_nothing_are_found() -> None:
    assert RankRule(4, {"*.mlp": 2, "h.*": 3}).unused_patterns(["h.0.attn"]) == ["*.mlp"]
