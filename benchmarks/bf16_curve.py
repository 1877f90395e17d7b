"""Does a run in bfloat16 have the losses of one in float32, on this processor's own kernels?

Runs ``fingpt fit`` in both precisions, all else equal, and records both curves and what oneDNN
multiplies bfloat16 matrices with: AMX tiles where the processor has them.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import markdown_table, new_record, write_record
from fingpt_lightning.metric_keys import TRAIN_LOSS, VAL_LOSS

QUESTION = "How far are the losses of a run in bfloat16 from those of the same run in float32?"
CONTENDERS = {"float32": "32-true", "bfloat16": "bf16-mixed"}
Curve = dict[int, float]
"""Losses in nats by the number of optimizer steps."""

_ONE_PRODUCT = "import torch; x = torch.ones(64, 64, dtype=torch.bfloat16); x @ x"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs both precisions and writes record and table.

    Args:
        arguments: Options; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument(
        "fit_options", nargs=argparse.REMAINDER, help="after --: options of fingpt fit for both"
    )
    options = parser.parse_args(arguments)
    shared = [word for word in options.fit_options if word != "--"]
    record = new_record(QUESTION, {"config": options.config, "fit_options": " ".join(shared)})
    kernel = product_kernel()
    record["machine"] |= {"bfloat16_kernel": kernel, "amx": kernel is not None and "amx" in kernel}
    curves: dict[str, dict[str, Curve]] = {}
    for contender, precision in CONTENDERS.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "fingpt_lightning", "fit", "--config", options.config]
            own = ["--trainer.precision", precision, "--trainer.default_root_dir", folder]
            subprocess.run([*command, *shared, *own], check=True)
            curves[contender] = read_curves(Path(folder) / "metrics.csv")
    record["rows"] = rows(curves)
    record["summary"] = {
        f"largest_{split}_loss_difference_ratio": round(largest_difference(**pair), 5)
        for split, pair in by_split(curves).items()
    }
    write_record(options.json, record, table(curves))
    print(json.dumps(record["summary"], indent=1))


def product_kernel() -> str | None:
    """The kernel of a product in bfloat16, as oneDNN names it; None where torch does not use it."""
    done = subprocess.run(
        [sys.executable, "-c", _ONE_PRODUCT],
        env=os.environ | {"ONEDNN_VERBOSE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = (line.split(",") for line in done.stdout.splitlines() if ",cpu,matmul," in line)
    return next((words[words.index("matmul") + 1] for words in lines), None)


def read_curves(path: Path) -> dict[str, Curve]:
    """The losses of training and validation in a ``metrics.csv``.

    Raises:
        ValueError: One of the two has no losses.
    """
    keys = {"train": TRAIN_LOSS, "val": VAL_LOSS}
    curves: dict[str, Curve] = {split: {} for split in keys}
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            for split, curve in curves.items():
                if loss := line.get(keys[split]):
                    curve[int(line["step"]) + 1] = round(float(loss), 5)
    for split, curve in curves.items():
        if not curve:
            raise ValueError(f"{path} has no {keys[split]}")
    return curves


def by_split(curves: Mapping[str, Mapping[str, Curve]]) -> dict[str, dict[str, Curve]]:
    """The curves of all contenders, by ``train`` and ``val``."""
    return {
        split: {contender: both[split] for contender, both in curves.items()}
        for split in ("train", "val")
    }


def largest_difference(float32: Curve, bfloat16: Curve) -> float:
    """The largest difference at a step, over the loss in float32 there.

    Raises:
        ValueError: The curves have different steps.

    >>> largest_difference({1: 4.0, 2: 2.0}, {1: 4.0, 2: 2.1})
    0.05
    """
    if float32.keys() != bfloat16.keys():
        raise ValueError(f"steps {sorted(float32)} and {sorted(bfloat16)} differ")
    return round(max(abs(bfloat16[step] - loss) / loss for step, loss in float32.items()), 10)


def rows(curves: Mapping[str, Mapping[str, Curve]]) -> list[dict[str, Any]]:
    """The contenders for the record, one per precision."""
    return [
        {
            "contender": contender,
            "repeats": 1,
            **{
                f"{split}_curve": [
                    {"step": step, "loss_nats": loss} for step, loss in curve.items()
                ]
                for split, curve in both.items()
            },
        }
        for contender, both in curves.items()
    ]


def table(curves: Mapping[str, Mapping[str, Curve]]) -> str:
    """The losses of validation by step, and the largest difference of both curves."""
    splits = by_split(curves)
    lines = [
        [f"step {step}", f"{loss:.4f}", f"{splits['val']['bfloat16'][step]:.4f}"]
        for step, loss in splits["val"]["float32"].items()
    ]
    ends = [
        f"Largest difference, {name}: {100 * largest_difference(**splits[split]):.2f} %"
        for split, name in (("train", "training"), ("val", "validation"))
    ]
    return "\n\n".join([markdown_table(["validation loss", *CONTENDERS], lines), *ends])


if __name__ == "__main__":
    main()
