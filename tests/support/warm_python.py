"""Runs programs in forks of a Python that has imported torch, Lightning and our packages.

A fresh interpreter spends five seconds on these imports before anything of ours happens. A fork is
otherwise a process of its own: it has the arguments, folder, environment and files that it is
given, leads a session of its own, and ends with its own status or by a signal. If its environment
has other variables that libraries read when they are imported, it is a fresh interpreter after all.
"""

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

ROOT = Path(__file__).parents[2]
_START_TIMEOUT_S = 120.0
_RUN_TIMEOUT_S = 250.0
_RUN = subprocess.run
# As pytest has set it, not as a test changes it.
_ENV = dict(os.environ)


class WarmProcess:
    """A Python program in a process and session of its own.

    Args:
        arguments: Arguments of Python: ``-m MODULE`` or ``-c CODE``, and the program's own.
        cwd: Working directory, ours by default.
        env: Environment, ours by default.
        stdout: File that takes its output, ours by default.
        stderr: File that takes its errors, ours by default.
    """

    def __init__(
        self,
        arguments: Sequence[str | os.PathLike[str]],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: IO[Any] | int = 1,
        stderr: IO[Any] | int = 2,
    ) -> None:
        self.args = [sys.executable, *(os.fspath(word) for word in arguments)]
        self.returncode: int | None = None
        request = {
            "arguments": self.args[1:],
            "cwd": os.fspath(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
        }
        self._status, status = os.pipe()
        self._unread = b""
        with Path(os.devnull).open() as stdin:
            files = (stdin, stdout, stderr, status)
            _server().send(request, [f if isinstance(f, int) else f.fileno() for f in files])
        os.close(status)
        process_id = self._read_number(_START_TIMEOUT_S)
        assert process_id is not None, "the warm Python does not answer"
        self.pid = process_id

    def fileno(self) -> int:
        """A file that can be read when the process has ended."""
        return self._status

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while the process runs."""
        return self._end_within(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, when the process has ended.

        Raises:
            TimeoutExpired: It still runs after ``timeout`` seconds.
        """
        status = self._end_within(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill_session(self) -> None:
        """Ends the process and all those that it has started in its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _end_within(self, timeout_s: float | None) -> int | None:
        if self.returncode is None:
            self.returncode = self._read_number(timeout_s)
            if self.returncode is not None:
                os.close(self._status)
        return self.returncode

    def _read_number(self, timeout_s: float | None) -> int | None:
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            if not select.select([self._status], [], [], left_s)[0]:
                return None
            found = os.read(self._status, 64)
            assert found, "the warm Python has ended"
            self._unread += found
        number, _, self._unread = self._unread.partition(b"\n")
        return int(number)


def wait_for_any(processes: Sequence[WarmProcess], timeout_s: float) -> None:
    """Waits until one of running processes has ended, but not longer than a time."""
    select.select(processes, [], [], timeout_s)


def run_warm(
    arguments: Sequence[str | os.PathLike[str]],
    *,
    timeout: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    merges: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Runs a Python program to its end, as `subprocess.run` would, and captures what it prints.

    Args:
        arguments: Arguments of Python: ``-m MODULE`` or ``-c CODE``, and the program's own.
        timeout: Seconds after which it and all that it started are killed.
        cwd: Working directory, ours by default.
        env: Environment, ours by default.
        merges: Whether errors are put with the output, in the order of writing.

    Raises:
        TimeoutExpired: It still ran after ``timeout`` seconds; what it printed is in there.
    """
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = WarmProcess(
            arguments, cwd=cwd, env=env, stdout=stdout, stderr=stdout if merges else stderr
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise subprocess.TimeoutExpired(
                process.args, timeout, _text(stdout), _text(stderr)
            ) from error
        finally:
            if process.returncode is None:
                process.kill_session()
                process.wait()
        return subprocess.CompletedProcess(process.args, status, _text(stdout), _text(stderr))


def run_as_subprocess(
    command: Sequence[str],
    *,
    check: bool = False,
    env: Mapping[str, str] | None = None,
    capture_output: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Takes the place of `subprocess.run` in code that is tested: Python is a warm one.

    Raises:
        CalledProcessError: ``check`` is set, and the status is not 0.
    """
    if command[0] != sys.executable:
        return _RUN(command, check=check, env=env, capture_output=capture_output, **options)
    assert options.keys() <= {"text"}
    done = run_warm(command[1:], env=env, timeout=_RUN_TIMEOUT_S)
    if not capture_output:
        print(done.stdout, end="")
        print(done.stderr, end="", file=sys.stderr)
    if check:
        done.check_returncode()
    return done


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


class _Server:
    """Our end of `tests.support.warm_server`."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, tempfile.TemporaryFile() as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.warm_server", str(theirs.fileno())],
                cwd=ROOT, env=_ENV, pass_fds=[theirs.fileno()], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
            theirs.close()
            assert self._channel.recv(64) == b"ready", _text(log)

    def send(self, request: dict[str, Any], files: Sequence[int]) -> None:
        socket.send_fds(self._channel, [json.dumps(request).encode()], files)

    def stop(self) -> None:
        self._channel.close()  # it kills what still runs
        self.process.wait()


@functools.cache
def _server() -> _Server:
    server = _Server()
    atexit.register(server.stop)
    return server


def running() -> list[int]:
    """Process ids of all that were started here, and by these, and have not ended."""
    return [
        process.pid for process in psutil.Process(_server().process.pid).children(recursive=True)
    ]
