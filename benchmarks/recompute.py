"""When does it pay to recompute activations instead of keeping them?

Steps of dense and low-rank GPT-2 of several sizes, each way of recomputing in turns; memory in
processes of their own.
"""

import argparse
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.pretraining import RANKS
from benchmarks.record import markdown_table, new_record, spread, write_record
from benchmarks.training_step import (
    TrainingStep,
    Workload,
    interleaved,
    step_memory,
)
from fingpt_lightning.models import Recompute, recompute_blocks
from fingpt_lightning.profiling import keep_freed_memory
from fingpt_lightning.units import GIB

QUESTION = "How much memory does each way of recomputing save, and what time does it cost?"
CONTENDERS = ("dense", "low_rank")


def main() -> None:
    """Measures every size and way, writes record, table and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", choices=RANKS, default=["gpt2-nano", "gpt2-small"])
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--block_length", type=int, default=512)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--json", type=Path, required=True, help="record to write; .md and .svg beside it"
    )
    options = parser.parse_args()
    if options.device == "cpu":
        keep_freed_memory()
    config = {key: value for key, value in vars(options).items() if key != "json"}
    record = new_record(QUESTION, config | {"threads": torch.get_num_threads()})
    record["rows"] = [
        row for preset in options.presets for row in _measure(_workload(preset, options), options)
    ]
    record["summary"] = summary(record["rows"])
    write_record(options.json, record, table(record["rows"]))
    draw(record["rows"], options.json.with_suffix(".svg"))
    print(json.dumps(record["summary"], indent=1))


def _workload(preset: str, options: argparse.Namespace) -> Workload:
    work = Workload(
        preset, *RANKS[preset], options.batch_size, options.block_length, options.device,
        options.seed,
    )  # fmt: skip
    # The same tokens per step for every size, in blocks that fit.
    length = min(work.block_length, work.shape.num_positions)
    return replace(work, block_length=length, batch_size=work.tokens_per_step // length)


def _measure(work: Workload, options: argparse.Namespace) -> list[dict[str, Any]]:
    memory = {
        (contender, way): step_memory(contender, work, way, options.precision)
        for contender in CONTENDERS
        for way in Recompute
    }
    turns: dict[str, Callable[[], float]] = {}
    for contender in CONTENDERS:
        step = TrainingStep(contender, work)
        for way in Recompute:
            name = f"{work.preset} {contender} {way}"
            turns[name] = functools.partial(_timed, step, way, options.precision)
    seconds = interleaved(turns, options.repeats)
    rows = []
    dense_s = spread(seconds[f"{work.preset} dense none"])["median"]
    for (contender, way), held in memory.items():
        times = seconds[f"{work.preset} {contender} {way}"]
        own_s = spread(seconds[f"{work.preset} {contender} none"])["median"]
        own = memory[contender, Recompute.NONE]["peak_accounted"]
        dense = memory["dense", Recompute.NONE]["peak_accounted"]
        median_s = spread(times)["median"]
        ratios = {
            "peak_to_own_none": held["peak_accounted"] / own,
            "time_to_own_none": median_s / own_s,
            "peak_to_dense_none": held["peak_accounted"] / dense,
            "time_to_dense_none": median_s / dense_s,
        }
        rows.append(
            {
                "contender": contender,
                "preset": work.preset,
                "recompute": way.value,
                "repeats": len(times),
                "step_time_s": {key: round(value, 4) for key, value in spread(times).items()},
                "peak_gib": round(held["peak_accounted"] / GIB, 4),
                "state_gib": round(held["state"] / GIB, 4),
                "ratio_to_dense": {key: round(value, 4) for key, value in ratios.items()},
            }
        )
    return rows


def _timed(step: TrainingStep, way: Recompute, precision: str) -> float:
    recompute_blocks(step.network, way)
    return step(precision)


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """For each size the gain of the low-rank-aware way beside recomputing whole blocks."""
    figures = {}
    for row in rows:
        if row["contender"] == "low_rank" and row["recompute"] != Recompute.NONE:
            name = f"{row['preset']}_{row['recompute']}".replace("-", "_")
            ratios = row["ratio_to_dense"]
            figures[f"{name}_memory_ratio"] = ratios["peak_to_own_none"]
            figures[f"{name}_time_ratio"] = ratios["time_to_own_none"]
            figures[f"{name}_memory_ratio_to_dense_none"] = ratios["peak_to_dense_none"]
            figures[f"{name}_time_ratio_to_dense_none"] = ratios["time_to_dense_none"]
    return figures


def table(rows: list[dict[str, Any]]) -> str:
    """A row for each size, contender and way."""
    header = ["", "peak (GiB)", "of it state", "s a step", "peak to none", "time to none"]
    header += ["peak to dense", "time to dense"]
    lines = []
    for row in rows:
        ratios = row["ratio_to_dense"]
        lines.append(
            [
                f"{row['preset']}, {row['contender']}, {row['recompute']}",
                f"{row['peak_gib']:.2f}",
                f"{row['state_gib']:.2f}",
                f"{row['step_time_s']['median']:.2f}",
                *(f"{ratio:.2f}x" for ratio in ratios.values()),
            ]
        )
    return markdown_table(header, lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time over memory, both relative to the dense baseline that keeps everything."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    presets = list(dict.fromkeys(row["preset"] for row in rows))
    figure, axes = plt.subplots(
        1, len(presets), figsize=(4.2 * len(presets), 3.6), squeeze=False, layout="constrained"
    )
    colors = {"dense": "#777777", "low_rank": "#c2410c"}
    markers = {"none": "o", "block": "s", "low_rank": "D"}
    places: dict[str, Any] = {
        "none": {"xytext": (7, 4)},
        "block": {"xytext": (0, 8), "ha": "right"},
        "low_rank": {"xytext": (6, -13)},
    }
    for axis, preset in zip(axes[0], presets, strict=True):
        for contender, color in colors.items():
            ours = [r for r in rows if r["preset"] == preset and r["contender"] == contender]
            points = [
                (r["ratio_to_dense"]["peak_to_dense_none"],
                 r["ratio_to_dense"]["time_to_dense_none"], r["recompute"])
                for r in ours
            ]  # fmt: skip
            for x, y, way in points:
                axis.plot(x, y, markers[way], color=color, markersize=7)
                axis.annotate(
                    way, (x, y), textcoords="offset points", fontsize=8, color=color, **places[way]
                )
            name = contender.replace("_", " ")
            axis.plot([], [], "o", color=color, label=f"{name} network")
        axis.set_title(preset, fontsize=10)
        axis.set_xlabel("peak memory / dense, none")
        axis.set_xlim(0, 1.25)
        axis.set_ylim(0, 1.3)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("step time / dense, none")
    axes[0][0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
