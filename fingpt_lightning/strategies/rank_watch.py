"""Notices a rank that is lost, reports it on all others, and ends them.

All ranks but the first hold a connection to the first one, over which each reports that it lives
and the state of its main thread. A rank whose connection closes is lost at once, one that is silent
after `RankWatch.timeout_s`; one that lives and keeps others waiting is found when their wait has
ended. The first rank names the lost one to all, so that each ends with the same reason.
"""

import contextlib
import itertools
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Any, NamedTuple

import psutil
from torch.distributed.distributed_c10d import Store

from fingpt_lightning.terminal.messages import error_line

_POLL_S = 0.1
_MAX_BEAT_S = 1.0
_LAST_WORDS_S = 2.0
"""How long a rank that lost another has to end by itself, once its main thread knows."""
_STUCK_S = 1.0
"""How long a main thread that waits for a lost rank has to notice by itself."""
_BUSY_S = 30.0
"""The same of one that does not wait for a rank that has ended."""
_VERDICT_S = 1.5
"""How long a rank that waited in vain lets the first rank find out for whom."""
_HEARING_S = 0.4
"""How long the first rank collects who else waited in vain before it names one."""
_MAX_MESSAGE_BYTES = 65536
_WAITING_IN = f"{os.sep}torch{os.sep}distributed{os.sep}"
_BACKWARD_IN = f"{os.sep}torch{os.sep}autograd{os.sep}"
_ACTIVITIES = {
    "training_step": "a training step",
    "optimizer_step": "an optimizer step",
    "validation_step": "validation",
    "test_step": "testing",
    "predict_step": "prediction",
    "save_checkpoint": "saving a checkpoint",
    "restore": "restoring a checkpoint",
    "configure_model": "building the network",
    "setup_environment": "the meeting of the ranks",
}
"""What a rank does while a function of this name is on its stack."""

_numbers = itertools.count()


class Identity(NamedTuple):
    """Which process a rank is.

    Attributes:
        rank: Number of the process among all.
        host: Name of the host.
        process: Process id.
        birth: Time at which the process began, as its host tells it.
        machine: Identity of the machine, which processes share that can signal each other.
    """

    rank: int
    host: str
    process: int
    birth: float
    machine: str

    @classmethod
    def own(cls, rank: int) -> "Identity":
        """Identity of this process."""
        boot = Path("/proc/sys/kernel/random/boot_id")
        space = Path("/proc/self/ns/pid")
        machine = socket.gethostname()
        if boot.exists():
            machine = boot.read_text(encoding="utf-8").strip()
        if space.is_symlink():
            machine += str(space.readlink())
        process = os.getpid()
        return cls(rank, socket.gethostname(), process, _birth(process), machine)

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.process})"


class _Verdict(NamedTuple):
    """Why the run ends.

    Attributes:
        reason: Reason in one line.
        lost: Processes to kill where they can be reached: else they would stay for ever.
        is_silent: Whether those cannot end by themselves and give a reason.
    """

    reason: str
    lost: tuple[Identity, ...] = ()
    is_silent: bool = False


class _Peer:
    """A rank at the other end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.identity: Identity | None = None
        self.heard_s = time.monotonic()
        self.place, self.waits = "", False
        self.gave_up = False
        self._received = b""

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # full or closed: the other side's silence will show it
            self.connection.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None where the connection is closed."""
        try:
            data = self.connection.recv(_MAX_MESSAGE_BYTES)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            return None
        if not data or len(self._received) + len(data) > _MAX_MESSAGE_BYTES * 2:
            return None
        self.heard_s = time.monotonic()
        *lines, self._received = (self._received + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self.heard_s


class RankWatch:
    """Watches all other ranks from a thread of this process; all ranks make it together.

    Args:
        rank: Number of this process.
        world_size: Number of processes.
        address: Name or address of the host of the first rank.
        store: Store that all ranks share.
        timeout_s: Seconds of silence after which a rank is lost.
        before_exit: Function called before this process is ended, for processes that it has
            started.

    Attributes:
        timeout_s: Timeout as above, which may be changed while the watch runs.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        address: str,
        store: Store,
        timeout_s: float | int,
        before_exit: Callable[[], None] = lambda: None,
    ) -> None:
        self.timeout_s = timeout_s
        self._identity = Identity.own(rank)
        self._main = threading.main_thread().ident
        self._before_exit = before_exit
        self._verdict: _Verdict | None = None
        self._decided = threading.Event()
        self._closing = threading.Event()
        self._gave_up_s: float | None = None
        self._others_gave_up_s: float | None = None
        self._told_gave_up = False
        self._ended: str | None = None
        self._waited_at = ""
        self._peers: list[_Peer] = []
        self._listener: socket.socket | None = None
        self._token = ""
        self._world_size = world_size
        key = f"fingpt/watch/{next(_numbers)}"
        if rank == 0:
            self._listener = _listening(world_size)
            self._listener.setblocking(False)
            self._token = secrets.token_hex(16)
            store.set(key, f"{self._listener.getsockname()[1]} {self._token}")
        else:
            port, token = store.get(key).decode().split()
            try:
                connection = socket.create_connection((address, int(port)), timeout=timeout_s)
            except OSError as error:
                raise RuntimeError(
                    f"rank {rank} cannot reach rank 0 at {address}:{port}, where each says that it"
                    f" lives ({error.strerror or error}): ranks must reach all ports of {address}"
                ) from None
            hub = _Peer(connection)
            hub.send(token=token, who=list(self._identity))
            self._peers = [hub]
        self._thread = threading.Thread(target=self._run, daemon=True, name="fingpt-rank-watch")
        self._thread.start()

    def explain(self, error: BaseException) -> str | None:
        """Why a wait for another rank ended in ``error``: which one is lost, as far as is known.

        From now on this process has some seconds to end by itself.
        """
        frames = list(walk_tb(error.__traceback__))
        activity = _activity([frame.f_code.co_name for frame, _ in reversed(frames)])
        if frames:
            self._waited_at = f"{activity}|{_place(*frames[-1])}"
        self._gave_up_s = time.monotonic()
        self._decided.wait(_VERDICT_S)
        if self._verdict is None:
            hub = next((p for p in self._peers if p.identity is not None), None)
            if self._identity.rank and hub is not None and hub.silent_s > 3 * self._beat_s:
                self._decide(self._silent(hub))
        if self._verdict is None:
            return None
        if self._verdict.is_silent:  # this process may be gone before its thread comes to it
            _kill(self._others_here(self._verdict))
        return f"{self._verdict.reason}; rank {self._identity.rank} awaited it in {activity}"

    def leave(self, reason: str | None = None) -> None:
        """Ends the watch of this rank.

        Args:
            reason: Reason of its failure, for the others; None where it ends well.
        """
        if self._verdict is not None and self._gave_up_s is not None:
            return  # the thread sees to it that this process ends
        self._ended = reason or ""
        self._closing.set()
        self._thread.join()

    @property
    def _beat_s(self) -> float:
        return min(_MAX_BEAT_S, self.timeout_s / 10)

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        if self._listener is not None:
            selector.register(self._listener, selectors.EVENT_READ)
        for peer in self._peers:
            selector.register(peer.connection, selectors.EVENT_READ, peer)
        try:
            next_beat_s = looked_s = time.monotonic()
            while self._verdict is None and not self._closing.is_set():
                for key, _ in selector.select(_POLL_S):
                    self._take(key.data, selector)
                now_s = time.monotonic()
                if now_s - looked_s > 5 * _POLL_S + self._beat_s:
                    # All of us were stopped, or this thread was: silence proves nothing.
                    for peer in self._peers:
                        peer.heard_s = max(peer.heard_s, now_s - self._beat_s)
                looked_s = now_s
                if now_s >= next_beat_s:
                    next_beat_s = now_s + self._beat_s
                    self._beat()
                self._judge()
            if self._verdict is None:
                self._tell(ended=self._ended)
            else:
                reason, lost, is_silent = self._verdict
                self._tell(verdict=reason, lost=[list(i) for i in lost], is_silent=is_silent)
        finally:
            selector.close()
            self._decided.set()
            if self._verdict is None:
                self._close()
        if self._verdict is not None:
            self._end_process(self._verdict)

    def _take(self, peer: _Peer | None, selector: selectors.BaseSelector) -> None:
        if peer is None:
            assert self._listener is not None
            with contextlib.suppress(OSError):
                connection, _ = self._listener.accept()
                peer = _Peer(connection)
                self._peers.append(peer)
                selector.register(connection, selectors.EVENT_READ, peer)
            return
        messages = peer.receive()
        for message in messages or []:
            if not self._understand(peer, message):
                messages = None
                break
        if messages is None:
            selector.unregister(peer.connection)
            self._drop(peer)
            if peer.identity is not None and self._verdict is None and not self._closing.is_set():
                self._decide(
                    _Verdict(
                        f"{peer.identity} is lost: its connection closed without a word (killed, or"
                        f" its host went down){self._last_seen(peer)}"
                    )
                )

    def _understand(self, peer: _Peer, message: dict[str, Any]) -> bool:
        """Acts on a message; False where the connection is to be dropped."""
        if peer.identity is None and self._identity.rank == 0:
            if message.get("token") != self._token:
                return False
            peer.send(who=list(self._identity))
        if "who" in message:
            peer.identity = Identity(*message["who"])
        if "place" in message:
            peer.place, peer.waits = message["place"], message["waits"]
        if "gave_up" in message:
            peer.gave_up = True
            self._others_gave_up_s = self._others_gave_up_s or time.monotonic()
        if "verdict" in message:
            lost = tuple(Identity(*i) for i in message["lost"])
            self._decide(_Verdict(message["verdict"], lost, message["is_silent"]))
        if "ended" in message:
            who, peer.identity = peer.identity, None
            if message["ended"]:
                self._decide(_Verdict(f"{who} failed: {message['ended']}"))
            elif self._identity.rank:
                self._closing.set()  # all is done, or another rank will be missed by its peers
            return False
        return True

    def _beat(self) -> None:
        place, waits = self._where()
        for peer in self._peers:
            if self._identity.rank or peer.identity is not None:
                peer.send(place=place, waits=waits)

    def _judge(self) -> None:
        if self._gave_up_s is not None and not self._told_gave_up:
            self._told_gave_up = True
            place, waits = self._where()
            self._tell(gave_up=True, place=place, waits=waits)
        known = [peer for peer in self._peers if peer.identity is not None]
        lost = [peer for peer in known if peer.silent_s > self.timeout_s]
        if lost:
            self._decide(self._silent(*lost))
            return
        if self._identity.rank:
            return
        since_s = [self._gave_up_s, self._others_gave_up_s]
        first_s = min((s for s in since_s if s is not None), default=None)
        if first_s is not None and time.monotonic() - first_s > _HEARING_S:
            self._decide(self._kept_waiting(known))

    def _silent(self, *lost: _Peer) -> _Verdict:
        identities = tuple(peer.identity for peer in lost if peer.identity is not None)
        who = " and ".join(map(str, identities))
        silent_s = min(peer.silent_s for peer in lost)
        return _Verdict(
            f"{who} {'is' if len(identities) == 1 else 'are'} lost: no sign of life for"
            f" {silent_s:.1f} s (timeout_s {self.timeout_s:g}){self._last_seen(lost[0])}",
            identities,
            is_silent=True,
        )

    def _kept_waiting(self, known: list[_Peer]) -> _Verdict:
        silent = [peer for peer in known if peer.silent_s > 3 * self._beat_s + _POLL_S]
        if silent:
            return self._silent(*silent)
        place, waits = self._where()
        own = (self._identity, place, waits or self._gave_up_s is not None)
        others = [(p.identity, p.place, p.waits or p.gave_up) for p in known]
        ranks = [own, *others]
        busy = [(who, at) for who, at, is_waiting in ranks if not is_waiting]
        busy = [(who, at) for who, at in busy if _BACKWARD_IN not in at] or busy
        if not busy:
            places = "; ".join(f"{who}: {_short(at)}" for who, at, _ in ranks)
            return _Verdict(
                f"all ranks wait for each other, for timeout_s {self.timeout_s:g}: a connection"
                f" between two of them may be cut ({places})"
            )
        who = "; ".join(f"{who} is {_short(at)}" for who, at in busy)
        identities = tuple(i for i, _ in busy if i is not None)
        return _Verdict(
            f"no answer for timeout_s {self.timeout_s:g} while the others waited: {who}", identities
        )

    def _last_seen(self, peer: _Peer) -> str:
        return f"; last seen {_short(peer.place)}" if peer.place else ""

    def _where(self) -> tuple[str, bool]:
        """What the main thread does, and whether it waits for other ranks."""
        if self._waited_at:
            return self._waited_at, True
        frame = sys._current_frames().get(self._main or 0)
        if frame is None:
            return "", False
        waits = _WAITING_IN in frame.f_code.co_filename
        return f"{_activity(_functions(frame))}|{_place(frame, frame.f_lineno)}", waits

    def _decide(self, verdict: _Verdict) -> None:
        if self._verdict is None:
            self._verdict = verdict
            self._decided.set()

    def _tell(self, **message: Any) -> None:
        for peer in self._peers:
            peer.send(**message)

    def _end_process(self, verdict: _Verdict) -> None:
        """Lets the main thread end by itself, then ends the process, with all that is left."""
        own = [i for i in verdict.lost if i.rank == self._identity.rank]
        others = self._others_here(verdict)
        if verdict.is_silent:
            _kill(others)
        began_s = time.monotonic()
        while not own and time.monotonic() - began_s < self._grace_s(verdict):
            if self._closing.is_set():  # the main thread has an error of its own, or is done
                self._close()
                return
            time.sleep(_POLL_S / 2)
        _kill(others)
        if "_call_and_handle_interrupt" in _functions(sys._current_frames().get(self._main or 0)):
            place, _ = self._where()
            awaited = "" if own else f"; rank {self._identity.rank} was {_short(place)}"
            sys.stderr.write(error_line(f"{verdict.reason}{awaited}", self._identity.rank) + "\n")
            sys.stderr.flush()
        self._before_exit()
        os._exit(1)

    def _others_here(self, verdict: _Verdict) -> list[Identity]:
        """The lost ranks of this machine, without this process."""
        rank, machine = self._identity.rank, self._identity.machine
        return [i for i in verdict.lost if i.machine == machine and i.rank != rank]

    def _grace_s(self, verdict: _Verdict) -> float:
        """How long the main thread is let be, which may be about to fail of the same."""
        if self._gave_up_s is not None:
            return _LAST_WORDS_S
        _, waits = self._where()
        return _STUCK_S if waits or verdict.is_silent else min(self.timeout_s, _BUSY_S)

    def _drop(self, peer: _Peer) -> None:
        self._peers.remove(peer)
        peer.connection.close()

    def _close(self) -> None:
        for peer in list(self._peers):
            self._drop(peer)
        if self._listener is not None:
            self._listener.close()


def _listening(backlog: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=backlog, dualstack_ipv6=both)


def _functions(frame: FrameType | None) -> list[str]:
    names = []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names


def _place(frame: FrameType, line: int) -> str:
    return f"{frame.f_code.co_filename}:{line} {frame.f_code.co_name}"


def _activity(functions: Sequence[str]) -> str:
    return next((_ACTIVITIES[name] for name in functions if name in _ACTIVITIES), "the run")


def _short(place: str) -> str:
    """``in validation, at pipeline/runtime.py:310 (recv)``."""
    activity, _, where = place.partition("|")
    path, _, function = where.rpartition(" ")
    return f"in {activity}, at {'/'.join(Path(path).parts[-2:])} ({function})"


def _birth(process: int) -> float:
    """When a process began: in ticks since the boot where there is ``/proc``, else in seconds.

    The seconds of Linux's own boot are a clock's, which is corrected in between: one process would
    seem to be two.

    Raises:
        psutil.Error, OSError: There is no such process.
    """
    if not Path("/proc/self/stat").exists():
        return psutil.Process(process).create_time()
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return float(fields[19])


def _kill(identities: Iterable[Identity]) -> None:
    """Ends processes of this machine that would never notice that the others are gone."""
    for identity in identities:
        with contextlib.suppress(psutil.Error, OSError):
            if _birth(identity.process) == identity.birth:
                os.kill(identity.process, signal.SIGKILL)
