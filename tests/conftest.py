"""What holds for every test: a seed, one thread, no network, nothing left behind."""

import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy
import pytest
import torch

from tests.support.leaks import ProcessState

# Looking for doctests imports every file, and this one turns the process into one with a GPU.
collect_ignore = ["support/cuda_emulation/recipes.py"]

# Read when the libraries are imported, and by child processes.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_MODE": "offline",
}
# Sums do not depend on the machine's number of cores, and pytest-xdist's workers do not compete.
torch.set_num_threads(1)

hypothesis.settings.register_profile("local", max_examples=25, deadline=None)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("local"), derandomize=True
)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "local")

_SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real texts and tokenizers beside the repository."""
    if not _SHARED_DATA.is_dir():
        pytest.skip("../shared/data, the folder of real texts and tokenizers, is absent")
    return _SHARED_DATA


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    # The first fixture of a test: it looks when all others, monkeypatch too, have been undone.
    before = ProcessState.now()
    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002 (libraries draw from the global generator)
    torch.manual_seed(0)
    yield
    leaks = before.leaks()
    before.restore()
    if leaks:
        pytest.fail("left behind: " + "; ".join(leaks), pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _loopback_only(getattr(socket.socket, name)))
        yield


def _loopback_only(connect: Any) -> Any:
    def checked(self: socket.socket, address: Any) -> Any:
        is_internet = self.family in (socket.AF_INET, socket.AF_INET6)
        if is_internet and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise ConnectionRefusedError(f"tests have no network: {address[0]}:{address[1]}")
        return connect(self, address)

    return checked
