import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed

from tests.support.leaks import ProcessState


def _join_alone(folder: Path) -> None:
    rendezvous = (folder / "rendezvous").as_uri()
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)


@pytest.mark.parametrize(
    ("leak", "expected"),
    [
        (lambda folder: os.environ.update(LEAKED="1"), "environment variable LEAKED: None -> 1"),
        (lambda folder: os.environ.pop("OMP_NUM_THREADS"), "OMP_NUM_THREADS: 1 -> None"),
        (os.chdir, "working directory"),
        (lambda folder: torch.set_default_dtype(torch.float64), "default dtype torch.float64"),
        (lambda folder: torch.set_num_threads(2), "number of torch threads 2"),
        (_join_alone, "torch.distributed process group"),
    ],
)
def test_a_leak_is_told_once_and_taken_back(
    leak: Callable[[Path], None], expected: str, tmp_path: Path
) -> None:
    before = ProcessState.now()
    leak(tmp_path)
    (message,) = before.leaks()
    assert expected in message
    before.restore()
    assert before.leaks() == []


def test_a_thread_that_stays_is_told_and_one_that_ends_is_not() -> None:
    before = ProcessState.now()
    may_end = threading.Event()
    staying = threading.Thread(target=may_end.wait, name="staying", daemon=True)
    staying.start()
    threading.Timer(0.2, int).start()
    assert before.leaks() == ["thread staying"]
    may_end.set()
    assert before.leaks() == []


def test_variables_of_libraries_are_no_leak_but_are_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # a fixture of a module may have seeded
    before = ProcessState.now()
    os.environ["PL_GLOBAL_SEED"] = "7"
    assert before.leaks() == []
    before.restore()
    assert "PL_GLOBAL_SEED" not in os.environ


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_no_test_reaches_beyond_the_loopback(family: socket.AddressFamily) -> None:
    address = ("192.0.2.1" if family == socket.AF_INET else "2001:db8::1", 443)
    with socket.socket(family) as client:
        for connect in (client.connect, client.connect_ex):
            with pytest.raises(ConnectionRefusedError, match=f"no network: {address[0]}:443"):
                connect(address)


def test_a_test_reaches_its_own_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.connect(server.getsockname())
        server.accept()[0].close()
