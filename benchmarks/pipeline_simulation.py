"""What would each schedule waste and hold on 8 to 64 ranks? Simulated with measured times.

One decoder block, the embedding and the head are timed here, alone, forward, for gradients of
inputs and for gradients of weights; `fingpt_lightning.pipeline.simulation` puts them together.
Communication is free in it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.record import markdown_table, new_record, write_record
from fingpt_lightning.models import GPT2Shape, build_network, vocabulary_loss
from fingpt_lightning.pipeline import PipelineLayout, Schedule, Stage, bubble_share, draw
from fingpt_lightning.pipeline.partition import minimax, spans_of
from fingpt_lightning.pipeline.simulation import StageTimes, peak_held, simulate
from fingpt_lightning.profiling import keep_freed_memory
from fingpt_lightning.profiling.memory import LiveTensorBytes
from fingpt_lightning.units import MIB

QUESTION = "What share of the time is idle, and what is held, in pipelines of 8 to 64 ranks?"
_DRAWN_RANKS, _DRAWN_MICROBATCHES = 4, 8


class Settings(NamedTuple):
    """The settings that determine the figures."""

    width: int
    vocab_size: int
    embedding_rank: int | None
    block_length: int
    rows: int
    num_blocks: int
    ranks: list[int]
    microbatches_a_rank: list[int]
    repeats: int
    seed: int


class Measured(NamedTuple):
    """Times of the parts of a network, and what a block keeps of a microbatch."""

    embedding: StageTimes
    block: StageTimes
    head: StageTimes
    block_bytes: int

    def stage(self, num_blocks: int, is_first: bool, is_last: bool) -> StageTimes:
        """A stage of some blocks and perhaps an end."""
        parts = [self.block] * num_blocks
        parts += [self.embedding] * is_first + [self.head] * is_last
        return StageTimes(*(sum(times) for times in zip(*parts, strict=True)))


def main() -> None:
    """Measures, simulates, writes record, table and a picture of each schedule."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--embedding_rank", type=int, default=128, help="0 for a full table")
    parser.add_argument("--block_length", type=int, default=128)
    parser.add_argument("--rows", type=int, default=2, help="of a microbatch")
    parser.add_argument("--num_blocks", type=int, default=128, help="of the simulated network")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--microbatches_a_rank", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=15, help="of each timing")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True, help="record; .md and .svg beside it")
    words = vars(parser.parse_args())
    path: Path = words.pop("json")
    settings = Settings(**(words | {"embedding_rank": words["embedding_rank"] or None}))
    torch.set_num_threads(1)
    keep_freed_memory()
    record = new_record(QUESTION, settings._asdict() | {"threads": 1})
    measured = measure(settings)
    record["measured"] = {
        **{
            f"{part}_ms": _in_ms(getattr(measured, part)) for part in ("embedding", "block", "head")
        },
        "block_activations_mib": round(measured.block_bytes / MIB, 3),
    }
    record["rows"] = [
        _row(settings, measured, ranks, count * ranks, schedule)
        for ranks in settings.ranks
        for count in settings.microbatches_a_rank
        for schedule in Schedule
    ]
    record["summary"] = _summary(record["rows"])
    write_record(path, record, _table(record["rows"]))
    for schedule in Schedule:
        _draw(measured, schedule, path)
    print(json.dumps(record["summary"], indent=1))


def measure(settings: Settings) -> Measured:
    """Times by the thread's own clock, which stands still while other processes have the core."""
    shape = GPT2Shape(2, settings.width, settings.width // 64 or 1, settings.block_length)
    network: Any = build_network(
        shape, settings.vocab_size, embedding_rank=settings.embedding_rank, seed=settings.seed
    )
    first, _ = (Stage(network, span) for span in spans_of([1, 1]))
    block = network.transformer.h[1]
    generator = torch.Generator().manual_seed(settings.seed)
    size = (settings.rows, settings.block_length)
    ids = torch.randint(settings.vocab_size, size, generator=generator)
    with torch.no_grad():
        hidden = first(ids)

    def through_block(x: Tensor) -> Tensor:
        out = block(x)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def run_head(x: Tensor) -> Tensor:
        """Forward and backward, as a pipeline runs it as part of the last forward pass."""
        normed = network.transformer.ln_f(x)
        vocabulary_loss(network.lm_head, normed, ids).loss_sum.backward()
        return x

    def embed(x: Tensor) -> Tensor:
        looked_up: Tensor = network.transformer.wte(ids)
        return looked_up + x * 0  # with a path for gradients of inputs, which costs nothing

    with LiveTensorBytes() as count:
        held = through_block(hidden.detach().requires_grad_())
        block_bytes = count.live_bytes
    del held
    return Measured(
        _times(embed, hidden, network.transformer.wte, settings.repeats),
        _times(through_block, hidden, block, settings.repeats),
        StageTimes(_seconds(run_head, hidden, settings.repeats), 0.0, 0.0),
        block_bytes,
    )


def _seconds(run: Callable[[Tensor], Tensor], hidden: Tensor, repeats: int) -> float:
    taken = []
    for _ in range(2 + repeats):
        x = hidden.detach().requires_grad_()
        started_s = time.thread_time()
        run(x)
        taken.append(time.thread_time() - started_s)
    return statistics.median(taken[2:])


def _times(
    run: Callable[[Tensor], Tensor], hidden: Tensor, part: nn.Module, repeats: int
) -> StageTimes:
    taken: list[list[float]] = [[], [], []]
    parameters = list(part.parameters())
    for _ in range(2 + repeats):
        x = hidden.detach().requires_grad_()
        started_s = time.thread_time()
        out = run(x)
        taken[0].append(time.thread_time() - started_s)
        up = torch.ones_like(out)
        for slot, wanted in ((1, [x]), (2, parameters)):
            started_s = time.thread_time()
            torch.autograd.grad(out, wanted, up, retain_graph=True)
            taken[slot].append(time.thread_time() - started_s)
    forward_s, input_s, weight_s = (statistics.median(each[2:]) for each in taken)
    # Gradients of weights alone traverse the path of the inputs too.
    return StageTimes(forward_s, input_s, max(weight_s - input_s, 0.1 * input_s))


def _stages(measured: Measured, layout: PipelineLayout, num_blocks: int) -> list[StageTimes]:
    """The partition whose slowest stage is fastest."""
    last = layout.num_stages - 1

    def cost_of(stage: int, first: int, end: int) -> float:
        return sum(measured.stage(end - first, stage == 0, stage == last))

    sizes = minimax(num_blocks, layout.num_stages, cost_of)
    return [measured.stage(size, s == 0, s == last) for s, size in enumerate(sizes)]


def _row(
    settings: Settings,
    measured: Measured,
    num_ranks: int,
    num_microbatches: int,
    schedule: Schedule,
) -> dict[str, Any]:
    layout = PipelineLayout(schedule, num_ranks, num_microbatches, schedule.default_stages_per_rank)
    stages = _stages(measured, layout, settings.num_blocks)
    passes = simulate(layout, stages)
    # The blocks alone: what the ends keep is small.
    blocks_per_stage = settings.num_blocks / layout.num_stages
    held = peak_held(passes, lambda stage: blocks_per_stage * measured.block_bytes)
    end_s = max(p.end_s for p in passes)
    return {
        "schedule": schedule.value,
        "ranks": num_ranks,
        "microbatches": num_microbatches,
        "bubble_share_simulated": round(bubble_share(passes), 4),
        "bubble_share_formula": round(layout.bubble_share, 4),
        "step_time_s": round(end_s, 4),
        "held_mib_of_fullest_rank": round(max(held.values()) / MIB, 1),
        "held_mib_of_emptiest_rank": round(min(held.values()) / MIB, 1),
    }


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """For the most ranks and microbatches: each schedule's step beside that of 1F1B."""
    largest = [row for row in rows if row["microbatches"] == max(r["microbatches"] for r in rows)]
    by_name = {row["schedule"]: row for row in largest}
    base = by_name[Schedule.ONE_F_ONE_B.value]
    summary = {}
    for name, row in by_name.items():
        key = name.lower()
        summary[f"step_time_ratio_to_1f1b_{key}"] = row["step_time_s"] / base["step_time_s"]
        held = "held_mib_of_fullest_rank"
        summary[f"held_ratio_to_1f1b_{key}"] = row[held] / base[held]
    return {key: float(f"{value:.4g}") for key, value in summary.items()}


def _table(rows: Sequence[dict[str, Any]]) -> str:
    header = [
        "schedule", "ranks", "microbatches", "idle, simulated", "idle, by formula", "step (s)",
        "held by the fullest rank (MiB)", "by the emptiest",
    ]  # fmt: skip
    return markdown_table(
        header,
        [
            [
                row["schedule"], str(row["ranks"]), str(row["microbatches"]),
                f"{row['bubble_share_simulated']:.1%}", f"{row['bubble_share_formula']:.1%}",
                f"{row['step_time_s']:.2f}", f"{row['held_mib_of_fullest_rank']:,.0f}",
                f"{row['held_mib_of_emptiest_rank']:,.0f}",
            ]
            for row in rows
        ],
    )  # fmt: skip


def _draw(measured: Measured, schedule: Schedule, record: Path) -> None:
    """Four ranks with four blocks each, without the ends."""
    layout = PipelineLayout(
        schedule, _DRAWN_RANKS, _DRAWN_MICROBATCHES, schedule.default_stages_per_rank
    )
    blocks_per_stage = 4 // layout.stages_per_rank
    stages = [measured.stage(blocks_per_stage, False, False)] * layout.num_stages
    passes = simulate(layout, stages)
    most = max(peak_held(passes).values()) / layout.stages_per_rank
    title = f"{schedule.value}: {bubble_share(passes):.0%} idle, at most {most:g} microbatches held"
    draw(passes, record.with_name(f"{record.stem}_{schedule.value.lower()}.svg"), title)


def _in_ms(times: StageTimes) -> dict[str, float]:
    return {
        name.removesuffix("_s"): round(1e3 * value, 3) for name, value in times._asdict().items()
    }


if __name__ == "__main__":
    main()
