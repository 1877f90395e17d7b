"""``fingpt evaluate``: a model, some tasks, a table and files."""

import argparse
import importlib.metadata
import platform
import time
from datetime import UTC, datetime

import torch
from rich.console import Console

from fingpt_lightning.evaluation.batches import default_batch_tokens
from fingpt_lightning.evaluation.results import check_output, remarks, table, write_results
from fingpt_lightning.evaluation.runner import Scoring, evaluate, read_tasks
from fingpt_lightning.models.device import find_device
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.tasks.encoding import TooLong
from fingpt_lightning.terminal.progress import shown_progress

_PACKAGES = ("fingpt-lightning", "torch", "transformers", "tokenizers", "bitsandbytes", "peft")

_TABLE_WIDTH = 110


def run(options: argparse.Namespace) -> None:
    """Evaluates a model as the options say; data and output are checked before it is loaded.

    Args:
        options: Of `parse_options`.

    Raises:
        ValueError: A model, a task, a row or the output folder is not as it must be.
        FileNotFoundError: A path leads nowhere.
    """
    started_at, started_s = datetime.now(UTC), time.perf_counter()
    check_output(options.output, options.overwrite)
    scoring = Scoring(options.scoring)
    runs = read_tasks(
        options.tasks,
        options.data_dir,
        options.split,
        strict=options.strict,
        limit=options.limit,
        scoring=scoring,
        calibrate=options.calibrate,
    )
    model = load_model(
        options.model,
        dtype=options.dtype,
        device=find_device(options.device),
        quantize=options.quantize,
        adapter=options.adapter,
        tokenizer=options.tokenizer,
    )
    tokenizer = model.require_tokenizer()
    network = model.adapted()
    batch_tokens = options.batch_tokens or default_batch_tokens(network.device.type)
    results = []
    for run in runs:
        what = f"evaluating {run.task.name}"
        with shown_progress(what, len(run.examples), "rows", in_log=False) as show:
            result = evaluate(
                network,
                tokenizer,
                run,
                scoring=scoring,
                calibrate=options.calibrate,
                batch_tokens=batch_tokens,
                too_long=TooLong(options.too_long),
                on_answered=show,
            )
        results.append(result)
    # A file has 80 columns for rich, which would cut the figures.
    console = Console(width=max(Console().width, _TABLE_WIDTH), soft_wrap=True)
    console.print(model.source, highlight=False, markup=False)
    console.print(table(results), soft_wrap=False)
    for remark in remarks(results, network.config.max_position_embeddings):
        console.print(remark)
    head = {
        "model": model.source,
        "revision": model.revision,
        "adapter": None if model.adapter is None else str(model.adapter),
        "settings": {
            "dtype": options.dtype,
            "quantize": options.quantize,
            "scoring": scoring.value,
            "calibrate": options.calibrate,
            "limit": options.limit,
            "too_long": options.too_long,
            "batch_tokens": batch_tokens,
            "device": _device_name(network.device),
        },
        "started_at": started_at.isoformat(timespec="seconds"),
        "seconds": time.perf_counter() - started_s,
        "versions": _versions(),
    }
    write_results(options.output, head, results)
    console.print(f"{options.output}: results.json, predictions.jsonl", highlight=False)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
