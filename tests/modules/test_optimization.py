import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fingpt_lightning.modules.optimization import cosine_with_warmup, decay_groups, trapezoid


@given(
    num_steps=st.integers(1, 200),
    warmup_steps=st.integers(0, 200),
    cooldown_steps=st.one_of(st.none(), st.integers(1, 200)),
    final_ratio=st.floats(0, 1),
)
def test_the_factor_rises_then_falls_between_its_bounds(
    num_steps: int, warmup_steps: int, cooldown_steps: int | None, final_ratio: float
) -> None:
    factor = cosine_with_warmup(num_steps, warmup_steps, final_ratio)
    if cooldown_steps is not None:
        factor = trapezoid(num_steps, warmup_steps, cooldown_steps, final_ratio)
        constant = [factor(s) for s in range(warmup_steps, num_steps - cooldown_steps + 1)]
        assert set(constant) <= {1.0}
    values = [factor(step) for step in range(num_steps + 3)]
    top = min(warmup_steps, len(values))
    assert values[:top] == sorted(values[:top])
    assert values[top:] == sorted(values[top:], reverse=True)
    assert all(0 < value <= 1 + 1e-12 for value in values[:top])
    assert all(final_ratio - 1e-12 <= value <= 1 + 1e-12 for value in values[top:])
    if num_steps >= warmup_steps:
        assert values[-1] == pytest.approx(final_ratio, abs=1e-12) or num_steps == warmup_steps


def test_matrices_decay_and_vectors_do_not() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    network[2].weight.requires_grad_(False)
    decayed, kept = decay_groups(network.named_parameters(), 0.1)
    assert [p.shape for p in decayed["params"]] == [(4, 3)]
    assert len(kept["params"]) == 4
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


def test_a_linear_schedule_falls_by_as_much_in_each_step() -> None:
    factor = trapezoid(num_steps=12, warmup_steps=2, cooldown_steps=12, final_ratio=0.0)
    falls = [factor(step) - factor(step + 1) for step in range(2, 12)]
    assert falls == pytest.approx([0.1] * 10)
    assert factor(12) == 0.0
