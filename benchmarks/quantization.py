"""What do 8 and 4 bits cost a trained low-rank GPT-2, and how small are its files?

Trains a small low-rank network, with and without the end in rounded weights, exports it as int8 and
NF4 folders and compares their validation loss with that of float32; writes GPT-2 small and XL with
random weights to files; times forward passes. The record is written after each part, and a part
that it holds is not repeated.
"""

import argparse
import itertools
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from transformers import PreTrainedModel

from benchmarks.record import (
    markdown_table,
    spread,
    started_record,
    write_record,
)
from benchmarks.text_loss import text_loss
from callbacks.checkpoints import LastCheckpoint
from fingpt_lightning.data import TextBlocks
from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.low_rank import RankRule
from fingpt_lightning.models import lay_out_network
from fingpt_lightning.models.formats.hf_folder import (
    SAFETENSORS,
    write_network,
    write_quantized,
)
from fingpt_lightning.models.formats.quantized_folder import quantize_layers
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.models.quantization.fake_quantization import RoundedWeights
from fingpt_lightning.models.shapes import GPT2_PRESETS, GPT2Shape
from fingpt_lightning.models.tied_head import tie_head
from fingpt_lightning.modules import LowRankPretraining
from fingpt_lightning.profiling import keep_freed_memory

QUESTION = (
    "How much validation loss do int8 and NF4 cost a trained low-rank GPT-2, how many times smaller"
    " than float32 are its files, and how fast is it?"
)
FORMS = ("int8", "nf4")
AWARE_SHARE = 0.8
"""Share of the steps after which one of two runs continues with rounded weights."""
STORED_DTYPE = "float16"
"""Type of what is not quantized, in the files of 8 and 4 bits."""


class Sizes(NamedTuple):
    """The settings of what is trained and written.

    Args:
        training: Settings of the trained network.
        data: Settings of its text.
        num_steps: Number of steps of each run.
        num_val_batches: Number of batches for the validation losses.
        files: Shape, vocabulary, rank and embedding rank of each network that is written.
        speed: Shape, vocabulary and ranks of the network that is timed.
        speed_tokens: Tokens of a timed forward pass.
    """

    training: dict[str, Any]
    data: dict[str, Any]
    num_steps: int
    num_val_batches: int
    files: dict[str, tuple[GPT2Shape, int, int, int | None]]
    speed: tuple[GPT2Shape, int, int, int | None]
    speed_tokens: int


_SMALL = (GPT2_PRESETS["gpt2-small"], 50257, 224, 256)
REAL = Sizes(
    training={
        "preset": "gpt2-nano", "num_layers": 6, "rank": 64, "embedding_rank": 128,
        "learning_rate": 0.003, "warmup": 0.1,
    },
    data={"vocab_size": 8192, "block_length": 128, "batch_size": 16},
    num_steps=1200,
    num_val_batches=40,
    files={"gpt2_small": _SMALL, "gpt2_xl": (GPT2_PRESETS["gpt2-xl"], 50257, 400, None)},
    speed=_SMALL,
    speed_tokens=256,
)  # fmt: skip
_TINY = (GPT2Shape(num_layers=1, width=64, num_heads=2, num_positions=32), 300, 24, 16)
TOY = Sizes(
    training={
        "preset": "gpt2-nano", "num_layers": 1, "width": 32, "num_heads": 2, "rank": 8,
        "embedding_rank": 8, "learning_rate": 0.002, "warmup": 1,
    },
    data={"vocab_size": 300, "block_length": 16, "batch_size": 4, "num_synthetic_items": 60,
          "val_share": 0.2},
    num_steps=5,
    num_val_batches=2,
    files={"gpt2_small": _TINY, "gpt2_xl": (*_TINY[:3], None)},
    speed=_TINY,
    speed_tokens=8,
)  # fmt: skip


def main() -> None:
    """Runs the parts that the record does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument(
        "--data_dir", type=Path, help="folder with fed_text/; none trains on synthetic news"
    )
    parser.add_argument("--work_dir", type=Path, default=Path("runs/quantization"))
    parser.add_argument("--steps", type=int, help="of each training run")
    parser.add_argument("--repeats", type=int, default=5, help="of timed passes")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, few steps")
    options = parser.parse_args()
    keep_freed_memory()
    sizes = TOY if options.toy else REAL
    if options.steps:
        sizes = sizes._replace(num_steps=options.steps)
    record = _started(options.json, options, sizes)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        f"files {name}": partial(file_rows, name, *size) for name, size in sizes.files.items()
    }
    parts["loss"] = lambda: loss_rows(options.work_dir, options.data_dir, sizes)
    parts["speed"] = lambda: speed_rows(sizes, options.repeats)
    for part, measure in parts.items():
        if any(row["part"] == part for row in record["rows"]):
            continue
        record["rows"] += [{"part": part, **row} for row in measure()]
        record["summary"] = summary(record["rows"])
        write_record(options.json, record, table(record["rows"]))
    print(json.dumps(record["summary"], indent=1))


def _started(file: Path, options: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    config = {
        "training": sizes.training,
        "data": sizes.data | {"corpus": "fed_text" if options.data_dir else "synthetic news"},
        "num_steps": sizes.num_steps,
        "aware_share": AWARE_SHARE,
        "num_val_batches": sizes.num_val_batches,
        "stored_dtype": STORED_DTYPE,
        "repeats": options.repeats,
        "seed": 1,
    }
    return started_record(file, QUESTION, config, rows=[])


def file_rows(
    name: str, shape: GPT2Shape, vocab_size: int, rank: int, embedding_rank: int | None
) -> list[dict[str, Any]]:
    """The sizes of one network's files in float32, int8 and NF4, from files that are written.

    Args:
        name: Name of the network.
        shape: Sizes of the network.
        vocab_size: Number of tokens.
        rank: Rank of its low-rank layers.
        embedding_rank: Rank of its embedding; None is a full table.
    """
    rows: list[dict[str, Any]] = []
    for form in ("float32", *FORMS):
        network = random_network(shape, vocab_size, rank, embedding_rank)
        num_parameters = sum(parameter.numel() for parameter in network.parameters())
        folder = Path(tempfile.mkdtemp(prefix="quantization."))
        try:
            if form == "float32":
                write_network(network, folder, torch.float32)
            else:
                dtype = getattr(torch, STORED_DTYPE)
                write_quantized(network, folder, dtype, form, embeddings=True)
            num_bytes = (folder / SAFETENSORS).stat().st_size
        finally:
            shutil.rmtree(folder)
        rows.append(
            {"contender": f"{name}, {form}", "parameters": num_parameters, "file_bytes": num_bytes}
        )
    for row in rows:
        row["file_ratio_to_float32"] = rows[0]["file_bytes"] / row["file_bytes"]
    return rows


def random_network(
    shape: GPT2Shape, vocab_size: int, rank: int, embedding_rank: int | None
) -> PreTrainedModel:
    """A low-rank GPT-2 of random numbers, made without decomposing anything."""
    network = lay_out_network(shape, vocab_size, RankRule(rank), embedding_rank)
    network.to_empty(device="cpu")
    tie_head(network)
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.02, generator=stream)
    network.requires_grad_(False).eval()
    return network


def loss_rows(work_dir: Path, data_dir: Path | None, sizes: Sizes) -> list[dict[str, Any]]:
    """Validation losses of a trained network and of its exports.

    Args:
        work_dir: Folder of checkpoints and exports; a stopped run in it is resumed.
        data_dir: Folder with the text.
        sizes: Settings of network, text and runs.
    """
    text: dict[str, Any] = {}
    if data_dir is not None:
        folder = data_dir / "fed_text"
        text = {
            f"{split}_files": str(folder / f"{name}.jsonl")
            for split, name in (("train", "train"), ("val", "validation"))
        }
    data = TextBlocks(**sizes.data, **text, cache_dir=str(work_dir / "cache"))
    plain = _trained(work_dir / "plain", data, sizes, None)
    aware = _trained(work_dir / "aware", data, sizes, "nf4", work_dir / "plain" / "branch.ckpt")
    rows: list[dict[str, Any]] = []
    for run, checkpoint in (("plain", plain), ("nf4-aware", aware)):
        for form in ("float32", *FORMS):
            if (run, form) == ("nf4-aware", "int8"):
                continue
            path = checkpoint
            if form != "float32":
                path = work_dir / f"{run}-{form}"
                shutil.rmtree(path, ignore_errors=True)
                source = load_model(checkpoint)
                export(source, form, path, STORED_DTYPE, tolerance=2.0)
            network = load_model(path).network
            loss, num_tokens = validation_loss(network, data, sizes.num_val_batches)
            rows.append(
                {
                    "contender": f"{run}, {form}",
                    "val_loss_nats": loss,
                    "val_tokens": num_tokens,
                    "loss_gap_nats": loss - rows[0]["val_loss_nats"] if rows else 0.0,
                }
            )
    return rows


def _trained(
    folder: Path,
    data: TextBlocks,
    sizes: Sizes,
    aware: Literal["nf4"] | None,
    start: Path | None = None,
) -> Path:
    """The last checkpoint of a run, which is begun, resumed, or finished already."""
    last = folder / "last.ckpt"
    done = folder / "done"
    if done.exists():
        return last
    seed_everything(1, verbose=False)
    module = LowRankPretraining(**sizes.training, quantization_aware=aware)
    branch = round(AWARE_SHARE * sizes.num_steps)
    checkpoints = [
        LastCheckpoint(min(100, sizes.num_steps), str(folder)),
        ModelCheckpoint(folder, "branch", every_n_train_steps=branch, enable_version_counter=False),
    ]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=sizes.num_steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=list(checkpoints),
        default_root_dir=folder,
    )
    with warnings.catch_warnings():
        # The second run begins in the middle of the first.
        warnings.filterwarnings("ignore", "The dirpath has changed")
        trainer.fit(module, data, ckpt_path=last if last.exists() else start, weights_only=True)
    done.touch()
    return last


def validation_loss(
    network: PreTrainedModel, data: TextBlocks, num_batches: int
) -> tuple[float, int]:
    """Nats per token, and over how many tokens.

    Args:
        network: Network in evaluation mode.
        data: Data module after its ``setup``.
        num_batches: Number of batches of the validation text, from its start.
    """
    data.prepare_data()
    data.setup()
    batches = itertools.islice(data.val_dataloader(), num_batches)
    return text_loss(network, ((batch["input_ids"], batch["labels"]) for batch in batches))


def speed_rows(sizes: Sizes, repeats: int) -> list[dict[str, Any]]:
    """Tokens per second of forward passes, all contenders in turn.

    Args:
        sizes: Settings with the network and the length of a text.
        repeats: Number of timed passes of each, after one that is not.
    """
    shape, vocab_size, rank, embedding_rank = sizes.speed
    networks: dict[str, PreTrainedModel] = {}
    for name in ("float32", "bfloat16", *FORMS):
        network = random_network(shape, vocab_size, rank, embedding_rank)
        if name in FORMS:
            quantize_layers(network, name, embeddings=True)
        elif name == "bfloat16":
            nn.Module.to(network, torch.bfloat16)
        networks[name] = network
    rows = []
    for what, num_tokens in (("text", sizes.speed_tokens), ("one token", 1)):
        ids = torch.randint(vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(1))
        times_s: dict[str, list[float]] = {name: [] for name in networks}
        for repeat in range(repeats + 1):
            for name, network in networks.items():
                started_s = time.perf_counter()
                with torch.no_grad():
                    network(input_ids=ids, use_cache=False)
                if repeat:
                    times_s[name].append(time.perf_counter() - started_s)
        base_s = spread(times_s["float32"])["median"]
        rows += [
            {
                "contender": f"{what}, {name}",
                "repeats": repeats,
                "forward_tokens_per_s": spread([num_tokens / seconds for seconds in measured]),
                "speed_ratio_to_float32": base_s / spread(measured)["median"],
            }
            for name, measured in times_s.items()
        ]
    for form in FORMS:
        rows.append(
            {
                "contender": f"rounding all weights, {form}",
                "repeats": repeats,
                "rounding_time_s": _rounding_time_s(networks["float32"], form, repeats),
            }
        )
    return rows


def _rounding_time_s(network: PreTrainedModel, form: str, repeats: int) -> dict[str, float]:
    """The cost of training with rounded weights, beside each step."""
    weights = RoundedWeights(network, form)
    times_s = []
    for repeat in range(repeats + 1):
        started_s = time.perf_counter()
        weights.apply()
        weights.restore()
        if repeat:
            times_s.append(time.perf_counter() - started_s)
    return spread(times_s)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The few figures that answer the question, for the finished parts.

    NF4's loss is that of the run whose end was trained in rounded weights, against the float32 of
    the run that was not.
    """
    by_name = {row["contender"]: row for row in rows}
    wanted = {
        "int8_loss_gap_nats": ("plain, int8", "loss_gap_nats"),
        "nf4_loss_gap_nats": ("nf4-aware, nf4", "loss_gap_nats"),
        "nf4_loss_gap_nats_without_awareness": ("plain, nf4", "loss_gap_nats"),
        "xl_int8_file_gb": ("gpt2_xl, int8", "file_bytes"),
        "xl_nf4_file_gb": ("gpt2_xl, nf4", "file_bytes"),
    } | {
        f"file_ratio_{form}_{name}": (f"{name}, {form}", "file_ratio_to_float32")
        for form in FORMS
        for name in ("gpt2_small", "gpt2_xl")
    }
    found = {
        key: by_name[contender][quantity]
        for key, (contender, quantity) in wanted.items()
        if contender in by_name
    }
    return {key: value / 1e9 if key.endswith("_gb") else value for key, value in found.items()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The Markdown tables of the finished parts."""
    parts = [
        markdown_table(
            ["files", "parameters (M)", "MB", "float32 / this"],
            [
                [
                    row["contender"],
                    f"{row['parameters'] / 1e6:.1f}",
                    f"{row['file_bytes'] / 1e6:,.1f}",
                    f"{row['file_ratio_to_float32']:.2f}",
                ]
                for row in rows
                if "file_bytes" in row
            ],
        ),
        markdown_table(
            ["trained network", "validation loss (nats a token)", "above plain float32"],
            [
                [
                    row["contender"],
                    f"{row['val_loss_nats']:.4f}",
                    f"{row['loss_gap_nats']:+.4f}",
                ]
                for row in rows
                if "val_loss_nats" in row
            ],
        ),
        markdown_table(
            ["forward pass of GPT-2 small", "tokens/s (p10-p90)", "times float32"],
            [
                [
                    row["contender"],
                    "{median:,.0f} ({p10:,.0f}-{p90:,.0f})".format(**row["forward_tokens_per_s"]),
                    f"{row['speed_ratio_to_float32']:.2f}",
                ]
                for row in rows
                if "forward_tokens_per_s" in row
            ],
        ),
        markdown_table(
            ["beside each training step of GPT-2 small", "s (p10-p90)"],
            [
                [
                    row["contender"],
                    "{median:.2f} ({p10:.2f}-{p90:.2f})".format(**row["rounding_time_s"]),
                ]
                for row in rows
                if "rounding_time_s" in row
            ],
        ),
    ]
    note = (
        f"Files hold what is not quantised (positions, norms, biases) in {STORED_DTYPE}. The"
        f" nf4-aware run is the plain one until {AWARE_SHARE:.0%} of its steps."
    )
    return "\n\n".join([*parts, note])


if __name__ == "__main__":
    main()
