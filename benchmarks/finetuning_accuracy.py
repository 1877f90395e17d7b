"""What does finetuning gain on each task, and what does it cost on the others?

Each run trains adapters on one task or a mixture and answers the validation sets before, with
calibration, and after. The record is written after every run, and a run in it is not repeated;
several processes with other ``--runs`` may share it. Where ``--adapters`` keeps what was trained,
the same command resumes within a run, and evaluates further tasks without training again.
"""

import argparse
import re
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, Timer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.record import (
    markdown_table,
    new_record,
    record_lock,
    started_record,
    write_record,
)
from callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from fingpt_lightning.data import FinancialInstructions
from fingpt_lightning.evaluation.runner import TaskRun, evaluate, read_tasks
from fingpt_lightning.metric_keys import VAL_LOSS
from fingpt_lightning.models.adapting import save_adapter
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.modules import QuantizedFinetuning
from fingpt_lightning.profiling import keep_freed_memory, module_memory
from fingpt_lightning.tasks.chat import choose_chat_template
from fingpt_lightning.units import MIB

QUESTION = (
    "What accuracy do adapters on a frozen, quantised model reach on each task, what do they gain"
    " over the untrained model, and what do they cost on tasks they were not trained on?"
)
FINANCIAL = ("fpb", "tfns", "fiqa_sa")
GENERAL = ("arc_easy", "arc_challenge", "boolq", "piqa", "openbookqa", "winogrande")
_SHARED = (
    "run", "tasks", "quantize", "seed", "epochs", "kl_weight", "learning_rate", "chat_template",
    "steps", "val_loss", "examples_per_s", "trained_share", "weights_mib", "optimizer_mib",
)  # fmt: skip
"""What the rows of a run have in common; rows of earlier versions lack some."""
_FIGURES = ("accuracy", "accuracy_interval", "macro_f1", "weighted_f1", "n")


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        tasks: Tasks that are trained on.
        evaluated: Tasks that are answered afterwards.
        quantize: Quantization of the base.
        seed: Seed of adapters and order; held-out rows differ with it too.
        epochs: Largest number of epochs.
        kl_weight: Weight of the guard against forgetting.
        learning_rate: Learning rate, where it differs from that of the record.
        chat_template: Chat template of training and evaluation, as of ``fingpt evaluate``.
    """

    tasks: tuple[str, ...]
    evaluated: tuple[str, ...]
    quantize: Literal["nf4", "int8"] | None = "nf4"
    seed: int = 1
    epochs: int = 3
    kl_weight: float = 0.0
    learning_rate: float | None = None
    chat_template: str = "none"

    def untrained_key(self, task: str) -> str:
        """Name of the untrained model's answers to a task, asked as this run asks it."""
        return task if self.chat_template == "none" else f"{task}, chat template"


RUNS = {
    "fpb": Run(("fpb",), ("fpb", *GENERAL)),
    "fpb, seed 2": Run(("fpb",), ("fpb",), seed=2),
    "fpb, seed 3": Run(("fpb",), ("fpb",), seed=3),
    "fiqa_sa": Run(("fiqa_sa",), ("fiqa_sa",), epochs=6),
    "tfns": Run(("tfns",), ("tfns",), epochs=2),
    "all three": Run(FINANCIAL, (*FINANCIAL, *GENERAL), epochs=2),
    "fpb, KL": Run(("fpb",), ("fpb", *GENERAL), kl_weight=0.1),
    "general": Run(GENERAL, GENERAL, epochs=2),
    "general, lower rate": Run(GENERAL, GENERAL, epochs=2, learning_rate=0.0002),
    "fpb, int8": Run(("fpb",), ("fpb",), quantize="int8"),
    "fpb, unquantised": Run(("fpb",), ("fpb",), quantize=None),
    "fpb, chat template, seed 2": Run(("fpb",), ("fpb",), seed=2, chat_template="auto"),
    "fpb, chat template, seed 3": Run(("fpb",), ("fpb",), seed=3, chat_template="auto"),
}


def main() -> None:
    """Trains what the record does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--runs", default=",".join(RUNS), help="names, with commas")
    parser.add_argument("--adapters", type=Path, help="folder that keeps each run's adapter")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=0.0005)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a training row")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--limit", type=int, help="rows of each validation set")
    parser.add_argument("--checkpoint_interval", type=int, default=50, help="steps")
    parser.add_argument("--max_steps", type=int, default=-1, help="of each run, to try this out")
    options = parser.parse_args()
    names = [name for name in RUNS if name in _names(options.runs)]
    keep_freed_memory()
    asides = ("json", "runs", "adapters", "data_dir", "checkpoint_interval")
    settings = {key: value for key, value in vars(options).items() if key not in asides}
    begin = partial(started_record, options.json, QUESTION, settings, untrained={}, rows=[])
    record = begin()
    for name in names:
        before = [row for row in record["rows"] if row["run"] == name]
        tasks = [t for t in RUNS[name].evaluated if t not in {row["task"] for row in before}]
        if not tasks:
            continue
        evaluated = read_tasks(tasks, options.data_dir, "validation", limit=options.limit)
        untrained = dict(record["untrained"])
        _ask_untrained(evaluated, RUNS[name], options, untrained)
        kept = None if options.adapters is None else options.adapters / re.sub(r"\W+", "_", name)
        if before and kept is not None and kept.is_dir():
            trained = _kept(kept, RUNS[name], options, before[0])
        else:
            trained = _train(name, RUNS[name], options, kept)
        network, tokenizer, shared = trained
        shared |= {"commit": new_record("", {})["commit"]}
        rows = [
            {**shared, "task": one.task.name, **_ask(network, tokenizer, one, False)}
            for one in evaluated
        ]
        del network, trained
        with record_lock(options.json):
            record = begin()
            record["untrained"] |= untrained
            record["rows"] = sorted(
                record["rows"] + rows, key=lambda row: list(RUNS).index(row["run"])
            )
            record["summary"] = summary(record["rows"], record["untrained"])
            write_record(options.json, record, table(record))
    print(table(record))


def _names(text: str) -> list[str]:
    # "fpb, chat template, seed 2" contains commas itself.
    found = [name for name in RUNS if text == name]
    if found:
        return found
    given = text.split(",")
    names, rest = [], list(given)
    while rest:
        for size in (3, 2, 1):
            name = ",".join(rest[:size]).strip()
            if name in RUNS:
                names.append(name)
                rest = rest[size:]
                break
        else:
            raise SystemExit(f"--runs: {rest[0]!r} is none of {'; '.join(RUNS)}")
    return names


def _ask_untrained(
    evaluated: Sequence[TaskRun],
    run: Run,
    options: argparse.Namespace,
    untrained: dict[str, dict[str, Any]],
) -> None:
    missing = [one for one in evaluated if run.untrained_key(one.task.name) not in untrained]
    if not missing:
        return
    base = load_model(options.model, dtype=options.dtype)
    tokenizer = base.require_tokenizer()
    choose_chat_template(tokenizer, run.chat_template, options.model)
    for one in missing:
        calibrate = one.task.kind == "labels"
        key = run.untrained_key(one.task.name)
        untrained[key] = _ask(base.network, tokenizer, one, calibrate)


def _kept(
    folder: Path, run: Run, options: argparse.Namespace, row: Mapping[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict[str, Any]]:
    """A trained network restored from its adapter, and what its rows share."""
    loaded = load_model(folder, dtype=options.dtype, quantize=run.quantize)
    tokenizer = loaded.require_tokenizer()
    choose_chat_template(tokenizer, run.chat_template, options.model)
    return (
        loaded.network,
        tokenizer,
        {key: row[key] for key in _SHARED if key in row},
    )


def _train(
    name: str, run: Run, options: argparse.Namespace, kept: Path | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict[str, Any]]:
    """A trained network, and what its rows share; ``kept`` is where its adapter goes.

    Beside it lies, until the training is over, a folder from which a run can resume.
    """
    seed_everything(run.seed, verbose=False)
    module = QuantizedFinetuning(
        options.model,
        quantize=run.quantize,
        dtype=options.dtype,
        rank=options.rank,
        learning_rate=options.learning_rate if run.learning_rate is None else run.learning_rate,
        kl_weight=run.kl_weight,
    )
    data = FinancialInstructions(
        list(run.tasks),
        str(options.data_dir),
        batch_size=options.batch_size,
        max_length=options.max_length,
        chat_template=run.chat_template,
        seed=run.seed,
    )
    with _checkpoints(kept) as folder:
        best, timer = BestCheckpoint(VAL_LOSS, dirpath=str(folder)), Timer()
        trainer = Trainer(
            accelerator="auto",
            devices=1,
            max_epochs=run.epochs,
            max_steps=options.max_steps,
            val_check_interval=0.5,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                best,
                LastCheckpoint(options.checkpoint_interval, str(folder)),
                EarlyStopping(VAL_LOSS, patience=3),
                timer,
            ],
            default_root_dir=folder,
        )
        last = folder / "last.ckpt"
        resumed = last if last.exists() else None
        with warnings.catch_warnings():
            # That is what a run resumes from.
            warnings.filterwarnings("ignore", "Checkpoint directory .* is not empty")
            trainer.fit(module, data, ckpt_path=resumed, weights_only=True)
        # Of all processes that took part.
        seconds = timer.time_elapsed("train")
        memory = module_memory(module.network, trainer.optimizers[0])
        if best.best_model_path:
            state = _weights(best.best_model_path)
            module.load_state_dict(state, strict=False)
    module.network.eval()
    if kept is not None:
        save_adapter(module.network, kept, str(Path(options.model).resolve()))
    num_examples = trainer.global_step * options.batch_size
    shared = {
        "run": name,
        **{key: value for key, value in asdict(run).items() if key != "evaluated"},
        "steps": trainer.global_step,
        "val_loss": None if best.best_model_score is None else best.best_model_score.item(),
        "examples_per_s": num_examples / seconds,
        "trained_share": module.trained_share(),
        "weights_mib": memory.weights / MIB,
        "optimizer_mib": memory.optimizer / MIB,
    }
    assert shared.keys() == set(_SHARED)
    return module.network, data.tokenizer, shared


@contextmanager
def _checkpoints(kept: Path | None) -> Iterator[Path]:
    """A folder that survives an early end, where ``kept`` gives its place."""
    if kept is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    path = kept.with_name(f"{kept.name}.training")
    path.mkdir(parents=True, exist_ok=True)
    yield path
    shutil.rmtree(path)


def _weights(path: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    return state


def _ask(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, run: TaskRun, calibrate: bool
) -> dict[str, Any]:
    metrics = evaluate(network, tokenizer, run, calibrate=calibrate).metrics
    figures = {key: metrics[key] for key in _FIGURES if key in metrics}
    return {**figures, "split_sha256": run.sha256}


def summary(
    rows: Sequence[Mapping[str, Any]], untrained: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """The figures that answer the question, where there are runs for them."""

    def of(run: str, task: str) -> float | None:
        return next((r["accuracy"] for r in rows if (r["run"], r["task"]) == (run, task)), None)

    seeds = [of(run, "fpb") for run in ("fpb", "fpb, seed 2", "fpb, seed 3")]
    known = [value for value in seeds if value is not None]
    best = {"tfns": of("tfns", "tfns"), "fiqa_sa": of("fiqa_sa", "fiqa_sa")}
    found = {f"{task}_accuracy": value for task, value in best.items() if value is not None}
    if known:
        found["fpb_accuracy"] = statistics.mean(known)
        found["fpb_seeds"] = float(len(known))
    gains = [found[f"{t}_accuracy"] - untrained[t]["accuracy"] for t in FINANCIAL
             if f"{t}_accuracy" in found]  # fmt: skip
    if gains:
        found["financial_gain_points"] = 100 * statistics.mean(gains)
    for key, run in (
        ("general_gain_points", "general"),
        ("general_gain_points_at_lower_rate", "general, lower rate"),
        ("general_cost_points_of_financial", "all three"),
        ("general_cost_points_of_fpb", "fpb"),
        ("general_cost_points_of_fpb_with_kl", "fpb, KL"),
    ):
        pairs = [(of(run, task), untrained.get(task)) for task in GENERAL]
        if all(after is not None for after, _ in pairs):
            sign = -1 if "cost" in key else 1
            points = [100 * (after - before["accuracy"]) for after, before in pairs
                      if after is not None and before is not None]  # fmt: skip
            found[key] = sign * statistics.mean(points)
    templates = [(of(f"fpb, chat template, {seed}", "fpb"), of(f"fpb, {seed}", "fpb"))
                 for seed in ("seed 2", "seed 3")]  # fmt: skip
    both = [(chat, plain) for chat, plain in templates if chat is not None and plain is not None]
    if both:
        found["fpb_accuracy_with_chat_template"] = statistics.mean(chat for chat, _ in both)
        found["fpb_accuracy_without_chat_template"] = statistics.mean(plain for _, plain in both)
    return found


def _untrained_key(row: Mapping[str, Any]) -> str:
    key: str = RUNS[row["run"]].untrained_key(row["task"])
    return key


def table(record: Mapping[str, Any]) -> str:
    """The Markdown table."""
    lines = [
        [
            f"{row['run']} -> {row['task']}",
            f"{record['untrained'][_untrained_key(row)]['accuracy']:.3f}",
            f"{row['accuracy']:.3f}",
            "{:.3f} - {:.3f}".format(*row["accuracy_interval"]),
            f"{row['macro_f1']:.3f}" if "macro_f1" in row else "-",
            f"{row['n']:,}",
            f"{row['steps']:,}",
            f"{row['examples_per_s']:.1f}",
            f"{row['weights_mib'] + row['optimizer_mib']:.0f}",
        ]
        for row in record["rows"]
    ]
    header = ["run -> task", "untrained", "accuracy", "95 %", "macro F1", "n", "steps"]
    return markdown_table([*header, "examples/s", "weights and optimiser MiB"], lines)


if __name__ == "__main__":
    main()
