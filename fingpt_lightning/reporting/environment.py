"""What a run ran on: command, code, machine, versions."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from fingpt_lightning.files import write_json
from fingpt_lightning.profiling.versions import installed_versions
from fingpt_lightning.terminal.messages import without_credentials
from fingpt_lightning.units import GIB

ENVIRONMENT = "environment.json"
_PACKAGES = ("fingpt-lightning", "torch", "lightning", "transformers", "bitsandbytes", "wandb")


def environment(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Command, start, git state of the code, machine and versions, for `ENVIRONMENT`.

    Args:
        words: Words of the command; None takes those of the process.
    """
    program, *rest = sys.argv if words is None else words
    return {
        "command": without_credentials(shlex.join([Path(program).name, *rest])),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(Path(__file__)),
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
            "system": platform.platform(terse=True),
        },
        "versions": installed_versions(_PACKAGES),
    }


def write_environment(folder: Path) -> None:
    """Writes `ENVIRONMENT` into a run folder, aside and then renamed."""
    write_json(folder / ENVIRONMENT, environment())


def git_state(file: Path) -> dict[str, str | bool] | None:
    """Commit and whether tracked files differ from it; None where git does not track ``file``.

    A package in an environment inside another project's checkout has no state of its own.
    """
    if _git(file, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _git(file, "rev-parse", "HEAD")
    changes = _git(file, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "dirty": bool(changes)}


def _git(file: Path, *words: str) -> str | None:
    command = ["git", "-C", str(file.parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
