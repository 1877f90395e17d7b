"""Does a long run grow? Memory and open files of a training and of a labeling, as they go on."""

import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from lightning.pytorch import Callback, Trainer

from benchmarks.endurance_trials import Child, Found, Program, Sizes
from fingpt_lightning.data.corpus import SyntheticCorpus
from fingpt_lightning.deploy import label_command, labelling
from fingpt_lightning.deploy.labelled_file import LabelledFile
from fingpt_lightning.units import MIB

MOST_GROWTH = 0.01
"""Largest share by which a process may grow over the second half of its work."""
_WINDOW = 0.05
"""Share of the work over which a figure is the median."""
_CHUNK_ROWS = 1024
_MOST_SECONDS = 7200.0
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_STEPS_PER_SAMPLE = 5


class Sample(NamedTuple):
    """A process at one moment.

    Attributes:
        progress: Share of its work that is done.
        rss_bytes: Its resident memory.
        num_files: Number of its open file descriptors.
    """

    progress: float
    rss_bytes: int
    num_files: int


class Samples(Callback):
    """Samples its own process while it trains, and writes the samples when training ends.

    Args:
        file: File of the samples.
        max_steps: Number of steps in all.
    """

    def __init__(self, file: str, max_steps: int) -> None:
        self._file, self._max_steps = Path(file), max_steps
        self._samples: list[Sample] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Takes a sample every few steps."""
        if trainer.global_step % _STEPS_PER_SAMPLE == 0:
            self._samples.append(sampled(trainer.global_step / self._max_steps))

    def on_train_end(self, *_: Any) -> None:
        """Writes the samples."""
        self._file.write_text(json.dumps(self._samples))


def sampled(progress: float) -> Sample:
    """This process as it is now."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    return Sample(progress, resident, len(os.listdir("/proc/self/fd")))  # noqa: PTH208  # counts


def leaks(sizes: Sizes) -> Found:
    """Trains and labels for long, where ``fit`` and ``label`` are among the programs."""
    found = Found([], [], [])
    rows = []
    for name in sizes.names:
        if name not in ("fit", "label"):
            continue
        folder = sizes.folder / f"long-{name}"
        folder.mkdir()
        began_s = time.monotonic()
        train_or_label = _trained if name == "fit" else _labelled
        work, samples = train_or_label(sizes, sizes.programs[name], folder)
        row = {"program": name, "work": work, **growth(samples)}
        rows.append(row | {"seconds": round(time.monotonic() - began_s)})
    counts = [
        len(rows),
        sum(row["growth_percent"] > 100 * MOST_GROWTH for row in rows),
        sum(row["files_at_end"] > row["files_at_half"] for row in rows),
    ]
    return found._replace(rows=rows, counts=counts)


def growth(samples: Sequence[Sample]) -> dict[str, Any]:
    """How a process changed over the second half of its work.

    Args:
        samples: Samples in the order of their time, from all of the work.
    """

    def median(begin: float, field: str) -> float:
        own: list[float] = [
            getattr(x, field) for x in samples if begin <= x.progress <= begin + _WINDOW
        ]
        return statistics.median(own)

    half, end = (median(begin, "rss_bytes") for begin in (0.5, 1 - _WINDOW))
    return {
        "samples": len(samples),
        "rss_mib_at_half": round(half / MIB, 2),
        "rss_mib_at_end": round(end / MIB, 2),
        "growth_percent": round(100 * (end / half - 1), 3),
        "files_at_half": int(median(0.5, "num_files")),
        "files_at_end": int(median(1 - _WINDOW, "num_files")),
    }


def _trained(sizes: Sizes, program: Program, folder: Path) -> tuple[str, list[Sample]]:
    long, file = sizes.long, folder / "samples.json"
    own: Mapping[str, Any] = {
        "class_path": f"{__name__}.Samples",
        "init_args": {"file": str(file), "max_steps": long.num_steps},
    }
    names = ("MemoryMonitor", "ThroughputMonitor", "CompressionMonitor", "RunSummary")
    trainer = {
        "max_steps": long.num_steps,
        "val_check_interval": long.num_steps // long.num_validations,
        "callbacks": [*({"class_path": f"callbacks.{name}"} for name in names), own],
    }
    interval = max(1, long.num_steps // 40)
    config = folder / "long.json"
    config.write_text(
        json.dumps({"trainer": trainer, "last_checkpoint": {"every_n_train_steps": interval}})
    )
    given = program.words(folder)
    assert given is not None
    words = given[: given.index("--ckpt_path")]
    _run([*words, "--config", str(config)], folder)
    samples = [Sample(*sample) for sample in json.loads(file.read_text())]
    return f"{long.num_steps:,} steps, {long.num_validations} validations", samples


def _labelled(sizes: Sizes, program: Program, folder: Path) -> tuple[str, list[Sample]]:
    num_rows, file = sizes.long.num_rows, folder / "samples.json"
    texts = [piece.text[:80] for piece in SyntheticCorpus(500, seed=3).pieces()]
    rows = folder / "rows.jsonl"
    with rows.open("w") as opened:
        for number in range(num_rows):
            opened.write(json.dumps({"text": f"{texts[number % len(texts)]} {number}"}) + "\n")
    words = program.words(folder)
    assert words is not None
    words[words.index("--input") + 1] = str(rows)
    with _sampled_parts(file, num_rows):
        _run(words, folder)
    lines = file.read_text().splitlines()
    samples = [Sample(*json.loads(line)) for line in lines]
    return f"{num_rows:,} rows", samples


@contextmanager
def _sampled_parts(file: Path, num_rows: int) -> Iterator[None]:
    """Within it a forked ``label`` samples itself after each part of its output."""
    add = LabelledFile.add
    # 50 samples or more, and parts of the usual size where there are rows enough.
    chunk_rows = min(_CHUNK_ROWS, -(-num_rows // 50))

    def add_and_sample(self: LabelledFile, number: int, rows: Any, names: Any) -> None:
        add(self, number, rows, names)
        progress = min(1.0, (number + 1) * chunk_rows / num_rows)
        with file.open("a") as opened:
            opened.write(json.dumps(sampled(progress)) + "\n")

    with (
        mock.patch.object(labelling, "CHUNK_ROWS", chunk_rows),
        mock.patch.object(label_command, "CHUNK_ROWS", chunk_rows),
        mock.patch.object(LabelledFile, "add", add_and_sample),
    ):
        yield


def _run(words: Sequence[str], folder: Path) -> None:
    child = Child(words, folder, folder)
    if status := child.wait(_MOST_SECONDS):
        raise RuntimeError(f"{words} ended with {status}: {child.log.read_text()[-2000:]}")
