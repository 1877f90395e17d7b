"""Does a run hold in memory what ``fingpt plan`` predicted before it started?

Plans each config without a step of training, then trains it for some steps and takes the largest
bytes of each part that `MemoryMonitor` logged.
"""

import argparse
import csv
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import markdown_table, new_record, write_record
from fingpt_lightning.cli.main import main as fingpt
from fingpt_lightning.metric_keys import MEMORY_PARTS
from fingpt_lightning.units import MIB

QUESTION = (
    "How far are the bytes that `fingpt plan` accounts for from those that the first steps of a run"
    " then measure?"
)
PARTS = ("weights", "gradients", "optimizer", "activations")
CONFIGS = ["configs/quickstart.yaml", "configs/finetune_smollm2_fpb.yaml"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Plans and trains each config, and writes record and table.

    Args:
        arguments: Options; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--data_dir", help="of the configs that finetune on files")
    parser.add_argument("--max_steps", type=int, default=20, help="of each run")
    options = parser.parse_args(arguments)
    record = new_record(QUESTION, {"configs": options.configs, "max_steps": options.max_steps})
    rows = []
    for config in options.configs:
        words = ["--config", config]
        if options.data_dir is not None and "finetune" in config:
            words += ["--data.data_dir", options.data_dir]
        rows.append(compare(config, words, options.max_steps))
    record["rows"] = rows
    record["summary"] = {
        "largest_part_difference": max(
            abs(1 - ratio) for row in rows for ratio in row["planned_over_measured"].values()
        ),
        "largest_total_difference": max(
            abs(1 - row["planned_over_measured"]["together"]) for row in rows
        ),
    }
    write_record(options.json, record, table(rows))
    print(json.dumps(record["summary"], indent=1))


def compare(config: str, words: Sequence[str], max_steps: int) -> dict[str, Any]:
    """Bytes of each part, planned and measured.

    Args:
        config: Path of the config, for the row.
        words: Options of ``fingpt fit``.
        max_steps: Number of steps of the run.
    """
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan.json"
        short = ["--trainer.max_steps", str(max_steps), "--trainer.limit_val_batches", "1"]
        fingpt(["plan", *words, *short, "--no_calibrate", "--json", str(plan)])
        planned = {part: json.loads(plan.read_text())["bytes"][part] / MIB for part in PARTS}
        run = Path(folder) / "run"
        # Batches differ in length: each is measured.
        each_step = {"class_path": "callbacks.MemoryMonitor", "init_args": {"every_n_steps": 1}}
        monitor = ["--trainer.callbacks", json.dumps([each_step])]
        log = ["--trainer.log_every_n_steps", "1", "--trainer.logger", "false"]
        place = ["--trainer.default_root_dir", str(run)]
        fingpt(["fit", *words, *short, *monitor, *log, *place])
        measured = largest_mib(run / "metrics.csv")
    for found in (planned, measured):
        found["together"] = sum(found[part] for part in PARTS)
    ratios = {key: planned[key] / measured[key] for key in planned}
    return {
        "contender": Path(config).stem,
        "repeats": max_steps,
        "planned_mib": _rounded(planned, 2),
        "measured_mib": _rounded(measured, 2),
        "planned_over_measured": _rounded(ratios, 4),
    }


def largest_mib(metrics: Path) -> dict[str, float]:
    """For each part the largest number of bytes that a run logged.

    Args:
        metrics: Path of its ``metrics.csv``.
    """
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        part: max(float(cell) for row in rows if (cell := row.get(MEMORY_PARTS[part])))
        for part in PARTS
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A row per config and part."""
    header = ["", "planned (MiB)", "measured (MiB)", "planned / measured"]
    cells = [
        [
            f"{row['contender']}, {part}",
            f"{row['planned_mib'][part]:,.1f}",
            f"{row['measured_mib'][part]:,.1f}",
            f"{row['planned_over_measured'][part]:.3f}",
        ]
        for row in rows
        for part in (*PARTS, "together")
    ]
    return markdown_table(header, cells)


def _rounded(values: dict[str, float], digits: int) -> dict[str, float]:
    return {key: round(value, digits) for key, value in values.items()}


if __name__ == "__main__":
    main()
