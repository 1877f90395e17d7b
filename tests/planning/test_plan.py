import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fingpt_lightning.pipeline import (
    Balance,
    Cost,
    NetworkCosts,
    PipelineLayout,
    Schedule,
    Workload,
)
from fingpt_lightning.planning.plan import (
    RankTiles,
    batches_seen,
    optimizer_bytes,
    rank_plans,
    run_length,
    tile_plan,
)
from fingpt_lightning.profiling.memory import storage_bytes

COUNTS = st.integers(1, 10_000)


@given(
    steps=st.one_of(st.just(-1), COUNTS),
    epochs=st.one_of(st.just(-1), st.none(), st.integers(1, 50)),
    batches=st.integers(1, 500),
    accumulate=st.integers(1, 9),
)
def test_a_run_ends_at_the_first_of_its_limits(
    steps: int, epochs: int | None, batches: int, accumulate: int
) -> None:
    found = run_length(steps, epochs, batches, accumulate)
    a_epoch = math.ceil(batches / accumulate)
    if steps == -1 and epochs == -1:
        assert found == (None, None)
        return
    assert found.steps is not None
    assert found.epochs == found.steps / a_epoch
    if steps != -1:
        assert found.steps <= steps
    if epochs not in (-1, None):
        assert found.steps <= epochs * a_epoch
    assert found.steps in (steps, (epochs or 1000) * a_epoch)


def test_without_data_only_what_is_given_is_known() -> None:
    assert run_length(7, None, None, 1) == (7, None)
    assert run_length(-1, 3, None, 1) == (None, 3.0)


def test_tiles_are_filled_as_operations_are_spent() -> None:
    sizes = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]
    half = tile_plan([(192, *size) for size in sizes])
    assert half is not None
    assert (half.filled, half.ranks) == (0.75, [RankTiles(192, 4, 0.75, 256)])
    mixed = tile_plan([(256, 768, 768), (64, 768, 256), (130, 768, 768)])
    assert mixed is not None
    used, taken = 256 * 1536 + 64 * 1024 + 130 * 1536, 256 * 1536 + 128 * 1024 + 256 * 1536
    assert mixed.filled == used / taken
    assert {tiles.rank: tiles.full_rank for tiles in mixed.ranks} == {256: 256, 64: 128, 130: 128}
    small = tile_plan([(16, 64, 64)])
    assert small is not None
    assert small.ranks[0].full_rank is None, "128 columns are more than the layer has"
    assert tile_plan([]) is None


@given(batches=COUNTS, share=st.floats(0, 1))
def test_a_limit_on_batches_never_adds_any(batches: int, share: float) -> None:
    assert 0 <= batches_seen(batches, share) <= batches
    assert batches_seen(batches, batches + 1) == batches


@given(st.lists(COUNTS, min_size=1, max_size=5))
def test_eight_bits_never_take_more_than_a_block_of_slack(counts: list[int]) -> None:
    plain = optimizer_bytes([(count, 4) for count in counts])
    eight = optimizer_bytes([(count, 4) for count in counts], "adamw_8bit")
    assert eight <= plain + 2 * 4 * 256


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_the_optimizers_state_is_what_it_holds_after_a_step(kind: str) -> None:
    import torch

    sizes = [(64, 80), (7, 11), (13,)]
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    optimizer: torch.optim.Optimizer
    if kind == "adamw":
        optimizer = torch.optim.AdamW(parameters, fused=True)
    else:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        optimizer = bitsandbytes.optim.AdamW8bit(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = optimizer.state.values()
    held = storage_bytes(x for state in states for x in state.values() if torch.is_tensor(x))
    planned = optimizer_bytes([(p.numel(), p.itemsize) for p in parameters], kind)
    assert planned == held


@given(
    num_ranks=st.integers(1, 4),
    surplus=st.integers(0, 9),
    schedule=st.sampled_from([Schedule.GPIPE, Schedule.ONE_F_ONE_B]),
)
def test_the_ranks_hold_every_parameter_and_earlier_ones_more_passes(
    num_ranks: int, surplus: int, schedule: Schedule
) -> None:
    blocks = (Cost(parameters=5, flops_per_token=3, activations_per_token=2),) * num_ranks
    costs = NetworkCosts(Cost(7), blocks * 2 + blocks[:1] * surplus, Cost(11))
    layout = PipelineLayout(schedule, num_ranks, 8)
    plans = rank_plans(costs, layout, Workload(1), Balance.TIME)
    assert [plan.rank for plan in plans] == list(range(num_ranks))
    assert sum(plan.parameters for plan in plans) == 7 + 11 + 5 * len(costs.blocks)
    state = 4 * 4 * sum(plan.parameters for plan in plans)
    assert sum(plan.weights_and_state for plan in plans) == state
    by_hand = rank_plans(
        costs,
        layout,
        Workload(1),
        Balance.TIME,
        [len(costs.blocks) - num_ranks + 1] + [1] * (num_ranks - 1),
    )
    assert by_hand[0].activations >= plans[0].activations
