"""How fast are a network's layers decomposed: in processes, in batches, by a random subspace?

Random weights of GPT-2's shapes, whose singular values fall, lie in files as a model's do. All
contenders read them and write factors; processes that are started are in their time.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.record import markdown_table, new_record, spread, write_record
from fingpt_lightning.decomposition.layer_files import (
    Batch,
    LayerWeight,
    SafetensorsReader,
    Work,
    decompose_batch,
    read_result,
)
from fingpt_lightning.decomposition.layer_pool import LayerPool
from fingpt_lightning.low_rank.decomposition import Method
from fingpt_lightning.low_rank.rank_allocation import ranks_at_ratio

QUESTION = (
    "How much faster are layers taken apart by two processes of one thread than by one, in batches"
    " than one by one, and by a random subspace than exactly, and at which error?"
)
TOY = {"num_layers": 1, "width": 24, "num_heads": 2, "num_positions": 8}
_RATIOS = (0.25, 0.125)


class Contender(NamedTuple):
    """One way to decompose all layers.

    Args:
        group: Name of a group on the same weights, whose first contender is its baseline.
        name: Name within the group.
        workers: Number of processes.
        is_batched: Whether layers of one shape go together.
        method: Method, exact or randomized.
        ratio: r / min(in, out).
    """

    group: str
    name: str
    workers: int = 1
    is_batched: bool = True
    method: Method = Method.EXACT
    ratio: float = 0.25


CONTENDERS = (
    Contender("processes", "1 process"),
    Contender("processes", "2 processes", workers=2),
    Contender("batches", "one by one", is_batched=False),
    Contender("batches", "in batches"),
    *(
        Contender(f"method, ratio {ratio}", method.value, method=method, ratio=ratio)
        for ratio in _RATIOS
        for method in Method
    ),
)


def main() -> None:
    """Times all contenders in turn, each with one thread per process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument("--processes_preset", default="gpt2-medium")
    parser.add_argument("--preset", default="gpt2-small", help="of the other contenders")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    record = new_record(QUESTION, settings)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for of_processes, preset in ((True, options.processes_preset), (False, options.preset)):
        wanted = [c for c in CONTENDERS if (c.group == "processes") == of_processes]
        with tempfile.TemporaryDirectory() as folder:
            rows += race(wanted, preset, Path(folder), options.repeats, options.seed)
    record |= {"rows": rows, "summary": summary(rows)}
    write_record(options.json, record, table(rows))
    print(json.dumps(record["summary"], indent=1))


def layer_sizes(preset: str) -> dict[str, tuple[int, int]]:
    """In and out features of a GPT-2's linear layers, by name; ``toy`` is a size of its own."""
    # Here: the processes that are started import this file too, and need no transformers.
    from fingpt_lightning.models.from_scratch import block_layers
    from fingpt_lightning.models.shapes import PRESETS, GPT2Shape

    return block_layers(GPT2Shape(**TOY) if preset == "toy" else PRESETS[preset])


def write_weights(
    sizes: Mapping[str, tuple[int, int]], folder: Path, seed: int
) -> tuple[list[LayerWeight], SafetensorsReader]:
    """Writes a file per block, each weight with a row per input as in GPT-2.

    Args:
        sizes: Sizes of the layers, by name.
        folder: Folder, which exists already.
        seed: Seed of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: list[LayerWeight] = []
    files: dict[str, Path] = {}
    held: dict[str, Tensor] = {}
    for name, (in_features, out_features) in sizes.items():
        smaller = min(in_features, out_features)
        weight = torch.randn(in_features, out_features, generator=generator)
        fall = torch.linspace(1, 0.1, smaller)
        weight = weight * (fall[:, None] if in_features == smaller else fall)
        layers.append(LayerWeight(name, name, in_features, out_features, is_transposed=True))
        held[name] = weight
        if len(held) == 4:
            file = folder / f"{len(files)}.safetensors"
            save_file(held, file)
            files |= dict.fromkeys(held, file)
            held = {}
    return layers, SafetensorsReader(files)


def race(
    contenders: Sequence[Contender], preset: str, folder: Path, repeats: int, seed: int
) -> list[dict[str, Any]]:
    """Times some contenders on the same weights, in turn."""
    sizes = layer_sizes(preset)
    layers, reader = write_weights(sizes, folder, seed)
    seconds: dict[Contender, list[float]] = {contender: [] for contender in contenders}
    errors: dict[Contender, float] = {}
    for turn in range(repeats + 1):
        for contender in contenders:
            made = folder / "made"
            ranks = ranks_at_ratio(sizes, contender.ratio)
            work = Work(reader, made, ranks, method=contender.method)
            started_s = time.perf_counter()
            if contender.is_batched:
                pool = LayerPool(contender.workers, ["cpu"])
                pool.run(decompose_batch, [(work, layer) for layer in layers], contender.name)
            else:
                for layer in layers:
                    decompose_batch(work, Batch((layer,)))
            if turn:  # the first warms caches up
                seconds[contender].append(time.perf_counter() - started_s)
            results = [read_result(made, layer.name) for layer in layers]
            squares = [x.weight_error**2 for x in results if x is not None]
            errors[contender] = (sum(squares) / len(squares)) ** 0.5
            shutil.rmtree(made)
    rows = []
    for contender, own in seconds.items():
        first = next(other for other in contenders if other.group == contender.group)
        rows.append(
            {
                "contender": contender.name,
                "group": contender.group,
                "preset": preset,
                "layers": len(layers),
                "repeats": len(own),
                "time_s": spread(own),
                "speedup_ratio": spread(seconds[first])["median"] / spread(own)["median"],
                "relative_weight_error": errors[contender],
                "error_ratio": errors[contender] / errors[first],
            }
        )
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The ratios that answer the question."""
    by_name = {(row["group"], row["contender"]): row for row in rows}
    found = {
        "workers_speedup_ratio": by_name["processes", "2 processes"]["speedup_ratio"],
        "batched_speedup_ratio": by_name["batches", "in batches"]["speedup_ratio"],
    }
    for ratio in _RATIOS:
        row = by_name[f"method, ratio {ratio}", Method.RANDOMIZED.value]
        found[f"randomized_speedup_ratio_rank_ratio_{ratio}"] = row["speedup_ratio"]
        found[f"randomized_error_ratio_rank_ratio_{ratio}"] = row["error_ratio"]
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown table."""
    lines = [
        [
            f"{row['preset']}, {row['group']}: {row['contender']}",
            f"{row['time_s']['median']:.2f}",
            f"{row['time_s']['p10']:.2f} - {row['time_s']['p90']:.2f}",
            f"{row['speedup_ratio']:.2f}",
            f"{row['relative_weight_error']:.4f}",
            f"{row['error_ratio']:.4f}",
        ]
        for row in rows
    ]
    header = ["", "s", "p10 - p90", "speed-up", "relative error of the weights", "over the first"]
    return markdown_table(header, lines)


if __name__ == "__main__":
    main()
