"""Starts the program as a cluster does: several commands that wait for each other."""

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.warm_python import ROOT as ROOT
from tests.support.warm_python import WarmProcess

TIMEOUT_S = 200


def torchrun_command(*words: str) -> list[str]:
    """The arguments of Python up to where the words of ``fingpt`` begin."""
    return ["-m", "torch.distributed.run", *words, "-m", "fingpt_lightning"]


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


def run_together(
    folder: Path,
    commands: Sequence[Sequence[str]],
    variables: Sequence[dict[str, str]] | None = None,
) -> tuple[list[int], str]:
    """Exit codes and joint output of processes that wait for each other; none is left.

    Args:
        folder: Folder where they run; ``log.txt`` is written there.
        commands: Arguments of Python, one list per process.
        variables: Variables of each one's environment, beside ours.
    """
    log = folder / "log.txt"
    processes = []
    with log.open("w") as output:
        try:
            for index, command in enumerate(commands):
                own = {} if variables is None else variables[index]
                environment = os.environ | {"PYTHONPATH": str(ROOT)} | own
                processes.append(
                    WarmProcess(command, cwd=folder, env=environment, stdout=output, stderr=output)
                )
            codes = [process.wait(TIMEOUT_S) for process in processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {TIMEOUT_S} s:\n{log.read_text()}")
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill_session()  # ranks included
                    process.wait()
    return codes, log.read_text()
