"""How much faster are a training step and labels than at an earlier commit?

Runs ``fingpt`` of two checkouts in turn on the same files: ``fit`` of the shipped config of a
low-rank GPT-2 small, and ``label`` with one model as it is, and in NF4 and int8 with an adapter.
A checkout of the earlier commit: ``git worktree add ../earlier COMMIT``.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.evaluation import toy_data, toy_model
from benchmarks.record import markdown_table, new_record, spread, write_record
from fingpt_lightning.low_rank.adapters import AdapterOptions
from fingpt_lightning.metric_keys import THROUGHPUT_STEP_TIME_S
from fingpt_lightning.models.adapting import adapt, adapted_layers, save_adapter
from fingpt_lightning.models.loading import load_model

QUESTION = (
    "How much faster are a training step of low-rank GPT-2 and labels than at an earlier commit,"
    " and are the labels the same?"
)
NOW, EARLIER = "now", "earlier"
NOW_FLOAT32 = "now, --dtype float32"
FIT = "fit, low-rank GPT-2 small, bf16"
LABELS: dict[str, Sequence[str]] = {
    "label": (),
    "label, nf4 with adapter": ("--quantize", "nf4", "--adapter"),
    "label, int8 with adapter": ("--quantize", "int8", "--adapter"),
}
"""Options beside the model's, the last of them followed by the adapter."""
_WARM_UP_STEPS = 6
_TIMEOUT_S = 1800.0
Seconds = dict[tuple[str, str], list[float]]
"""Of a step, or of a whole command, by work and checkout."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs both checkouts in turn and writes record and table.

    Args:
        arguments: Options; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument("--earlier", type=Path, required=True, help="checkout of the commit")
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--data_dir", type=Path, help="holds fpb/ and fed_text/; not with --toy")
    parser.add_argument("--limit", type=int, default=200, help="rows to label")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each fit")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--now", default="", help="options of label that the earlier commit does without,"
        " in quotes: '--chat_template none' for one that had no chat templates",
    )  # fmt: skip
    parser.add_argument("--toy", action="store_true", help="a random model and a few made-up rows")
    options = parser.parse_args(arguments)
    if not options.toy and options.data_dir is None:
        parser.error("--data_dir is needed, but with --toy")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.toy:
            options.model, options.data_dir = str(toy_model(folder)), toy_data(folder)
        names = ("limit", "steps", "repeats", "now")
        settings = {key: getattr(options, key) for key in names}
        record = new_record(
            QUESTION,
            {
                "model": "toy" if options.toy else options.model,
                "earlier_commit": _commit(options.earlier),
                **settings,
            },
        )
        seconds, labels = _measure(options, folder)
    record["rows"] = rows(seconds, labels, options.limit)
    record["summary"] = summary(record["rows"])
    write_record(options.json, record, table(record["rows"], record["summary"]))
    print(json.dumps(record["summary"], indent=1))


def _commit(checkout: Path) -> str:
    words = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def _measure(
    options: argparse.Namespace, folder: Path
) -> tuple[Seconds, dict[tuple[str, str], list[str]]]:
    checkouts = {EARLIER: options.earlier.resolve(), NOW: Path.cwd()}
    model = Path(options.model).resolve()
    adapter = _adapter(model, folder)
    texts = folder / "rows.jsonl"
    lines = (options.data_dir / "fpb" / "validation.jsonl").read_text(encoding="utf-8")
    texts.write_text("\n".join(lines.splitlines()[: options.limit]) + "\n", encoding="utf-8")
    seconds: Seconds = {}
    labels: dict[tuple[str, str], list[str]] = {}
    for repeat in range(options.repeats):
        for name, checkout in checkouts.items():
            fit = _fit_words(options, model, folder / f"{name}{repeat}")
            seconds.setdefault((FIT, name), []).extend(_fit(checkout, *fit))
            for what, how in LABELS.items():
                written = folder / f"{name}.jsonl"
                words = ["label", "--model", str(model), *how, *([str(adapter)] if how else [])]
                words += options.now.split() if name == NOW else []
                words += ["--task", "fpb", "--input", str(texts), "--output", str(written)]
                dtypes = (
                    {NOW: (), NOW_FLOAT32: ("--dtype", "float32")} if name == NOW else {name: ()}
                )
                for row, extra in dtypes.items():
                    taken_s = _run(checkout, [*words, *extra, "--overwrite"])
                    seconds.setdefault((what, row), []).append(taken_s)
                    found = written.read_text(encoding="utf-8").splitlines()
                    labels[what, row] = [json.loads(line)["fpb_label"] for line in found]
    return seconds, labels


def _adapter(model: Path, folder: Path) -> Path:
    """A folder with an adapter whose factors are random: what it says does not matter."""
    network = load_model(str(model)).network
    options = AdapterOptions(16)
    adapt(network, options, seed=1)
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(network).values():
            layer.lora_B.normal_(std=0.01, generator=stream)
    save_adapter(network, folder / "adapter", str(model))
    return folder / "adapter"


def _fit_words(
    options: argparse.Namespace, model: Path, output: Path
) -> tuple[list[str], Callable[[], list[float]]]:
    name = "debug_pretrain_gpt2_small" if options.toy else "pretrain_gpt2_small"
    words = ["fit", "--config", f"configs/{name}.yaml"]
    if not options.toy:
        texts = (options.data_dir / "fed_text").resolve()
        words += ["--data.tokenizer", str(model), "--data.train_files"]
        words += [str(texts / "train.jsonl"), "--data.val_files", str(texts / "validation.jsonl")]
        words += ["--data.batch_size", "4", "--trainer.precision", "bf16-mixed"]
    steps = _WARM_UP_STEPS + options.steps
    words += ["--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0"]
    words += ["--trainer.log_every_n_steps", "1", "--trainer.default_root_dir", str(output)]
    words += ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(output)]

    def step_seconds() -> list[float]:
        file = next(output.rglob("metrics.csv"))
        with file.open(encoding="utf-8") as opened:
            found = [row.get(THROUGHPUT_STEP_TIME_S) for row in csv.DictReader(opened)]
        return [float(text) for text in found if text][_WARM_UP_STEPS - 1 :]

    return words, step_seconds


def _fit(checkout: Path, words: Sequence[str], seconds: Callable[[], list[float]]) -> list[float]:
    _run(checkout, words)
    return seconds()


def _run(checkout: Path, words: Sequence[str]) -> float:
    """Runs ``fingpt`` of a checkout and returns its seconds, start included."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    started_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "fingpt_lightning", *words],
        cwd=checkout, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"fingpt {words[0]} of {checkout.name}: {done.stderr[-2000:]}")
    return time.perf_counter() - started_s


def rows(
    seconds: Seconds, labels: dict[tuple[str, str], list[str]], limit: int
) -> list[dict[str, Any]]:
    """A row for each work and checkout.

    Args:
        seconds: Seconds of each step, or of each whole command.
        labels: Labels by work and checkout.
        limit: Rows that were labeled.
    """
    made = []
    for (what, checkout), times in seconds.items():
        row: dict[str, Any] = {"work": what, "checkout": checkout, "seconds": spread(times)}
        if (what, checkout) in labels:
            row["rows_per_s"] = limit / row["seconds"]["median"]
            pairs = zip(labels[what, checkout], labels[what, EARLIER], strict=True)
            row["same_labels"] = sum(one == other for one, other in pairs) / limit
        made.append(row)
    return sorted(made, key=lambda row: str(row["work"]))


def summary(made: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How many times faster each work is, by the medians.

    Args:
        made: Result of `rows`.
    """
    medians = {(row["work"], row["checkout"]): row["seconds"]["median"] for row in made}
    found = {}
    for (work, checkout), earlier in medians.items():
        if checkout == EARLIER:
            name = work.split(", low")[0].replace(", ", "_").replace(" ", "_")
            found[f"speed_ratio_{name}"] = earlier / medians[work, NOW]
            if (work, NOW_FLOAT32) in medians:
                found[f"speed_ratio_{name}_float32"] = earlier / medians[work, NOW_FLOAT32]
    for key, checkout in (("least_same_labels", NOW), ("least_same_labels_float32", NOW_FLOAT32)):
        found[key] = min(row["same_labels"] for row in made if _is_labeled(row, checkout))
    return found


def _is_labeled(row: dict[str, Any], checkout: str) -> bool:
    return row["checkout"] == checkout and "same_labels" in row


def table(made: Sequence[dict[str, Any]], ratios: dict[str, float]) -> str:
    """The rows as a table, and the summary below it.

    Args:
        made: Result of `rows`.
        ratios: Result of `summary`.
    """
    lines = [
        [
            row["work"],
            row["checkout"],
            f"{row['seconds']['median']:.2f}",
            f"{row['rows_per_s']:.1f}" if "rows_per_s" in row else "",
            f"{row['same_labels']:.3f}" if "same_labels" in row else "",
        ]
        for row in made
    ]
    head = ("", "", "s a step or command", "rows/s", "labels as earlier")
    below = [[name, f"{value:.2f}"] for name, value in ratios.items()]
    return f"{markdown_table(head, lines)}\n{markdown_table(('', ''), below)}"


if __name__ == "__main__":
    main()
