"""Ranks that do not come together are said to be missing, where and which, and nobody waits on."""

import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from fingpt_lightning.strategies.rendezvous import MeetingError, meet

TIMEOUT_S = 1.5
ENDED_WITHIN_S = TIMEOUT_S + 5


def _together(port: int, ranks: Sequence[tuple[int, int]]) -> list[str]:
    """What comes of ranks, each with the number of ranks that it counts."""
    results = [""] * len(ranks)

    def one(index: int) -> None:
        rank, world_size = ranks[index]
        try:
            store = meet("127.0.0.1", port, rank, world_size, TIMEOUT_S)
            store.set(f"own{rank}", "here")
            results[index] = store.get("own0").decode()
            time.sleep(0.2)  # the first rank serves the store
        except MeetingError as error:
            results[index] = str(error)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


@contextmanager
def _ended_in_time() -> Iterator[None]:
    began_s = time.monotonic()
    yield
    assert time.monotonic() - began_s < ENDED_WITHIN_S


def test_ranks_that_come_share_a_store() -> None:
    assert _together(_free_port(), [(0, 3), (1, 3), (2, 3)]) == ["here"] * 3


def test_a_rank_that_never_comes_is_named_by_all_others() -> None:
    port = _free_port()
    with _ended_in_time():
        said = _together(port, [(0, 4), (2, 4)])
    for line in said:
        assert f"2 of 4 ranks have come to 127.0.0.1:{port}; still awaited: ranks 1, 3" in line
        assert "given up after 1.5 s" in line


def test_ranks_that_count_differently_say_both_numbers() -> None:
    with _ended_in_time():
        first, second = _together(_free_port(), [(0, 2), (1, 3)])
    for line in (first, second):
        assert "trainer.devices x trainer.num_nodes must be the same on all" in line
        # Whichever came second speaks, and both read it.
        said = re.search(r"counts (\d+) ranks, the others at .* count (\d+):", line)
        assert said is not None, line
        assert {*said.groups()} == {"2", "3"}


def test_a_rank_that_comes_twice_is_told_who_has_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = _free_port()
    results: dict[str, str] = {}

    def one(host: str, rank: int) -> None:
        try:
            meet("127.0.0.1", port, rank, 3, TIMEOUT_S)
        except MeetingError as error:
            results[host] = str(error)

    # A name is looked up in the thread that meets, which is not ours to name: by its number.
    hosts: dict[int, str] = {}
    monkeypatch.setattr(
        socket, "gethostname", lambda: hosts.setdefault(threading.get_ident(), f"node{len(hosts)}")
    )
    threads = [
        threading.Thread(target=one, args=(str(i), rank)) for i, rank in enumerate((0, 1, 1))
    ]
    with _ended_in_time():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 3
    for line in results.values():
        assert f"rank 1 of 3 has come twice to 127.0.0.1:{port}: process" in line
        assert line.count(" on node") == 2


def test_a_port_that_is_taken_is_said_at_once() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with _ended_in_time(), pytest.raises(MeetingError, match="port is taken") as caught:
            meet("127.0.0.1", port, 0, 2, TIMEOUT_S)
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "set MASTER_PORT to one that is free" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_program_that_is_no_rank_is_not_waited_for_without_end() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with _ended_in_time(), pytest.raises(MeetingError, match="is not rank 0 of this run"):
            meet("127.0.0.1", port, 1, 2, TIMEOUT_S)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1", r"rank 0 does not answer at 127\.0\.0\.1:\d+ \(Connection refused\)"),
        ("no-such-host.invalid", "MASTER_ADDR no-such-host.invalid cannot be resolved"),
    ],
)
def test_a_wrong_address_is_said(address: str, message: str) -> None:
    with _ended_in_time(), pytest.raises(MeetingError, match=message) as caught:
        meet(address, _free_port(), 1, 2, TIMEOUT_S)
    assert "given up after 1.5 s" in str(caught.value)


def test_a_rank_that_ended_before_it_came_is_not_awaited() -> None:
    began_s = time.monotonic()
    with pytest.raises(MeetingError, match="rank 1 ended with status 2"):
        meet("127.0.0.1", _free_port(), 0, 2, 60, lambda: "rank 1 ended with status 2")
    assert time.monotonic() - began_s < 10
