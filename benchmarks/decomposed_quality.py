"""What does decomposing a pretrained model cost in perplexity, and what recovers it?

Each model is decomposed to a share of its parameters: plain, on calibration text, in sequence, and
with brief training after it. The record is written after every row, and a row in it is not made
again.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.record import (
    markdown_table,
    new_record,
    started_record,
    write_record,
)
from benchmarks.text_loss import text_loss
from fingpt_lightning.data import TextBlocks
from fingpt_lightning.data.calibration_text import Calibration, text_calibration
from fingpt_lightning.data.text_files import TextFiles, find_text_files
from fingpt_lightning.decomposition.runner import Request, decompose_model
from fingpt_lightning.decomposition.source import open_source
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.modules import LowRankPretraining
from fingpt_lightning.profiling import keep_freed_memory

QUESTION = (
    "What perplexity has a model that was decomposed to a share of its parameters: by plain"
    " singular values, by its outputs on calibration text, and after brief training on?"
)
TEXTS = {
    "wikitext2": "wikitext2/validation.txt",
    "fed_text": "fed_text/validation.jsonl",
}
TRAINING = "fed_text/train.jsonl"
OTHER = "wikitext2/test.txt"
ORIGINAL = "original"
BOTH = "both texts, in sequence"
TRAINED = f"{BOTH}, trained on"


class Way(NamedTuple):
    """How ranks are found, the texts whose outputs count, in equal parts, and other settings."""

    allocation: str
    texts: tuple[str, ...] = ()
    sequential: bool = False
    damping: float = 0.0


WAYS = {
    "plain": Way("uniform"),
    "calibrated, one ratio": Way("uniform", (TRAINING,)),
    "calibrated": Way("spectrum", (TRAINING,)),
    "one ratio, damping 0.1": Way("uniform", (TRAINING,), damping=0.1),
    "in sequence, one ratio": Way("uniform", (TRAINING,), sequential=True, damping=0.01),
    "in sequence": Way("spectrum", (TRAINING,), sequential=True, damping=0.01),
    "both texts, one ratio": Way("uniform", (TRAINING, OTHER)),
    BOTH: Way("uniform", (TRAINING, OTHER), sequential=True, damping=0.01),
}


def main() -> None:
    """Makes the rows that the record does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--json", type=Path, required=True, help="record to write; .md beside")
    add("--model", default="models/smollm2-135m")
    add("--data_dir", type=Path, required=True, help="with wikitext2/ and fed_text/")
    add("--work_dir", type=Path, required=True, help="for the decomposed models")
    add("--shares", default="0.8,0.6", help="parameters kept, of all, with commas")
    add("--tokens", type=int, default=16384, help="of each text whose perplexity is asked")
    add("--block_length", type=int, default=512)
    add("--calibration_tokens", type=int, default=16384)
    add("--steps", type=int, default=150, help="of the training")
    add("--batch_size", type=int, default=4)
    add("--learning_rate", type=float, default=0.0003)
    add("--precision", default="bf16-mixed", help="of the training")
    add("--dtype", default="bfloat16", help="in which perplexity is measured")
    add("--max_rows", type=int, default=10**9, help="rows that this call makes at most")
    options = parser.parse_args()
    keep_freed_memory()
    asides = ("json", "work_dir", "data_dir", "max_rows")
    settings = {key: value for key, value in vars(options).items() if key not in asides}
    record = started_record(options.json, QUESTION, settings, rows=[])
    made = 0
    for share, contender in contenders(options.shares):
        if any((r["contender"], r["share"]) == (contender, share) for r in record["rows"]):
            continue
        if made >= options.max_rows:
            break
        row = measure(share, contender, options)
        record["rows"].append(row | {"commit": new_record("", {})["commit"]})
        record["summary"] = summary(record["rows"])
        write_record(options.json, record, table(record["rows"]))
        made += 1
    print(table(record["rows"]))


def contenders(shares: str) -> Iterator[tuple[float, str]]:
    """Share of the parameters and treatment of each row, in the order of the record."""
    yield 1.0, ORIGINAL
    for text in shares.split(","):
        for name in (*WAYS, TRAINED):
            yield float(text), name


def measure(share: float, contender: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row: the model is made, unless it exists, and its perplexity measured."""
    row: dict[str, Any] = {"contender": contender, "share": share}
    if contender == ORIGINAL:
        network = load_model(options.model, dtype=options.dtype).network
        row["parameters"] = sum(p.numel() for p in network.parameters())
    elif contender == TRAINED:
        folder = decomposed(share, BOTH, options)
        network, figures = trained(folder, options)
        row |= figures | {"parameters": sum(p.numel() for p in network.parameters())}
        network = network.to(getattr(torch, options.dtype))
    else:
        started_s = time.perf_counter()
        folder = decomposed(share, contender, options)
        row["decomposition_time_s"] = time.perf_counter() - started_s
        record = json.loads((folder / "decomposition.json").read_text())
        row["parameters"] = record["parameters"]
        network = load_model(folder, dtype=options.dtype).network
    source = open_source(options.model)
    tokenizer, config = source.tokenizer, source.network.config
    for name, file in TEXTS.items():
        text = TextFiles(find_text_files(str(options.data_dir / file)))
        found = text_calibration(text, tokenizer, config, options.tokens, options.block_length)
        row[f"{name}_perplexity"] = perplexity(network, found.ids)
        row[f"{name}_tokens"] = found.ids.numel()
    return row


def decomposed(share: float, contender: str, options: argparse.Namespace) -> Path:
    """The folder of a decomposed model, made where it does not exist."""
    way = WAYS[contender]
    name = f"{contender.replace(', ', '_').replace(' ', '_')}-{share:g}"
    folder: Path = options.work_dir / name
    if not folder.exists():
        source = open_source(options.model)
        calibration = None
        if way.texts:
            tokenizer, config = source.tokenizer, source.network.config
            number = options.calibration_tokens // len(way.texts)
            parts = [
                text_calibration(
                    TextFiles(find_text_files(str(options.data_dir / text))), tokenizer, config,
                    number, options.block_length,
                )
                for text in way.texts
            ]  # fmt: skip
            calibration = Calibration(
                torch.cat([part.ids for part in parts]), "; ".join(part.name for part in parts)
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        damping = way.damping if way.texts else None
        request = Request(
            compression=1 / share,
            allocation=way.allocation,
            damping=damping,
            sequential=way.sequential,
        )
        decompose_model(source, request, folder, calibration)
    return folder


def trained(
    folder: Path, options: argparse.Namespace
) -> tuple[PreTrainedModel, dict[str, float | int]]:
    """The network after brief training on text, and the cost of that."""
    seed_everything(1, verbose=False)
    module = LowRankPretraining(
        init_from=str(folder), learning_rate=options.learning_rate, warmup=0.1, weight_decay=0.01
    )
    data = TextBlocks(
        train_files=str(options.data_dir / TRAINING),
        val_files=str(options.data_dir / TEXTS["fed_text"]),
        tokenizer=str(folder),
        block_length=options.block_length,
        batch_size=options.batch_size,
        cache_dir=str(options.work_dir / "cache"),
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        precision=options.precision,
        max_steps=options.steps,
        max_epochs=-1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=options.work_dir,
    )
    started_s = time.perf_counter()
    trainer.fit(module, data)
    figures = {
        "training_steps": trainer.global_step,
        "training_tokens": module.tokens_seen,
        "training_time_s": time.perf_counter() - started_s,
    }
    module.network.eval()
    return module.network, figures


def perplexity(network: PreTrainedModel, ids: Tensor) -> float:
    """Exp of the mean loss of each token but the first of each row."""
    loss, _ = text_loss(network, ((rows[:, :-1], rows[:, 1:]) for rows in ids.split(4)))
    return math.exp(loss)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Perplexity over that of the original, by text, share and contender."""
    original = next(row for row in rows if row["contender"] == ORIGINAL)
    found = {}
    for row in rows:
        if row is original:
            continue
        name = row["contender"].replace(", ", "_").replace(" ", "_")
        for text in TEXTS:
            key = f"{text}_perplexity"
            found[f"{key}_ratio_{row['share']:g}_{name}"] = row[key] / original[key]
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown table."""
    original = rows[0]
    lines = []
    for row in rows:
        cells = [
            row["contender"],
            f"{row['parameters'] / 1e6:.1f}",
            f"{row['parameters'] / original['parameters']:.3f}",
        ]
        for text in TEXTS:
            value = row[f"{text}_perplexity"]
            cells += [f"{value:,.2f}", f"{value / original[f'{text}_perplexity']:.2f}"]
        cells.append(f"{row['training_tokens']:,}" if "training_tokens" in row else "-")
        lines.append(cells)
    header = ["", "parameters (M)", "of all"]
    for text in TEXTS:
        header += [f"perplexity, {text}", "over original"]
    return markdown_table([*header, "tokens trained on"], lines)


if __name__ == "__main__":
    main()
