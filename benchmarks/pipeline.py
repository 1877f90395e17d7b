"""What does a pipeline of two processes gain over one, and over plain model parallelism?

All contenders train the same network on the same batches, one thread per process, in turns within
one run of two processes. The limit of two cores is measured beside it: two processes that
train on their own.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.optim import AdamW
from transformers import PreTrainedModel

from benchmarks.record import markdown_table, new_record, spread, write_record
from fingpt_lightning.models import GPT2Shape, Recompute, recompute_blocks, vocabulary_loss
from fingpt_lightning.models.from_scratch import lay_out_network, materialize
from fingpt_lightning.pipeline import (
    Balance,
    Pass,
    PipelineLayout,
    PipelineRuntime,
    Stage,
    Work,
    Workload,
    bubble_share,
    draw,
    keep_stages,
    network_costs,
    partition,
    schedule_named,
    sum_over,
    tied_parameters,
)
from fingpt_lightning.profiling import keep_freed_memory
from fingpt_lightning.profiling.memory import LiveTensorBytes, module_memory

QUESTION = "What does a pipeline of two processes gain over one, and over plain model parallelism?"
NUM_RANKS = 2
ONE, TWO, PLAIN = "one process", "two independent processes", "plain model parallel"


class Settings(NamedTuple):
    """The settings that determine the figures."""

    num_layers: int
    width: int
    vocab_size: int
    embedding_rank: int | None
    block_length: int
    batch_size: int
    microbatches: list[int]
    schedules: list[str]
    recompute: str
    repeats: int
    seed: int


class Contender(NamedTuple):
    """A way to train: its name, and its pipeline, if it has one."""

    name: str
    num_microbatches: int
    layout: PipelineLayout | None = None


def main() -> None:
    """Measures all contenders, writes record, table and a picture of each schedule."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--embedding_rank", type=int, default=128, help="0 for a full table")
    parser.add_argument("--block_length", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--schedules", nargs="+", default=["1F1B"])
    parser.add_argument("--recompute", choices=list(Recompute), default="block")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True, help="record; .md and .svg beside it")
    words = vars(parser.parse_args())
    path: Path = words.pop("json")
    settings = Settings(**(words | {"embedding_rank": words["embedding_rank"] or None}))
    record = new_record(QUESTION, settings._asdict() | {"threads_per_process": 1})
    measured = _run_processes(settings)
    record["rows"] = _rows(settings, measured)
    record["summary"] = _summary(settings, measured)
    write_record(path, record, _table(record["rows"]))
    for contender in contenders(settings):
        if contender.layout is not None and contender.name != PLAIN:
            noted = (Pass(*p) for p in measured[0]["passes"][contender.name])
            passes = [p._replace(work=Work(p.work)) for p in noted]
            picture = path.with_name(f"{path.stem}_{contender.name.replace(' ', '_')}.svg")
            draw(passes, picture, f"{contender.name}: {bubble_share(passes):.1%} idle")
    print(json.dumps(record["summary"], indent=1))


def contenders(settings: Settings) -> list[Contender]:
    """The baselines, then each schedule with each number of microbatches."""
    first = settings.microbatches[0]
    found = [
        Contender(ONE, first),
        Contender(TWO, first),
        Contender(PLAIN, 1, PipelineLayout(schedule_named("GPipe"), NUM_RANKS, 1)),
    ]
    for name in settings.schedules:
        schedule = schedule_named(name)
        for count in settings.microbatches:
            layout = PipelineLayout(schedule, NUM_RANKS, count, schedule.default_stages_per_rank)
            found.append(Contender(f"{schedule.value} {count}", count, layout))
    return found


def _run_processes(settings: Settings) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_measure, (settings, folder), NUM_RANKS)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]


def _measure(rank: int, settings: Settings, folder: str) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    url = Path(folder, "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=NUM_RANKS)
    measured: dict[str, dict[str, Any]] = {
        key: {} for key in ("times_s", "losses", "bytes", "bubbles", "passes")
    }
    turns: dict[str, _Training] = {}
    for contender in contenders(settings):
        takes_part = contender.name != ONE or rank == 0
        training = _Training(settings, contender) if takes_part else None
        dist.barrier()
        if training is not None:
            turns[contender.name] = training
            measured["bytes"][contender.name] = training.peak_bytes()
            measured["losses"][contender.name] = [training.step() for _ in range(3)]
    for _ in range(1 + settings.repeats):
        for contender in contenders(settings):
            dist.barrier()
            started_s = time.perf_counter()
            if contender.name in turns:
                turns[contender.name].step()
            elapsed_s = time.perf_counter() - started_s
            measured["times_s"].setdefault(contender.name, []).append(elapsed_s)
    for name, training in turns.items():
        if training.runtime is not None:
            recorded = [training.recorded() for _ in range(3)]
            measured["bubbles"][name] = statistics.median(map(bubble_share, recorded))
            measured["passes"][name] = recorded[-1]
    dist.barrier()
    Path(folder, f"{rank}.json").write_text(json.dumps(measured))
    dist.destroy_process_group()


class _Training:
    """A contender in this process: network or part of it, optimizer, and one batch after another.

    Args:
        settings: Settings of the run.
        contender: Way in which it trains.
    """

    def __init__(self, settings: Settings, contender: Contender) -> None:
        self._settings, self._contender = settings, contender
        shape = GPT2Shape(
            settings.num_layers, settings.width, settings.width // 64 or 1, settings.block_length
        )
        network = lay_out_network(
            shape, settings.vocab_size, embedding_rank=settings.embedding_rank
        )
        self.runtime: PipelineRuntime | None = None
        self._tied = tied_parameters(network)
        layout = contender.layout
        if layout is not None:
            costs = network_costs(network, settings.block_length)
            rows = settings.batch_size // contender.num_microbatches
            work = Workload(rows * settings.block_length)
            spans = partition(costs, layout, work, Balance.TIME)
            own = layout.stages_of(dist.get_rank())
            keep_stages(network, [spans[stage] for stage in own])
        materialize(network, settings.seed)
        recompute_blocks(network, Recompute(settings.recompute))
        self.network: PreTrainedModel = network
        if layout is not None:
            group = dist.group.WORLD
            assert group is not None
            stages = {stage: Stage(network, spans[stage]) for stage in own}
            device = torch.device("cpu")
            self.runtime = PipelineRuntime(
                layout, stages, group, device, settings.width, self._loss
            )
        self._optimizer = AdamW(network.parameters(), lr=1e-3, fused=True)
        self._batches = torch.Generator().manual_seed(settings.seed)

    def step(self, record: bool = False) -> float:
        """The mean loss of one optimizer step."""
        settings = self._settings
        shape = (settings.batch_size, settings.block_length + 1)
        tokens = torch.randint(settings.vocab_size, shape, generator=self._batches)
        ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self._optimizer.zero_grad()
        scale = 1 / labels.numel()
        if self.runtime is not None:
            loss_sum = self.runtime.train(ids, labels, scale=scale, record=record).loss_sum
            is_split = not self.runtime.layout.schedule.is_v_shaped
            if is_split and self._contender.layout is not None:
                group = dist.group.WORLD
                assert group is not None
                tied = [self.network.get_parameter(name).grad for name in self._tied]
                sum_over([gradient for gradient in tied if gradient is not None], group)
        else:
            loss_sum = torch.zeros(())
            count = self._contender.num_microbatches
            for part, its_labels in zip(ids.chunk(count), labels.chunk(count), strict=True):
                hidden = self.network.base_model(part, use_cache=False).last_hidden_state
                sums = self._loss(hidden, its_labels)
                (sums[0] * scale).backward()
                loss_sum += sums[0].detach()
        self._optimizer.step()
        return loss_sum.item() * scale

    def recorded(self) -> list[Pass]:
        """The passes of one more step, of all ranks."""
        self.step(record=True)
        assert self.runtime is not None
        return self.runtime.passes()

    def peak_bytes(self) -> int:
        """Weights, optimizer state and the peak that a step had alive beside them."""
        self.step()  # makes the optimizer's state
        self._optimizer.zero_grad()
        held = module_memory(self.network, self._optimizer)
        with LiveTensorBytes() as count:
            self.step()
        return held.weights + held.optimizer + int(count.peak_bytes)

    def _loss(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return vocabulary_loss(self.network.get_submodule("lm_head"), hidden, labels)


def _step_times_s(measured: list[dict[str, Any]], name: str) -> list[float]:
    """For each turn but the first, the time of the slowest process."""
    of_ranks = [of_rank["times_s"][name] for of_rank in measured]
    return [max(times) for times in zip(*of_ranks, strict=True)][1:]


def _rate(settings: Settings, measured: list[dict[str, Any]], name: str) -> float:
    num_tokens = settings.batch_size * settings.block_length * (2 if name == TWO else 1)
    return num_tokens / statistics.median(_step_times_s(measured, name))


def _bytes(measured: list[dict[str, Any]], name: str) -> int:
    return max(int(of_rank["bytes"].get(name, 0)) for of_rank in measured)


def _rows(settings: Settings, measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    one = _rate(settings, measured, ONE)
    rows = []
    for contender in contenders(settings):
        name, rate = contender.name, _rate(settings, measured, contender.name)
        times_s = _step_times_s(measured, name)
        row: dict[str, Any] = {
            "contender": name,
            "repeats": len(times_s),
            "step_time_s": {key: round(value, 4) for key, value in spread(times_s).items()},
            "tokens_per_s": round(rate, 1),
            "ratio_to_one_process": round(rate / one, 4),
            "peak_mib_of_fullest_rank": round(_bytes(measured, name) / 2**20, 1),
        }
        if contender.layout is not None:
            row["bubble_share_measured"] = round(measured[0]["bubbles"][name], 4)
            row["bubble_share_formula"] = round(contender.layout.bubble_share, 4)
        rows.append(row)
    return rows


def _summary(settings: Settings, measured: list[dict[str, Any]]) -> dict[str, float]:
    rate = functools.partial(_rate, settings, measured)
    ceiling = rate(TWO) / rate(ONE)
    summary = {"machine_ceiling_ratio": ceiling}
    truth = measured[0]["losses"][ONE]
    differences = []
    pipelines = [c for c in contenders(settings) if c.layout is not None and c.name != PLAIN]
    for contender in pipelines:
        assert contender.layout is not None
        name = contender.name
        gain = rate(name) / rate(ONE)
        bubble = contender.layout.bubble_share
        own: Callable[[str], str] = functools.partial(_key, contender, pipelines[0])
        summary[own("tokens_per_s_ratio_to_one_process")] = gain
        summary[own("pipeline_efficiency")] = gain / (ceiling * (1 - bubble))
        summary[own("tokens_per_s_ratio_to_plain_model_parallel")] = rate(name) / rate(PLAIN)
        summary[own("bubble_share_measured")] = measured[0]["bubbles"][name]
        summary[own("bubble_share_formula")] = bubble
        summary[own("memory_per_rank_ratio")] = _bytes(measured, name) / _bytes(measured, ONE)
        ours = measured[0]["losses"][name]
        differences += [abs(a - b) / b for a, b in zip(ours, truth, strict=True)]
    summary["max_relative_loss_difference"] = max(differences)
    return {key: float(f"{value:.4g}") for key, value in summary.items()}


def _key(contender: Contender, first: Contender, figure: str) -> str:
    """The first pipeline has the plain names; the names of the others include theirs."""
    if contender == first:
        return figure
    return f"{figure}_{contender.name.replace(' ', '_').lower()}"


def _table(rows: list[dict[str, Any]]) -> str:
    header = ["", "s a step", "tokens/s", "to one process", "bubble", "by formula", "peak (MiB)"]
    lines = []
    for row in rows:
        bubbles = (row.get(f"bubble_share_{kind}") for kind in ("measured", "formula"))
        lines.append(
            [
                row["contender"],
                f"{row['step_time_s']['median']:.3f}",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['ratio_to_one_process']:.2f}x",
                *("-" if share is None else f"{share:.1%}" for share in bubbles),
                f"{row['peak_mib_of_fullest_rank']:,.0f}",
            ]
        )
    return markdown_table(header, lines)


if __name__ == "__main__":
    main()
