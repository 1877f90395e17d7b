"""How fast does GPT-2 small write: with a cache beside without, low-rank beside dense?

Each contender continues prompts of random tokens, in turn with the others. Without a cache
the whole text is run again for each token; of these steps every STRIDE-th is run and counts for
all of its stride, since the cost grows evenly with the text.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from benchmarks.record import markdown_table, new_record, spread, write_record
from fingpt_lightning.low_rank import RankRule
from fingpt_lightning.models.decoding import decode
from fingpt_lightning.models.formats.quantized_folder import quantize_layers
from fingpt_lightning.models.from_scratch import build_network
from fingpt_lightning.models.key_value_cache import cache_bytes_per_token
from fingpt_lightning.models.shapes import GPT2_PRESETS, GPT2Shape

QUESTION = (
    "How much faster does GPT-2 small write with a cache of keys and values than without, and how"
    " much faster than its dense baseline does the low-rank one?"
)
NO_CACHE, DENSE, LOW_RANK = "dense, no cache", "dense", "low rank"
GROWING, TRANSFORMERS = "dense, growing cache", "dense, transformers' generate"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.bfloat16}
"""Types of the products; int8 has its blocks' weights in int8."""
_TOY = GPT2Shape(num_layers=2, width=64, num_heads=2, num_positions=64)


class Sizes(NamedTuple):
    """What is built and written."""

    shape: GPT2Shape
    vocab_size: int
    rank: int
    embedding_rank: int
    prompt_tokens: int
    new_tokens: int
    stride: int


def main() -> None:
    """Measures all contenders in turn, several times, and writes record and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stride", type=int, default=16, help="of the steps without a cache")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--with_transformers",
        action="store_true",
        help="also its generate, which takes a second a token in bf16 on some CPUs",
    )
    parser.add_argument("--toy", action="store_true", help="a tiny network and a few tokens")
    options = parser.parse_args()
    sizes = Sizes(GPT2_PRESETS["gpt2-small"], 50257, 224, 256, 32, 256, options.stride)
    if options.toy:
        sizes, options.repeats = Sizes(_TOY, 300, 16, 32, 4, 6, 2), 1
    settings = {
        "preset": "toy" if options.toy else "gpt2-small",
        **{name: value for name, value in sizes._asdict().items() if name != "shape"},
        "batch_sizes": options.batch_sizes,
        "repeats": options.repeats,
        "device": options.device,
        "seed": 1,
    }
    record = new_record(QUESTION, settings)
    record["rows"] = [
        row
        for dtype in options.dtypes
        for row in _measure(
            dtype,
            options.batch_sizes,
            sizes,
            options.repeats,
            options.device,
            options.with_transformers,
        )
    ]
    record["summary"] = summary(record["rows"])
    write_record(options.json, record, table(record["rows"]))
    print(json.dumps(record["summary"], indent=1))


def networks(dtype: str, sizes: Sizes, device: str = "cpu") -> dict[str, PreTrainedModel]:
    """The dense baseline and the low-rank network, freshly initialized, ready to write.

    Args:
        dtype: Type, one of `DTYPES`.
        sizes: Sizes of both.
        device: Device of both.
    """
    found: dict[str, PreTrainedModel] = {}
    for name, rank, embedding_rank in (
        (DENSE, None, None),
        (LOW_RANK, RankRule(sizes.rank), sizes.embedding_rank),
    ):
        network = build_network(sizes.shape, sizes.vocab_size, rank, embedding_rank, seed=1)
        network.requires_grad_(False).eval()
        nn.Module.to(network, DTYPES[dtype])
        network.config.use_cache = True
        if dtype == "int8":
            quantize_layers(network, "int8")
        found[name] = nn.Module.to(network, torch.device(device))
    return found


def contenders(
    built: Mapping[str, PreTrainedModel],
    dtype: str,
    sizes: Sizes,
    device: str,
    with_transformers: bool,
) -> dict[str, Callable[[Tensor], float]]:
    """By contender, the function that continues prompts and returns the seconds that it took."""
    dense, low_rank = built[DENSE], built[LOW_RANK]

    def timed(write: Callable[[Tensor], object]) -> Callable[[Tensor], float]:
        def run(ids_BT: Tensor) -> float:
            _wait(device)
            started_s = time.perf_counter()
            write(ids_BT)
            _wait(device)
            return time.perf_counter() - started_s

        return run

    def ours(network: PreTrainedModel, is_growing: bool = False) -> Callable[[Tensor], object]:
        def write(ids_BT: Tensor) -> object:
            cache = DynamicCache(config=network.config) if is_growing else None
            return decode(network, ids_BT.tolist(), sizes.new_tokens, cache=cache)

        return write

    generation = copy.deepcopy(dense.generation_config)
    generation.update(
        max_new_tokens=sizes.new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )

    def theirs(ids_BT: Tensor) -> object:
        mask_BT = torch.ones_like(ids_BT)
        generate: Any = dense.generate  # typed for other classes
        return generate(ids_BT, attention_mask=mask_BT, generation_config=generation)

    found = {DENSE: timed(ours(dense)), LOW_RANK: timed(ours(low_rank))}
    if dtype != "int8":
        found[GROWING] = timed(ours(dense, is_growing=True))
        if with_transformers:
            found[TRANSFORMERS] = timed(theirs)
        found[NO_CACHE] = lambda ids_BT: seconds_without_cache(dense, ids_BT, sizes)
    return found


@torch.no_grad()
def seconds_without_cache(network: PreTrainedModel, ids: Tensor, sizes: Sizes) -> float:
    """The time of all steps that run the whole text, from those in the middle of each stride."""
    seconds, device = 0.0, str(ids.device)
    for first in range(0, sizes.new_tokens, sizes.stride):
        steps = min(sizes.stride, sizes.new_tokens - first)
        length = ids.shape[1] + first + (steps - 1) // 2
        text_BT = ids.repeat(1, -(-length // ids.shape[1]))[:, :length]
        _wait(device)
        started_s = time.perf_counter()
        hidden_BTD = network.base_model(input_ids=text_BT, use_cache=False).last_hidden_state
        network.get_submodule("lm_head")(hidden_BTD[:, -1]).argmax(1).tolist()
        _wait(device)
        seconds += steps * (time.perf_counter() - started_s)
    return seconds


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _measure(
    dtype: str,
    batch_sizes: Sequence[int],
    sizes: Sizes,
    repeats: int,
    device: str,
    with_transformers: bool,
) -> list[dict[str, Any]]:
    built = networks(dtype, sizes, device)
    writers = contenders(built, dtype, sizes, device, with_transformers)
    bytes_per_token = cache_bytes_per_token(built[DENSE])
    stream = torch.Generator().manual_seed(1)
    rows = []
    for batch_size in batch_sizes:
        shape = (batch_size, sizes.prompt_tokens)
        ids_BT = torch.randint(sizes.vocab_size, shape, generator=stream).to(device)
        seconds: dict[str, list[float]] = {name: [] for name in writers}
        for repeat in range(repeats + 1):
            for name, write in writers.items():
                took_s = write(ids_BT)
                if repeat > 0:  # the first warms up
                    seconds[name].append(took_s)
        rows += _rows(dtype, batch_size, sizes, seconds, bytes_per_token)
    return rows


def _rows(
    dtype: str,
    batch_size: int,
    sizes: Sizes,
    seconds: Mapping[str, Sequence[float]],
    bytes_per_token: int,
) -> list[dict[str, Any]]:
    dense_s = spread(seconds[DENSE])["median"]
    return [
        {
            "contender": name,
            "dtype": dtype,
            "batch_size": batch_size,
            "repeats": len(own),
            "tokens_per_s": spread([batch_size * sizes.new_tokens / took_s for took_s in own]),
            "step_time_ms": spread([1000 * took_s / sizes.new_tokens for took_s in own]),
            "speedup_ratio_to_dense": dense_s / spread(own)["median"],
            "cache_bytes_per_token": None if name == NO_CACHE else bytes_per_token,
        }
        for name, own in seconds.items()
    ]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The ratios that answer the question, where they were measured.

    Those of the cache are of the dense network; that of low rank is the better of bf16 and int8,
    each beside the dense baseline in the same dtype, at batch size 1.
    """
    found: dict[str, float] = {}
    ratios = {
        (row["contender"], row["dtype"], row["batch_size"]): row["speedup_ratio_to_dense"]
        for row in rows
    }
    for (name, dtype, batch_size), ratio in ratios.items():
        if name == NO_CACHE:
            found[f"cache_speedup_ratio_{dtype}_batch{batch_size}"] = 1 / ratio
    low_rank = {
        dtype: ratio
        for (name, dtype, size), ratio in ratios.items()
        if (name, size) == (LOW_RANK, 1)
    }
    best = [low_rank[dtype] for dtype in ("bf16", "int8") if dtype in low_rank]
    if best:
        found["low_rank_speedup_ratio"] = max(best)
    found |= {f"low_rank_speedup_ratio_{dtype}": ratio for dtype, ratio in low_rank.items()}
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown table."""
    lines = [
        [
            f"{row['dtype']}, batch {row['batch_size']}: {row['contender']}",
            f"{row['tokens_per_s']['median']:.1f}",
            f"{row['tokens_per_s']['p10']:.1f} - {row['tokens_per_s']['p90']:.1f}",
            f"{row['step_time_ms']['median']:.1f}",
            f"{row['speedup_ratio_to_dense']:.2f}",
        ]
        for row in rows
    ]
    header = ["", "tokens/s", "p10 - p90", "ms a step", "speed over dense with cache"]
    return markdown_table(header, lines)


if __name__ == "__main__":
    main()
