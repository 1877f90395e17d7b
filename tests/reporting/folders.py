"""Folders as runs, sweeps and evaluations leave them, made in milliseconds."""

import csv
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fingpt_lightning.pipeline import Pass, Work, chrome_trace

LABELS = ("negative", "neutral", "positive")
_TEXTS = (
    "Operating profit rose to EUR 13.1 mn from EUR 8.7 mn in the corresponding period",
    "The company did not disclose the terms of the agreement",
    "Net sales fell by 12 % and the outlook for the year was lowered",
    "The board proposes a dividend of EUR 0.40 a share <unchanged> & payable in April",
)


def make_run(
    folder: Path,
    num_steps: int = 40,
    *,
    seed: int = 0,
    final_loss: float = 3.9,
    is_finished: bool = True,
    rank: int = 64,
    tasks: Sequence[str] = (),
    has_answers: bool = True,
) -> Path:
    """A run of a low-rank model, with a validation every quarter of it."""
    folder.mkdir(parents=True)
    chance = random.Random(seed)
    rows: list[dict[str, float]] = [{"step": 0, **_compression(rank)}]
    time_s = 0.0
    for step in range(num_steps):
        time_s += chance.uniform(0.2, 0.3)
        loss = final_loss + (7.6 - final_loss) * math.exp(-4 * step / max(1, num_steps))
        rows.append(
            {
                "step": step,
                "train/loss": loss + chance.gauss(0, 0.05),
                "train/tokens": 2048.0 * (step + 1),
                "throughput/tokens_per_s": chance.uniform(7600, 8400),
                "throughput/training_time_s": time_s,
                "throughput/mfu": 0.31,
                "memory/weights_mib": 0.076 * rank,
                "memory/gradients_mib": 0.076 * rank,
                "memory/optimizer_mib": 0.152 * rank,
                "memory/activations_mib": 21.5,
                "memory/peak_rss_mib": 700.0 + rank,
            }
        )
        if (step + 1) % max(1, num_steps // 4) == 0:
            rows.append({"step": step, "val/loss": loss + 0.06, "val/perplexity": math.exp(loss)})
    write_metrics(folder / "metrics.csv", rows)
    write_config(folder, rank)
    if is_finished:
        summary = {
            "steps": num_steps,
            **{
                key.removeprefix("compression/"): value for key, value in _compression(rank).items()
            },
            "last_val_loss": rows[-1].get("val/loss", final_loss),
            "tokens_per_s": 8000.0,
            "timed_tokens_per_s": 9000.0,
            "dense_baseline_tokens_per_s": 6100.0,
            "speed_ratio": 9000 / 6100,
            "peak_rss_mib": 700.0 + rank,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    if tasks:
        write_run_evaluation(folder, 0, tasks, 0.31, has_answers=has_answers)
        if is_finished:
            write_run_evaluation(folder, num_steps, tasks, 0.78, has_answers=has_answers)
    return folder


def write_metrics(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Figures as Lightning's CSVLogger writes them: one header, empty cells."""
    names = sorted({name for row in rows for name in row})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def write_config(folder: Path, rank: int) -> None:
    """The settings of a run."""
    model = {"preset": "gpt2-nano", "rank": rank, "learning_rate": 0.002}
    settings = {
        "seed_everything": 1,
        "trainer": {"max_steps": 40, "default_root_dir": str(folder), "precision": None},
        "model": {"class_path": "fingpt_lightning.modules.LowRankPretraining", "init_args": model},
        "data": {"class_path": "fingpt_lightning.data.TextBlocks", "init_args": {"batch_size": 16}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))


def answers(is_good: bool, num_rows: int = 60) -> list[dict[str, Any]]:
    """Answers to a task of three labels."""
    chance = random.Random(1)
    found = []
    for row in range(1, num_rows + 1):
        gold = chance.randrange(3)
        said = gold if chance.random() < (0.78 if is_good else 0.31) else chance.randrange(3)
        sure = chance.uniform(0.4, 0.97)
        scores = [math.log(sure if label == said else (1 - sure) / 2) for label in range(3)]
        found.append(
            {
                "row": row,
                "text": f"{_TEXTS[row % len(_TEXTS)]}, row {row}.",
                "gold": LABELS[gold],
                "prediction": LABELS[said],
                "scores": scores,
            }
        )
    return found


def write_run_evaluation(
    run: Path,
    step: int,
    tasks: Sequence[str],
    accuracy: float,
    *,
    started_at: str | None = None,
    has_answers: bool = True,
) -> Path:
    """What `callbacks.FinancialEvaluation` leaves of one step of a run."""
    folder = run / "eval" / str(step)
    folder.mkdir(parents=True)
    names = ("accuracy", "weighted_f1", "mcc", "missing")
    values = (accuracy, accuracy - 0.04, accuracy - 0.2, 0.0)
    figures = dict(zip(names, values, strict=True)) | {
        "accuracy_interval": [accuracy - 0.1, accuracy + 0.1],
        "main_metric": "weighted_f1",
    }
    results = {
        "tasks": dict.fromkeys(tasks, figures),
        "step": step,
        "started_at": started_at or f"2026-01-01T00:00:{step:02}+00:00",
    }
    if has_answers:
        rows = [{"task": task, **row} for task in tasks for row in answers(is_good=accuracy > 0.5)]
        (folder / "predictions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def write_trace(folder: Path, step: int = 3) -> None:
    """A recorded step of two ranks."""
    passes = [
        Pass(rank, rank, m, work, 0.1 * (m + rank) + late, 0.1 * (m + rank) + late + 0.09)
        for rank in range(2)
        for m in range(4)
        for work, late in ((Work.FORWARD, 0.0), (Work.BACKWARD, 0.5))
    ]
    path = folder / "pipeline" / f"step_{step}.json"
    path.parent.mkdir()
    path.write_text(json.dumps(chrome_trace(passes)))


def make_evaluation(folder: Path, task: str = "fpb") -> Path:
    """What ``fingpt evaluate`` leaves."""
    folder.mkdir(parents=True)
    rows = [{"task": task, **row} for row in answers(is_good=False)]
    (folder / "predictions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    right = sum(row["gold"] == row["prediction"] for row in rows) / len(rows)
    found = {"accuracy": right, "macro_f1": right, "accuracy_interval": [right - 0.1, right + 0.1]}
    results = {"tasks": {task: found}, "model": "models/base", "versions": {"torch": "2.13"}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def make_sweep(folder: Path, num_trials: int = 6, num_steps: int = 12) -> Path:
    """A sweep over rank and rate; its last trial failed early, the one before is running."""
    folder.mkdir(parents=True)
    trials: list[dict[str, Any]] = []
    for number in range(num_trials):
        rank, rate = (16, 32, 64)[number % 3], (0.001, 0.004)[number // 3 % 2]
        ended = number < num_trials - 2
        run = folder / "trials" / f"{number:03}"
        loss = 3.9 + 6 / rank + (0.2 if rate > 0.002 else 0.0) + 0.01 * number
        make_run(run, num_steps if ended else 2, final_loss=loss, is_finished=ended, rank=rank)
        trials.append(
            {
                "number": number,
                "state": "finished" if ended else "running",
                "value": loss if ended else None,
                "parameters": {
                    "model.init_args.rank": rank,
                    "model.init_args.learning_rate": rate,
                },
                "run_folder": f"trials/{number:03}",
                "error": None,
                "seconds": 30.0 if ended else None,
            }
        )
    trials[-1] |= {"state": "failed", "error": "rank 512 is outside [1, 128]", "seconds": 2.0}
    record = {
        "name": folder.name,
        "sweep_file": "sweeps/quick_rank.yaml",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "method": "grid",
        "started_at": "2026-01-01T00:00:00+00:00",
        "trials": trials,
        "best": 2,
    }
    (folder / "sweep.json").write_text(json.dumps(record))
    return folder


def _compression(rank: int) -> dict[str, float]:
    ours, dense = 19_750.0 * rank, 3_758_000.0
    return {
        "compression/parameters": ours,
        "compression/dense_parameters": dense,
        "compression/total_parameter_ratio": dense / ours,
        "compression/block_parameter_ratio": 0.93 * dense / ours,
    }
