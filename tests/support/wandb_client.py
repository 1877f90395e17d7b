"""Real clients of the loopback server, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.wandb_server import WandbServer

_ROOT = Path(__file__).parents[2]
_TIMEOUT_S = 250


def run_client(server: WandbServer, folder: Path, *arguments: str, **variables: str) -> str:
    """Runs Python to its end; returns its output, if it succeeded.

    Args:
        server: Only server that it reaches.
        folder: Folder where it runs.
        arguments: Arguments of Python.
        variables: Variables of the environment, beside those of the server.
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        env=server.environment(folder) | {"PYTHONPATH": os.fspath(_ROOT)} | variables,
        cwd=folder,
        timeout=_TIMEOUT_S,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
