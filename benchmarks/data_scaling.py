"""Do speed and memory of reading text stay as they are when the corpus grows tenfold?

Writes synthetic news as ``.jsonl`` of one, three and ten sizes, and for each, in a process of its
own, tokenizes it and reads its blocks.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from benchmarks.record import markdown_table, new_record, spread, write_record
from fingpt_lightning.data.blocks import BlockSampler, ResumableDataLoader, TokenBlocks
from fingpt_lightning.data.corpus import SyntheticCorpus
from fingpt_lightning.data.synthetic_news import synthetic_news
from fingpt_lightning.data.text_files import TextFiles
from fingpt_lightning.data.token_cache import build_token_file
from fingpt_lightning.data.tokenizers import load_tokenizer, train_cached_tokenizer
from fingpt_lightning.data.tokenizing import encoded_batches, num_available_cores
from fingpt_lightning.profiling import peak_rss_bytes, reset_peak_rss
from fingpt_lightning.units import MIB

QUESTION = (
    "Do tokens per second and memory of tokenising and of loading stay as they are when the corpus"
    " grows tenfold, and what does a second tokenising thread bring?"
)
BASELINE = "1x"
# Contender: size of the corpus, threads that tokenize.
CONTENDERS: dict[str, tuple[int, int]] = {
    BASELINE: (1, 2),
    "3x": (3, 2),
    "10x": (10, 2),
    "1x, one thread": (1, 1),
}
_QUANTITIES = (
    "tokenise_tokens_per_s",
    "tokenise_peak_rss_mib",
    "loader_tokens_per_s",
    "loader_peak_private_mib",
)
_VOCAB_SIZE = 4096
_TRAINING_ITEMS = 4000
_BLOCK_LENGTH = 512
_BATCH_SIZE = 8
_SEED = 1


def main() -> None:
    """Measures all contenders in turn, several times, and writes record and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument("--size_mb", type=float, default=10.0, help="text of the smallest corpus")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loader_batches", type=int, default=2000, help="read at least")
    parser.add_argument("--toy", action="store_true", help="0.1 MB, once")
    options = parser.parse_args()
    if options.toy:
        options.size_mb, options.repeats, options.loader_batches = 0.1, 1, 20
    settings = {
        "size_mb": options.size_mb,
        "repeats": options.repeats,
        "loader_batches": options.loader_batches,
        "available_cores": num_available_cores(),
        "vocab_size": _VOCAB_SIZE,
        "block_length": _BLOCK_LENGTH,
        "batch_size": _BATCH_SIZE,
        "seed": _SEED,
    }
    record = new_record(QUESTION, settings)
    with tempfile.TemporaryDirectory() as folder:
        runs = _run_all(Path(folder), options)
    record["rows"] = rows(runs)
    record["summary"] = summary(record["rows"])
    write_record(options.json, record, table(record["rows"]))
    print(json.dumps(record["summary"], indent=1))


def _run_all(folder: Path, options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    texts = {size: folder / f"{size}x.jsonl" for size in {size for size, _ in CONTENDERS.values()}}
    write_news(texts, options.size_mb * 1e6)
    corpus = SyntheticCorpus(_TRAINING_ITEMS, _SEED)
    tokenizer = train_cached_tokenizer(corpus, _VOCAB_SIZE, folder).name_or_path
    runs: dict[str, list[dict[str, float]]] = {contender: [] for contender in CONTENDERS}
    # A server that has imported everything forks one fresh process per measurement.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fingpt_lightning.data"])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for _ in range(options.repeats):
            for contender, (size, num_threads) in CONTENDERS.items():
                run = pool.submit(
                    measure, texts[size], tokenizer, num_threads, options.loader_batches
                )
                runs[contender].append(run.result())
    return runs


def write_news(paths: dict[int, Path], size_bytes: float) -> None:
    """Writes ``size`` times ``size_bytes`` of text to each path; each text begins the larger ones.

    Args:
        paths: Paths by size.
        size_bytes: Bytes of the corpus of size 1.
    """
    files = {size: path.open("w") for size, path in paths.items()}
    num_bytes = 0
    for item in synthetic_news(sys.maxsize, _SEED):
        line = json.dumps({"text": item.text}) + "\n"
        for size in [size for size in files if num_bytes >= size * size_bytes]:
            files.pop(size).close()
        if not files:
            return
        for file in files.values():
            file.write(line)
        num_bytes += len(line)


def measure(
    text: Path, tokenizer_path: str, num_threads: int, num_batches: int
) -> dict[str, float]:
    """Tokenizes a file and reads its blocks, in this process.

    Args:
        text: Path of a ``.jsonl`` file.
        tokenizer_path: Folder of the tokenizer.
        num_threads: Number of threads that tokenize.
        num_batches: Least number of batches that are read, and at least one epoch.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    for _ in encoded_batches(SyntheticCorpus(_TRAINING_ITEMS, _SEED), tokenizer, "uint16"):
        pass  # warm-up: the tokenizer remembers the words that it has seen
    with tempfile.TemporaryDirectory() as folder:
        reset_peak_rss()
        started_s = time.perf_counter()
        built = build_token_file(TextFiles((text,)), tokenizer, Path(folder), num_threads)
        tokenise_s = time.perf_counter() - started_s
        peak_rss_mib = peak_rss_bytes() / MIB
        blocks = TokenBlocks(built.open(), _BLOCK_LENGTH, int(tokenizer.eos_token_id))
        sampler = BlockSampler(blocks, _BATCH_SIZE, training=True, seed=_SEED)
        loader = ResumableDataLoader(blocks, _BATCH_SIZE, sampler=sampler, drop_last=True)
        num_read = num_tokens = 0
        private_bytes = [_private_bytes()]
        started_s = time.perf_counter()
        while num_read < max(num_batches, 1):
            for batch in loader:
                num_read += 1
                num_tokens += batch["input_ids"].numel()
                if num_read % 200 == 0:
                    private_bytes.append(_private_bytes())
            sampler.set_epoch(sampler.epoch + 1)
        loader_s = time.perf_counter() - started_s
    return {
        "num_tokens": float(built.num_tokens),
        "tokenise_tokens_per_s": built.num_tokens / tokenise_s,
        "tokenise_peak_rss_mib": peak_rss_mib,
        "loader_tokens_per_s": num_tokens / loader_s,
        "loader_peak_private_mib": max(private_bytes) / MIB,
    }


def _private_bytes() -> int:
    """Physical memory without the pages of mapped files, which the kernel can take back."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def rows(runs: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """One row per contender: the spread of each quantity and its ratio to the baseline."""
    spreads = {
        contender: {name: spread([run[name] for run in measured]) for name in _QUANTITIES}
        for contender, measured in runs.items()
    }
    baseline = spreads[BASELINE]
    return [
        {
            "contender": contender,
            "repeats": len(runs[contender]),
            "num_tokens": runs[contender][0]["num_tokens"],
            **quantities,
            "ratio_to_1x": {
                name: value["median"] / baseline[name]["median"]
                for name, value in quantities.items()
            },
        }
        for contender, quantities in spreads.items()
    ]


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The few ratios that answer the question; memory is the larger ratio of both parts."""
    by_name = {row["contender"]: row for row in rows}
    ratios = by_name["10x"]["ratio_to_1x"]
    alone = by_name["1x, one thread"]["ratio_to_1x"]["tokenise_tokens_per_s"]
    return {
        "tokenise_tokens_per_s_ratio_10x_to_1x": ratios["tokenise_tokens_per_s"],
        "loader_tokens_per_s_ratio_10x_to_1x": ratios["loader_tokens_per_s"],
        "peak_rss_ratio_10x_to_1x": max(
            ratios["tokenise_peak_rss_mib"], ratios["loader_peak_private_mib"]
        ),
        "tokenise_workers_speedup_ratio": 1 / alone,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table: medians, and the ratio of each to the smallest corpus."""
    header = [
        "",
        "tokens (M)",
        "tokenise: tokens/s",
        "tokenise: peak RSS (MiB)",
        "load: tokens/s",
        "load: peak private memory (MiB)",
    ]
    lines = [
        [
            row["contender"],
            f"{row['num_tokens'] / 1e6:.2f}",
            *(
                f"{row[name]['median']:,.0f} ({row['ratio_to_1x'][name]:.2f})"
                for name in _QUANTITIES
            ),
        ]
        for row in rows
    ]
    note = (
        "\n\nMedians; in brackets the ratio to 1x. Two threads tokenise, but in the last row."
        " Private memory leaves out the pages of the memory-mapped tokens, which the kernel takes"
        " back when it needs them."
    )
    return markdown_table(header, lines) + note


if __name__ == "__main__":
    main()
