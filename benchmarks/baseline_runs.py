"""Does a low-rank GPT-2 learn as its dense baseline does, by tokens and by time?

Runs ``fingpt fit`` on the same tokens dense, low-rank as the config requests, and low-rank under
plain AdamW, and records and draws the three.
"""

import argparse
import csv
import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.record import markdown_table, new_record, spread, write_record
from fingpt_lightning.metric_keys import (
    THROUGHPUT_STEP_TIME_S,
    THROUGHPUT_TRAINING_TIME_S,
    TRAIN_LOSS,
    TRAIN_TOKENS,
    VAL_LOSS,
)

QUESTION = (
    "Does a low-rank GPT-2 learn as well as its dense baseline on the same tokens, and in how much"
    " less time and memory?"
)
ADAMW = ["--model.optimizer", "adamw"]
TWINS: dict[str, list[str]] = {
    "dense": ["--model.rank", "null", "--model.embedding_rank", "null", *ADAMW],
    "low_rank": [],
    "low_rank_adamw": ADAMW,
}
Row = dict[str, float]


def main() -> None:
    """Runs what is not finished yet, and writes record, table and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/pretrain_gpt2_small.yaml")
    parser.add_argument(
        "--json", type=Path, required=True, help="record to write; .md and .svg beside"
    )
    parser.add_argument("--runs_dir", type=Path, default=Path("runs/baseline_runs"))
    for twin in TWINS:
        parser.add_argument(f"--{twin}_options", default="", help="options of fit for this one")
    parser.add_argument(
        "fit_options", nargs=argparse.REMAINDER, help="after --: options of fingpt fit for all"
    )
    options = parser.parse_args()
    shared = [word for word in options.fit_options if word != "--"]
    own = {twin: shlex.split(getattr(options, f"{twin}_options")) for twin in TWINS}
    record = new_record(
        QUESTION,
        {
            "config": options.config,
            "fit_options": " ".join(shared),
            **{f"{twin}_options": " ".join(words) for twin, words in own.items()},
        },
    )
    rows = {}
    for twin, changes in TWINS.items():
        folder = options.runs_dir / twin
        if not (folder / "summary.json").exists():  # a finished run is not repeated
            command = [sys.executable, "-m", "fingpt_lightning", "fit", "--config", options.config]
            place = ["--trainer.default_root_dir", str(folder)]
            subprocess.run([*command, *shared, *changes, *own[twin], *place], check=True)
            made = {key: record[key] for key in ("commit", "dirty", "started_at")}
            (folder / "made_by.json").write_text(json.dumps(made))
        rows[twin] = read_run(folder)
    record["rows"] = [
        {"contender": twin, "ratio_to_dense": _ratios(run, rows["dense"]), **run}
        for twin, run in rows.items()
    ]
    record["summary"] = summary(**rows)
    write_record(options.json, record, table(rows))
    draw(rows, options.json.with_suffix(".svg"))
    print(json.dumps(record["summary"], indent=1))


def read_run(folder: Path) -> dict[str, Any]:
    """The figures and curves of a finished run.

    Args:
        folder: Folder of the run, with ``metrics.csv`` and ``summary.json``.

    Raises:
        FileNotFoundError: The run did not finish.
    """
    figures = json.loads((folder / "summary.json").read_text())
    made_by = json.loads((folder / "made_by.json").read_text())
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    model = settings["model"]["init_args"]
    spectron_rate = model["spectron_learning_rate"] if model["optimizer"] == "spectron" else None
    train: list[Row] = []
    validation: list[Row] = []
    tokens = time_s = 0.0
    step_times_s = []
    with (folder / "metrics.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            if line.get(TRAIN_TOKENS):
                tokens = float(line[TRAIN_TOKENS])
            if line.get(THROUGHPUT_TRAINING_TIME_S):
                time_s = float(line[THROUGHPUT_TRAINING_TIME_S])
            if line.get(THROUGHPUT_STEP_TIME_S):
                step_times_s.append(float(line[THROUGHPUT_STEP_TIME_S]))
            point = {"tokens": tokens, "time_s": round(time_s, 2)}
            if line.get(TRAIN_LOSS):
                train.append(point | {"loss_nats": round(float(line[TRAIN_LOSS]), 5)})
            if line.get(VAL_LOSS):
                validation.append(point | {"loss_nats": round(float(line[VAL_LOSS]), 5)})
    return {
        "made_by": made_by,
        "learning_rate": model["learning_rate"],
        "spectron_learning_rate": spectron_rate,
        "seed": settings["seed_everything"],
        "repeats": len(step_times_s),
        "parameters": figures["parameters"],
        "block_parameters": figures["block_parameters"],
        "peak_rss_mib": figures.get("peak_rss_mib"),
        "step_time_s": spread(step_times_s),
        "tokens_per_s": figures.get("tokens_per_s"),
        "last_val_loss_nats": figures.get("last_val_loss"),
        "train_curve": train,
        "val_curve": validation,
    }


def summary(
    dense: dict[str, Any], low_rank: dict[str, Any], low_rank_adamw: dict[str, Any]
) -> dict[str, float]:
    """The few ratios that answer the question; a gap above 0 means low rank is behind."""
    return {
        "total_compression_ratio": dense["parameters"] / low_rank["parameters"],
        "block_compression_ratio": dense["block_parameters"] / low_rank["block_parameters"],
        "tokens_per_s_ratio": dense["step_time_s"]["median"] / low_rank["step_time_s"]["median"],
        "peak_rss_ratio": low_rank["peak_rss_mib"] / dense["peak_rss_mib"],
        **_gaps(dense, low_rank),
        **{f"adamw_{name}": gap for name, gap in _gaps(dense, low_rank_adamw).items()},
    }


def _gaps(dense: dict[str, Any], run: dict[str, Any]) -> dict[str, float]:
    last = run["val_curve"][-1]
    return {
        "loss_gap_nats_equal_tokens": last["loss_nats"] - dense["val_curve"][-1]["loss_nats"],
        "loss_gap_nats_equal_time": last["loss_nats"]
        - _loss_at(dense["val_curve"], last["time_s"]),
    }


def _loss_at(curve: list[Row], time_s: float) -> float:
    """The loss at a time, interpolated between the validations around it."""
    for before, after in itertools.pairwise(curve):
        if time_s <= after["time_s"]:
            share = (time_s - before["time_s"]) / (after["time_s"] - before["time_s"])
            share = max(0.0, share)
            return before["loss_nats"] + share * (after["loss_nats"] - before["loss_nats"])
    return curve[-1]["loss_nats"]


def _ratios(run: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    return {
        "parameters": run["parameters"] / dense["parameters"],
        "step_time_s": run["step_time_s"]["median"] / dense["step_time_s"]["median"],
        "peak_rss_mib": run["peak_rss_mib"] / dense["peak_rss_mib"],
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The Markdown table of the runs."""
    header = [
        "",
        "learning rate",
        "parameters (M)",
        "s a step (p10-p90)",
        "tokens/s",
        "peak RSS (MiB)",
        "val loss",
    ]
    lines = []
    for twin, run in rows.items():
        step, rate = run["step_time_s"], f"{run['learning_rate']:g}"
        if run["spectron_learning_rate"] is not None:
            rate += f", pairs {run['spectron_learning_rate']:g}"
        lines.append(
            [
                twin,
                rate,
                f"{run['parameters'] / 1e6:.1f}",
                f"{step['median']:.2f} ({step['p10']:.2f}-{step['p90']:.2f})",
                f"{run['tokens_per_s']:,.0f}",
                f"{run['peak_rss_mib']:,.0f}",
                f"{run['last_val_loss_nats']:.3f}",
            ]
        )
    return markdown_table(header, lines)


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """The loss of each run by tokens and by training time, as a picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    styles = {
        "dense": ("#777777", "dense baseline"),
        "low_rank": ("#c2410c", "low rank"),
        "low_rank_adamw": ("#eab308", "low rank, plain AdamW"),
    }
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    units = (("tokens", 1e3, "thousand tokens"), ("time_s", 60, "minutes of training"))
    for axis, (key, unit, label) in zip(axes, units, strict=True):
        for twin, run in rows.items():
            color, name = styles[twin]
            # Dots and dashes are validations, the faint line is training.
            looks: dict[str, dict[str, Any]] = {
                "train_curve": {"alpha": 0.4},
                "val_curve": {"ls": "--", "marker": "o", "label": name},
            }
            for curve, look in looks.items():
                x = [point[key] / unit for point in run[curve]]
                y = [point["loss_nats"] for point in run[curve]]
                axis.plot(x, y, color=color, markersize=4, lw=1.3, **look)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss (nats a token)")
    axes[0].legend(frameon=False, fontsize=8, title="validation (faint: training)")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
