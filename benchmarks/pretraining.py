"""Is pretraining a low-rank GPT-2 faster and smaller than its well-tuned dense baseline?

Times full training steps of both, and of transformers' own GPT-2, in turns on the same tokens;
measures each one's memory in a process of its own. Needs torch, transformers and lightning.
"""

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import markdown_table, new_record, spread, write_record
from benchmarks.training_step import (
    TrainingStep,
    Workload,
    interleaved,
    step_memory,
)
from fingpt_lightning.models import Recompute
from fingpt_lightning.profiling import keep_freed_memory
from fingpt_lightning.units import GIB

QUESTION = (
    "Is a training step of low-rank GPT-2 faster and smaller than that of its dense baseline, both"
    " equally well tuned, and of transformers' own?"
)
# Rank of the layers and of the embedding: about 2.65x smaller in all.
RANKS = {
    "toy": (8, 8),
    "gpt2-nano": (64, 64),
    "gpt2-small": (224, 256),
    "gpt2-medium": (304, 256),
    "gpt2-large": (368, 320),
    "gpt2-xl": (464, 320),
    "toy-llama": (8, 8),
    "llama-60m": (144, 144),
    "llama-130m": (208, 256),
    "llama-350m": (304, 256),
    "llama-1b": (592, 448),
}


def main() -> None:
    """Times, measures and writes the record."""
    options = _options()
    rank, embedding_rank = RANKS[options.preset]
    workload = Workload(
        options.preset,
        options.rank or rank,
        options.embedding_rank or embedding_rank,
        options.batch_size,
        options.block_length,
        options.device,
        options.seed,
    )
    if options.device == "cpu":
        keep_freed_memory()
    record = new_record(QUESTION, vars(workload) | {"repeats": options.repeats})
    record["config"]["threads"] = torch.get_num_threads()
    memory: Memory = {}
    if not options.no_memory:
        memory = {
            (contender, recompute): step_memory(contender, workload, recompute, "fp32")
            for contender in options.contenders
            for recompute in (Recompute if contender != "transformers" else [Recompute.NONE])
        }
    seconds = _seconds(options, workload)
    record["rows"] = _rows(seconds, memory, workload)
    record["summary"] = summary(seconds, memory, workload)
    write_record(options.json, record, table(record["rows"], record["summary"]))
    print(json.dumps(record["summary"], indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=RANKS, default="gpt2-small")
    parser.add_argument("--rank", type=int, help="of the linear layers")
    parser.add_argument("--embedding_rank", type=int)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--block_length", type=int, default=512)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=7, help="timed turns")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--contenders", nargs="+", default=["dense", "low_rank", "transformers"],
        choices=("dense", "low_rank", "transformers"),
    )  # fmt: skip
    parser.add_argument("--no_compile", action="store_true", help="do not try torch.compile")
    parser.add_argument("--no_memory", action="store_true", help="do not measure memory")
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside it")
    options = parser.parse_args()
    if not {"dense", "low_rank"} <= set(options.contenders):
        parser.error("--contenders: dense and low_rank are always compared")
    return options


Seconds = dict[tuple[str, str], list[float]]
"""Seconds of each timed step by precision and contender, such as ``("bf16", "dense compiled")``."""


def _seconds(options: argparse.Namespace, workload: Workload) -> Seconds:
    built = {contender: TrainingStep(contender, workload) for contender in options.contenders}
    if not options.no_compile:
        for step in built.values():
            step.compile()
    seconds: Seconds = {}
    for precision in ("fp32", "bf16"):
        turns: dict[str, Callable[[], float]] = {}
        for contender, step in built.items():
            turns[contender] = functools.partial(_eager, step, precision)
            if not options.no_compile:
                turns[f"{contender} compiled"] = functools.partial(step, precision)
        taken = interleaved(turns, options.repeats)
        seconds |= {(precision, name): times for name, times in taken.items()}
    return seconds


def _eager(step: TrainingStep, precision: str) -> float:
    with step.uncompiled():
        return step(precision)


def best(seconds: Seconds, precision: str, contender: str) -> list[float]:
    """The times of a contender's faster form, eager or compiled."""
    forms = [
        times
        for (of_precision, name), times in seconds.items()
        if of_precision == precision and name in (contender, f"{contender} compiled")
    ]
    return min(forms, key=statistics.median)


def _ratio(slower: list[float], faster: list[float]) -> float:
    """The median over the turns of the ratio within a turn, which drift affects less."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


Memory = dict[tuple[str, Recompute], dict[str, int]]


def summary(seconds: Seconds, memory: Memory, workload: Workload) -> dict[str, float]:
    """The ratios that answer the question; of times and speeds above 1 is better."""
    budget = workload.budget()
    figures = {
        "total_compression_ratio": budget.total_compression_ratio,
        "block_compression_ratio": budget.block_compression_ratio,
        "flop_bound_ratio": budget.flop_ratio,
    }
    for precision in ("fp32", "bf16"):
        dense, low_rank = (best(seconds, precision, name) for name in ("dense", "low_rank"))
        figures[f"tokens_per_s_ratio_{precision}"] = _ratio(dense, low_rank)
        if (precision, "transformers") in seconds:
            theirs = best(seconds, precision, "transformers")
            key = "dense_over_transformers_tokens_per_s_ratio"
            # The lower of the two: the claim holds in both precisions.
            figures[key] = min(_ratio(theirs, dense), figures.get(key, float("inf")))
    if memory:
        figures |= _memory_ratios(memory)
    return {key: round(value, 4) for key, value in figures.items()}


def _memory_ratios(memory: Memory) -> dict[str, float]:
    dense_none, low_none = (memory[name, Recompute.NONE] for name in ("dense", "low_rank"))
    dense_block, low_block = (memory[name, Recompute.BLOCK] for name in ("dense", "low_rank"))
    low_aware = memory["low_rank", Recompute.LOW_RANK]
    figures = {"state_memory_ratio": low_none["state"] / dense_none["state"]}
    for count in [key for key in ("peak_accounted", "peak_rss") if key in low_none]:
        suffix = "" if count == "peak_accounted" else "_rss"
        figures |= {
            f"peak_memory_ratio_same_recompute{suffix}": low_block[count] / dense_block[count],
            f"peak_memory_ratio_no_recompute{suffix}": low_none[count] / dense_none[count],
            f"peak_memory_ratio_low_rank_recompute_to_dense{suffix}": low_aware[count]
            / dense_none[count],
        }
    return figures


def _rows(seconds: Seconds, memory: Memory, workload: Workload) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for (precision, name), times in seconds.items():
        rows.append(
            {
                "contender": name,
                "precision": precision,
                "repeats": len(times),
                "step_time_s": _rounded(spread(times)),
                "tokens_per_s": _rounded(spread([workload.tokens_per_step / t for t in times])),
                "ratio_to_dense": round(_ratio(seconds[precision, "dense"], times), 4),
            }
        )
    for (name, recompute), held in memory.items():
        dense = memory["dense", Recompute.NONE]
        rows.append(
            {
                "contender": name,
                "precision": "fp32",
                "recompute": recompute.value,
                "repeats": 1,
                **{f"{key}_gib": round(value / GIB, 4) for key, value in held.items()},
                "ratio_to_dense": round(held["peak_accounted"] / dense["peak_accounted"], 4),
            }
        )
    return rows


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in figures.items()}


def table(rows: list[dict[str, Any]], figures: dict[str, float]) -> str:
    """Speed, memory and summary as Markdown tables."""
    speed = [
        [
            f"{row['contender']}, {row['precision']}",
            f"{row['step_time_s']['median']:.2f}",
            f"{row['step_time_s']['p10']:.2f}-{row['step_time_s']['p90']:.2f}",
            f"{row['tokens_per_s']['median']:,.0f}",
            f"{row['ratio_to_dense']:.2f}x",
        ]
        for row in rows
        if "step_time_s" in row
    ]
    held = [
        [
            f"{row['contender']}, recompute {row['recompute']}",
            f"{row['state_gib']:.2f}",
            f"{row['peak_accounted_gib']:.2f}",
            f"{row['ratio_to_dense']:.2f}x",
            f"{row['peak_rss_gib']:.2f}" if "peak_rss_gib" in row else "",
        ]
        for row in rows
        if "state_gib" in row
    ]
    tables = [markdown_table(["", "s a step", "p10-p90", "tokens/s", "speed to dense"], speed)]
    if held:
        header = ["fp32", "state (GiB)", "peak (GiB)", "peak to dense", "peak RSS (GiB)"]
        tables.append(markdown_table(header, held))
    tables.append(
        markdown_table(["", ""], [[key, f"{value:.2f}"] for key, value in figures.items()])
    )
    return "\n\n".join(tables)


if __name__ == "__main__":
    main()
