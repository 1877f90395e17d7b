"""How the ranks of a run meet: bounded in time, and with a line that names who is awaited where."""

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from fingpt_lightning.terminal.messages import first_line

START_S = 1800
"""How long ranks may be apart at the start, where nothing else is set."""

_POLL_S = 0.1
_LEAVE_S = 1.0
"""How long the first rank still serves the store, for others to read why the run ends."""
_PREFIX, _WORLD_SIZE, _ENDED = "fingpt", "world_size", "ended"

_T = TypeVar("_T")


class MeetingError(RuntimeError):
    """The ranks of a run did not come together."""


def meet(
    address: str,
    port: int,
    rank: int,
    world_size: int,
    timeout_s: float | int,
    is_hopeless: Callable[[], str | None] = lambda: None,
) -> Store:
    """Waits until all ranks of a run are there; gives the store that they share.

    The first rank serves the store; under torchrun its agent does.

    Args:
        address: Name or address of the host of the first rank.
        port: Port of the store.
        rank: Number of this process.
        world_size: Number of processes, which all ranks must agree on.
        timeout_s: Seconds of the longest wait.
        is_hopeless: Function that gives a reason to stop waiting at once, such as the end of a
            process that was awaited.

    Raises:
        MeetingError: The port is taken, the address is wrong, a rank is missing or came twice, or
            the ranks do not agree on their number.
    """
    return _Meeting(address, port, rank, world_size, timeout_s, is_hopeless).hold()


class _Meeting:
    """One call of `meet`."""

    def __init__(
        self,
        address: str,
        port: int,
        rank: int,
        world_size: int,
        timeout_s: float | int,
        is_hopeless: Callable[[], str | None],
    ) -> None:
        self._address, self._port, self._rank, self._world_size = address, port, rank, world_size
        self._timeout_s, self._is_hopeless = timeout_s, is_hopeless
        self._place = f"{address}:{port}"
        self._serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._deadline_s = time.monotonic() + timeout_s
        self._missing: list[int] | None = None

    def hold(self) -> Store:
        store = self._serve() if self._serves else self._reach()
        # Ranks that torchrun starts again meet at the same store.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        own = PrefixStore(f"{_PREFIX}/{attempt}", store)
        # A connection that was cut does not have a limit of its own.
        self._bounded(lambda: self._come(own), self._who_is_missing)
        return store

    def _serve(self) -> TCPStore:
        try:
            return self._store(is_server=True)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" in str(error) or "in use" in str(error):
                raise MeetingError(
                    f"rank 0 cannot await the others at {self._place}: the port is taken by another"
                    " program; set MASTER_PORT to one that is free"
                ) from None
            raise MeetingError(
                f"rank 0 cannot listen at {self._place}: {first_line(error)}"
            ) from None

    def _reach(self) -> TCPStore:
        self._bounded(self._knock, lambda: self._unanswered)
        return self._bounded(
            self._store,
            lambda: (
                f"what answers at {self._place} is not rank 0 of this run: see MASTER_ADDR and"
                " MASTER_PORT"
            ),
        )

    def _store(self, is_server: bool = False) -> TCPStore:
        return TCPStore(
            self._address,
            self._port,
            self._world_size,
            is_master=is_server,
            timeout=timedelta(seconds=self._timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )

    def _knock(self) -> None:
        """Waits for a listener, so that torch need not, which describes each try at length."""
        self._unanswered = f"no answer from rank 0 at {self._place}"
        while (left_s := self._left_s()) > 0:
            try:
                socket.create_connection((self._address, self._port), left_s).close()
                return
            except socket.gaierror as error:
                self._unanswered = (
                    f"MASTER_ADDR {self._address} cannot be resolved ({error.strerror})"
                )
            except OSError as error:
                reason = error.strerror or str(error)
                self._unanswered = (
                    f"rank 0 does not answer at {self._place} ({reason}): it has not come, or"
                    " MASTER_ADDR or MASTER_PORT is wrong"
                )
            time.sleep(_POLL_S)
        raise MeetingError(self._unanswered)

    def _come(self, store: Store) -> None:
        """Leaves this rank's name, and returns when all others have left theirs."""
        who = f"process {os.getpid()} on {socket.gethostname()}"
        size = int(store.compare_set(_WORLD_SIZE, "", str(self._world_size)))
        if size != self._world_size:
            self._end(
                store,
                f"rank {self._rank} ({who}) counts {self._world_size} ranks, the others at"
                f" {self._place} count {size}: trainer.devices x trainer.num_nodes must be the same"
                " on all",
            )
        first = store.compare_set(f"rank{self._rank}", "", who).decode()
        if first != who:
            self._end(
                store,
                f"rank {self._rank} of {self._world_size} has come twice to {self._place}: {first}"
                f" and {who}; give each node its own NODE_RANK",
            )
        self._missing = list(range(self._world_size))
        while self._missing:
            if store.check([_ENDED]):
                raise MeetingError(store.get(_ENDED).decode())
            self._missing = [r for r in self._missing if not store.check([f"rank{r}"])]
            if self._missing and (reason := self._is_hopeless()):
                self._end(store, reason)
            if self._missing and self._left_s() <= 0:
                self._end(store, self._who_is_missing())
            if self._missing:
                time.sleep(_POLL_S)

    def _end(self, store: Store, reason: str) -> None:
        store.set(_ENDED, reason)
        if self._serves:
            time.sleep(_LEAVE_S)
        raise MeetingError(reason)

    def _who_is_missing(self) -> str:
        if self._missing is None:
            return f"rank 0 at {self._place} does not answer any more"
        come = self._world_size - len(self._missing)
        names = ", ".join(map(str, self._missing[:8])) + (", ..." if len(self._missing) > 8 else "")
        noun = "rank" if len(self._missing) == 1 else "ranks"
        return (
            f"{come} of {self._world_size} ranks have come to {self._place}; still awaited: {noun}"
            f" {names}"
        )

    def _left_s(self) -> float:
        return max(0.0, self._deadline_s - time.monotonic())

    def _bounded(self, work: Callable[[], _T], why: Callable[[], str]) -> _T:
        """What ``work`` returns, in a thread: neither a lookup nor a store has a limit."""
        results: list[_T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True, name="fingpt-meeting")
        thread.start()
        thread.join(self._left_s() + 2 * _LEAVE_S)
        if results:
            return results[0]
        if errors and isinstance(errors[0], MeetingError):
            ended = str(errors[0])
        elif errors and not isinstance(errors[0], RuntimeError | OSError):
            raise errors[0]
        else:
            ended = why()
        waited = "" if errors and self._left_s() > 0 else f" after {self._timeout_s:g} s"
        raise MeetingError(f"{ended}{waited and f' (given up{waited})'}") from None
