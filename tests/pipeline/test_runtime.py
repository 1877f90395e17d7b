"""Every schedule on real processes gives the loss and the gradients of one process."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from fingpt_lightning.low_rank import RankRule
from fingpt_lightning.models import recompute_blocks
from fingpt_lightning.models.from_scratch import lay_out_network, materialize
from fingpt_lightning.models.recompute import Recompute
from fingpt_lightning.models.shapes import GPT2Shape
from fingpt_lightning.models.vocabulary_loss import vocabulary_loss
from fingpt_lightning.pipeline import (
    PipelineLayout,
    PipelineRuntime,
    Schedule,
    Stage,
    bubble_share,
    keep_stages,
)
from fingpt_lightning.pipeline.partition import spans_of
from tests.support.ranks import run_ranks

NUM_BLOCKS, NUM_MICROBATCHES, NUM_ROWS = 9, 4, 8
SHAPE = GPT2Shape(num_layers=NUM_BLOCKS, width=12, num_heads=3, num_positions=16)
NETWORKS: dict[str, dict[str, Any]] = {
    "dense": {},
    "low rank": {"rank": RankRule(3), "embedding_rank": 5},
}
SCALE = 0.25


def _laid_out(kind: str) -> PreTrainedModel:
    return lay_out_network(SHAPE, 23, **NETWORKS[kind])


def _whole(kind: str) -> PreTrainedModel:
    network = _laid_out(kind)
    materialize(network, seed=3)
    return network.double()


def _batch(num_rows: int = NUM_ROWS, num_tokens: int = 11) -> tuple[Tensor, Tensor]:
    """Rows with unequal numbers of supervised tokens."""
    tokens = torch.randint(
        23, (num_rows, num_tokens + 1), generator=torch.Generator().manual_seed(7)
    )
    labels = tokens[:, 1:].clone()
    for row in range(num_rows):
        labels[row, : row % num_tokens] = -100
    return tokens[:, :-1].contiguous(), labels


def _truth(kind: str, *batches: tuple[Tensor, Tensor]) -> tuple[list[float], dict[str, Tensor]]:
    network = _whole(kind)
    losses = []
    for ids, labels in batches:
        hidden = network.base_model(ids, use_cache=False).last_hidden_state
        sums = vocabulary_loss(network.lm_head, hidden, labels)
        (SCALE * sums.loss_sum).backward()
        losses.append(sums.loss_sum.item())
    return losses, _gradients(network)


def _gradients(network: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def _pipeline(
    kind: str, layout: PipelineLayout, recompute: Recompute = Recompute.NONE, rows: int = 0
) -> Any:
    sizes = [NUM_BLOCKS // layout.num_stages] * layout.num_stages
    sizes[0] += NUM_BLOCKS - sum(sizes)
    spans = spans_of(sizes)
    network = _laid_out(kind)
    own = layout.stages_of(dist.get_rank())
    keep_stages(network, [spans[stage] for stage in own])
    materialize(network, seed=3)
    network = network.double()
    recompute_blocks(network, recompute)
    group = dist.group.WORLD
    assert group is not None
    runtime = PipelineRuntime(
        layout,
        {stage: Stage(network, spans[stage]) for stage in own},
        group,
        torch.device("cpu"),
        SHAPE.width,
        lambda hidden, labels: vocabulary_loss(network.lm_head, hidden, labels),
        rows,
    )
    return network, runtime


def _cases(num_ranks: int) -> Iterator[tuple[str, str, PipelineLayout, Recompute]]:
    for schedule in Schedule:
        for kind in NETWORKS:
            layout = PipelineLayout(
                schedule, num_ranks, 2 * num_ranks, schedule.default_stages_per_rank
            )
            yield f"{kind} {schedule.value}", kind, layout, Recompute.NONE
    yield (
        "recomputed", "low rank", PipelineLayout(Schedule.ONE_F_ONE_B, num_ranks, 8),
        Recompute.LOW_RANK,
    )  # fmt: skip
    yield (
        "recomputed twice", "dense", PipelineLayout(Schedule.ZBV_ZERO_BUBBLE, num_ranks, 4, 2),
        Recompute.BLOCK,
    )  # fmt: skip


def _refusal_of_six_rows(num_ranks: int) -> str:
    _, runtime = _pipeline("dense", PipelineLayout(Schedule.ONE_F_ONE_B, num_ranks, 4))
    with pytest.raises(ValueError, match="6 rows") as told:
        runtime.train(*_batch(6))
    # Of a batch that is known to be one that is not full, two rows are filled up.
    _, runtime = _pipeline("dense", PipelineLayout(Schedule.ONE_F_ONE_B, num_ranks, 4), rows=8)
    assert runtime.train(*_batch(6)).num_tokens == (_batch(6)[1] != -100).sum()
    return str(told.value)


def _run_cases(process_rank: int, num_ranks: int) -> dict[str, Any]:
    results: dict[str, Any] = {"refusal": _refusal_of_six_rows(num_ranks)}
    for name, kind, layout, recompute in _cases(num_ranks):
        network, runtime = _pipeline(kind, layout, recompute)
        ids, labels = _batch()
        first = runtime.train(ids, labels, scale=SCALE)
        smaller = runtime.train(*_batch(5, 7), scale=SCALE, record=True)
        evaluated = runtime.evaluate(*_batch(5))
        rows = runtime.evaluate_rows(ids[:3], labels[:3])
        results[name] = {
            "losses": [first.loss_sum.item(), smaller.loss_sum.item()],
            "num_tokens": first.num_tokens.item(),
            "gradients": _gradients(network),
            "evaluated": evaluated.loss_sum.item(),
            "rows": rows,
            "bubble_share": bubble_share(runtime.passes()),
        }
    return results


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_schedule_gives_losses_and_gradients_of_one_process(num_ranks: int) -> None:
    per_rank = run_ranks(_run_cases, num_ranks, timeout_s=120)
    assert len(per_rank[0]) == 2 * len(Schedule) + 3
    for results in per_rank:
        assert "6 rows cannot be cut into num_microbatches 4" in results["refusal"]
    for name, kind, *_ in _cases(num_ranks):
        losses, gradients = _truth(kind, _batch(), _batch(5, 7))
        (evaluated,), _ = _truth(kind, _batch(5))
        ids, labels = _batch()
        of_rows = [_truth(kind, (ids[row : row + 1], labels[row : row + 1])) for row in range(3)]
        counts = (labels[:3] != -100).sum(1).double()
        seen: dict[str, Tensor] = {}
        for results in per_rank:
            result = results[name]
            assert result["losses"] == pytest.approx(losses, rel=1e-12), name
            assert result["num_tokens"] == (_batch()[1] != -100).sum()
            assert result["evaluated"] == pytest.approx(evaluated, rel=1e-12)
            assert result["rows"][:, 0].tolist() == pytest.approx([loss for (loss,), _ in of_rows])
            assert torch.equal(result["rows"][:, 1], counts)
            assert 0 < result["bubble_share"] < 1
            for key, gradient in result["gradients"].items():
                # The ends have a copy of the embedding each.
                seen[key] = seen[key] + gradient if key in seen else gradient
        assert seen.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(seen[key], gradient, rtol=0, atol=1e-11, msg=f"{name} {key}")
