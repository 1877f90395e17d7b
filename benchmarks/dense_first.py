"""Does a low-rank GPT-2 end lower if it is trained dense first?

On the grid that compares networks of one size: the dense network of the same width trains for a
share of the steps at a constant rate, is decomposed on text of its training, and goes on as
low-rank layers for the other steps, each kind under the optimizer and at the rates that the record
of the grid found best. Beside them stand low-rank layers from the start and the dense network of as
many parameters. The record is written after every row, and a row in it is not made again.
"""

import argparse
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything

from benchmarks.quality_runs import Grid, Run, Variant, Workshop, read_grid
from benchmarks.record import markdown_table, new_record, started_record, write_record
from fingpt_lightning.data import TextBlocks
from fingpt_lightning.data.calibration_text import text_calibration
from fingpt_lightning.data.text_files import TextFiles, find_text_files
from fingpt_lightning.decomposition.runner import Request, decompose_model
from fingpt_lightning.decomposition.source import open_source
from fingpt_lightning.metric_keys import VAL_LOSS
from fingpt_lightning.modules import LowRankPretraining
from fingpt_lightning.profiling import keep_freed_memory

QUESTION = (
    "Does a low-rank GPT-2 end lower on the same tokens if the first share of its steps trains the"
    " dense network of its width?"
)
GRID = Path(__file__).with_name("same_size_grid.yaml")
RATES = Path("docs/benchmarks/same_size_quality.json")
DENSE, LOW_RANK = "dense", "LoRA-Muon"
_COOLED = " cooled"


def main() -> None:
    """Makes the rows that the record does not hold yet."""
    options = _parser().parse_args()
    keep_freed_memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    grid = read_grid(GRID)
    found = json.loads(RATES.read_text(encoding="utf-8"))
    rates = {part: found[part] for part in ("rates", "rest_rates")}
    settings = {
        "shares": options.shares, "steps": options.steps, "seed": options.seed,
        "calibration_tokens": options.calibration_tokens, "model": dict(grid.model),
        "data": dict(grid.data), "trainer": dict(grid.trainer), **rates,
    }  # fmt: skip
    record = started_record(options.json, QUESTION, settings, rows=[])
    for contender, share in contenders(options.shares, grid):
        if any(row["contender"] == contender for row in record["rows"]):
            continue
        row = {"contender": contender, "dense_share": share} | trained(
            contender, share, grid, rates, options
        )
        record["rows"].append(row | {"commit": new_record("", {})["commit"]})
        record["summary"] = summary(record["rows"])
        write_record(options.json, record, table(record["rows"]))
        print(json.dumps(row), flush=True)
    print(table(record["rows"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--json", type=Path, required=True, help="record to write; .md beside")
    add("--data_dir", type=Path, required=True, help="with fed_text/{train,validation}.jsonl")
    add("--work_dir", type=Path, required=True, help="for tokens, checkpoints and decompositions")
    add("--shares", default="0.25,0.5", help="of the steps that train dense layers, with commas")
    add("--steps", type=int, default=600, help="of both parts together")
    add("--seed", type=int, default=1)
    add("--calibration_tokens", type=int, default=32768)
    return parser


def contenders(shares: str, grid: Grid) -> Iterator[tuple[str, float]]:
    """The name and share of dense steps of each row, in the order of the record."""
    assert grid.same_size is not None
    for text in shares.split(","):
        share = float(text)
        yield f"dense for {share:g} of the steps", share
        yield f"dense for {share:g} of the steps,{_COOLED}", share
    yield LOW_RANK, 0.0
    yield grid.same_size, 1.0


def trained(
    contender: str,
    share: float,
    grid: Grid,
    rates: Mapping[str, Mapping[str, float]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One row: a run from the start, or the two parts of one that trains dense layers first."""
    text = options.data_dir / "fed_text"
    files = text / "train.jsonl", text / "validation.jsonl"
    workshop = Workshop(grid, *files, options.work_dir / "cache")
    variants = {variant.name: variant for variant in grid.variants}
    if contender in variants:
        variant = variants[contender]
        rate, rest = (rates[part].get(contender) for part in ("rates", "rest_rates"))
        assert rate is not None
        run = Run(contender, "equal tokens", rate, options.seed, options.steps, rest)
        workshop.train(variant, run)
        parameters = workshop.sizes(variant)["parameters"]
        return {
            "parameters": parameters,
            "loss_nats": run.val_loss_nats,
            "training_time_s": run.training_time_s,
        }
    folder = options.work_dir / contender.replace(" ", "_").replace(",", "").replace(".", "_")
    folder.mkdir(parents=True, exist_ok=True)
    num_dense = round(share * options.steps)
    dense = _settings(variants[DENSE], rates)
    if contender.endswith(_COOLED):
        dense |= {"schedule": "wsd", "cooldown": 0.3}
    else:
        dense |= {"final_learning_rate_ratio": 1.0}
    before = folder / "dense.ckpt"
    row: dict[str, Any] = {}
    row["dense_loss_nats"], dense_s = _fit(
        {**grid.model, **dense}, num_dense, grid, files, options, save=before
    )
    started_s = time.perf_counter()
    small = folder / "decomposed"
    source = open_source(before)
    low_rank = variants[LOW_RANK]
    width = int(grid.model["width"])
    request = Request(
        rank_ratio=low_rank.model["rank"] / width,
        embedding_rank=low_rank.model["embedding_rank"],
        sequential=True,
    )
    calibration = text_calibration(
        TextFiles(find_text_files(str(files[0]))), source.tokenizer, source.network.config,
        options.calibration_tokens, int(grid.data["block_length"]),
    )  # fmt: skip
    made = decompose_model(source, request, small, calibration, overwrite=True)
    row["decomposition_time_s"] = round(time.perf_counter() - started_s, 1)
    after = _settings(low_rank, rates)
    for name in ("rank", "embedding_rank"):
        del after[name]
    shape = ("preset", "num_layers", "width", "num_heads", "num_positions")
    after = {k: v for k, v in grid.model.items() if k not in shape} | after
    # Other batches than those of the first part.
    loss, seconds = _fit(
        after | {"init_from": str(small)}, options.steps - num_dense, grid, files, options,
        seed=options.seed + 1000, tokenizer=small,
    )  # fmt: skip
    return row | {
        "parameters": made.parameters,
        "loss_nats": loss,
        "training_time_s": round(dense_s + seconds, 1),
    }


def _settings(variant: Variant, rates: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    return variant.settings(rates["rates"][variant.name], rates["rest_rates"].get(variant.name))


def _fit(
    model: Mapping[str, Any],
    steps: int,
    grid: Grid,
    files: Sequence[Path],
    options: argparse.Namespace,
    *,
    seed: int | None = None,
    tokenizer: Path | None = None,
    save: Path | None = None,
) -> tuple[float, float]:
    """The loss of validation after some steps, and their seconds."""
    seed = options.seed if seed is None else seed
    seed_everything(seed, verbose=False)
    data = dict(grid.data) | ({} if tokenizer is None else {"tokenizer": str(tokenizer)})
    if tokenizer is not None:
        del data["vocab_size"]
    blocks = TextBlocks(
        **data, train_files=str(files[0]), val_files=str(files[1]),
        cache_dir=str(options.work_dir / "cache"), seed=seed,
    )  # fmt: skip
    module = LowRankPretraining(**model)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, logger=False,
        limit_val_batches=0, num_sanity_val_steps=0, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=options.work_dir, **grid.trainer,
    )  # fmt: skip
    started_s = time.perf_counter()
    trainer.fit(module, datamodule=blocks)
    seconds = time.perf_counter() - started_s
    if save is not None:
        trainer.save_checkpoint(save)
    validator = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=options.work_dir,
        precision=grid.trainer["precision"],
    )  # fmt: skip
    (found,) = validator.validate(module, blocks, verbose=False)
    return round(found[VAL_LOSS], 5), seconds


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Differences of the best to low-rank layers from the start and to dense ones of one size."""
    losses = {row["contender"]: row["loss_nats"] for row in rows}
    first = {name: loss for name, loss in losses.items() if name.startswith("dense for")}
    found = {}
    if first:
        best = min(first, key=lambda name: first[name])
        names = {"low_rank_from_the_start": LOW_RANK, "same_size_dense": read_grid(GRID).same_size}
        found = {
            f"gap_to_{key}_nats": round(first[best] - losses[name], 5)
            for key, name in names.items()
            if name in losses
        }
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown table."""
    lines = [
        [
            row["contender"],
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['dense_loss_nats']:.3f}" if "dense_loss_nats" in row else "-",
            f"{row['loss_nats']:.3f}",
            f"{row['training_time_s'] / 60:.1f}",
        ]
        for row in rows
    ]
    return markdown_table(
        ["", "parameters (M)", "loss of the dense part", "loss", "minutes"], lines
    )


if __name__ == "__main__":
    main()
