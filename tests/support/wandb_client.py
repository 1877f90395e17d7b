"""Real clients of the loopback server, each in a process of its own."""

import os
from pathlib import Path

from tests.support.wandb_server import WandbServer
from tests.support.warm_python import ROOT, run_warm

_TIMEOUT_S = 250


def run_client(server: WandbServer, folder: Path, *arguments: str, **variables: str) -> str:
    """Runs Python to its end; returns its output, if it succeeded.

    Args:
        server: Only server that it reaches.
        folder: Folder where it runs.
        arguments: Arguments of Python.
        variables: Variables of the environment, beside those of the server.
    """
    env = server.environment(folder) | {"PYTHONPATH": os.fspath(ROOT)} | variables
    done = run_warm(arguments, cwd=folder, env=env, timeout=_TIMEOUT_S, merges=True)
    assert done.returncode == 0, done.stdout
    return done.stdout
