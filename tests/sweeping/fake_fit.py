"""Stands in for ``fingpt fit`` where a test is about the sweep: its loss is the rank."""

import argparse
import csv
import json
import sys
import time
from pathlib import Path


def main(words: list[str]) -> None:
    """Leaves what a run leaves; the arguments say how it goes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--trainer.default_root_dir", dest="folder", type=Path)
    options, _ = parser.parse_known_args(words)
    model = json.loads(options.config.read_text())["model"]
    (options.folder / "started.txt").write_text(str(time.time_ns()))
    steps, rank = model.get("steps", 1), model["rank"]
    for step in range(steps):
        rows = [{"step": past, "val/loss": rank + steps - past - 1} for past in range(step + 1)]
        with (options.folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["step", "val/loss"])
            writer.writeheader()
            writer.writerows(rows)
        time.sleep(model.get("step_time_s", 0))
        if rank == model.get("waits_at"):
            _wait_for(options.folder.parents[1] / "go")
    if rank == model.get("fails_at"):
        print("a warning\nfingpt: error (rank 1): it diverged\nmore words")
        raise SystemExit(1)
    settings = {
        "model": model,
        "trainer": {"default_root_dir": str(options.folder), "logger": True, "callbacks": None},
        "best_checkpoint": {"dirpath": "here"},
        "last_checkpoint": {"dirpath": "here"},
    }
    (options.folder / "config.yaml").write_text(json.dumps(settings))


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


if __name__ == "__main__":
    main(sys.argv[1:])
