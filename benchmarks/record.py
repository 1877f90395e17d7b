"""What every benchmark records beside its figures, and how a record is written."""

import fcntl
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from fingpt_lightning.files import to_json, write_whole
from fingpt_lightning.profiling.versions import installed_versions

_PACKAGES = ("torch", "lightning", "transformers", "bitsandbytes", "wandb")
_MAX_BYTES = 50_000


def new_record(question: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The head of a record: question, command, code, machine and versions.

    Args:
        question: Question in one sentence.
        config: Settings that determine the figures, seeds included.
    """
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {module.name}" if module is not None else Path(sys.argv[0]).name
    return {
        "question": question,
        "command": f"{program} {shlex.join(sys.argv[1:])}".rstrip(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": installed_versions(_PACKAGES),
        "config": dict(config),
    }


def started_record(
    path: Path, question: str, config: Mapping[str, Any], **parts: Any
) -> dict[str, Any]:
    """The existing record, to continue, or the head of a new one.

    Args:
        path: Path of the record.
        question: Question, as in `new_record`.
        config: Settings, as in `new_record`.
        parts: Parts of a new record beside its head.

    Raises:
        ValueError: The existing record was made with another ``config``.
    """
    if not path.exists():
        return new_record(question, config) | parts
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if record["config"] != json.loads(json.dumps(config)):
        raise ValueError(f"json {path} was made with other settings; name another file")
    return record


def machine() -> dict[str, str | int | float | None]:
    """CPU, cores and how many of them this process computes with, GPU and memory."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile.

    >>> spread([3.0, 1.0, 2.0])["median"]
    2.0
    """
    if len(values) == 1:
        return {"median": values[0], "p10": values[0], "p90": values[0]}
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p10": deciles[0], "p90": deciles[-1]}


@contextmanager
def record_lock(path: Path) -> Iterator[None]:
    """Within it no other process that uses this lock reads or writes the record ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def write_record(path: Path, record: Mapping[str, Any], table: str) -> None:
    """Writes ``path`` and the Markdown table beside it, each to a temporary file that is renamed.

    Raises:
        ValueError: The record is larger than 50 kB.
    """
    text = to_json(record, indent=1) + "\n"
    if len(text) > _MAX_BYTES:
        raise ValueError(f"the record has {len(text)} bytes, more than {_MAX_BYTES}")
    head = f"<!-- made from {path.name} by: {record['command']} -->\n{record['question']}\n\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, content in ((path, text), (path.with_suffix(".md"), head + table + "\n")):
        write_whole(target, content)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures.

    >>> print(markdown_table(["", "x"], [["a", "1"]]))
    |  | x |
    | --- | --: |
    | a | 1 |
    """
    rule = ["---"] + ["--:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def _git(*words: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
