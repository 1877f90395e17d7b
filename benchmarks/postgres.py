"""A PostgreSQL server on loopback for tests and benchmarks, where one is installed."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PASSWORD = "s3cret-word"
_TIMEOUT_S = 30.0


def find_programs() -> Path | None:
    """The folder of ``initdb`` and ``postgres``; None where they are not installed."""
    if (found := shutil.which("initdb")) is not None:
        return Path(found).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return folders[-1].parent if folders else None


class Postgres:
    """A server of its own, which may be stopped and started again.

    Args:
        programs: Result of `find_programs`.
        folder: Empty folder; its owner becomes the server's user, since root may not run one.

    Attributes:
        url: URL with its password.
    """

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs, self._folder = programs, folder
        self._user: int | None = None
        self._group: int | None = None
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._user, self._group = nobody.pw_uid, nobody.pw_gid
            os.chown(folder, self._user, self._group)
        self._environment = {"PATH": str(programs), "LC_ALL": "C"}
        word = folder / "word"
        word.write_text(PASSWORD)
        word.chmod(0o644)
        subprocess.run(
            [
                programs / "initdb", "--no-sync", "-A", "scram-sha-256", "-U", "tester",
                f"--pwfile={word}", "-D", folder / "data",
            ],
            check=True, capture_output=True, cwd=folder, env=self._environment,
            timeout=_TIMEOUT_S, user=self._user, group=self._group,
        )  # fmt: skip
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"postgresql://tester:{PASSWORD}@127.0.0.1:{self._port}/postgres"
        self._server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when the server answers.

        Raises:
            RuntimeError: It does not.
        """
        log = self._folder / "log"
        with log.open("wb") as output:
            self._server = subprocess.Popen(
                [
                    self._programs / "postgres", "-D", self._folder / "data",
                    "-p", str(self._port), "-c", "fsync=off",
                    "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=",
                ],
                stdout=output, stderr=output, cwd=self._folder, env=self._environment,
                user=self._user, group=self._group,
            )  # fmt: skip
        deadline_s = time.monotonic() + _TIMEOUT_S
        while "ready to accept" not in log.read_text():
            if self._server.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(log.read_text())
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends the server and the connections of its clients at once, as a crash would."""
        if self._server is None:
            return
        self._server.send_signal(signal.SIGQUIT)
        try:
            self._server.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._server = None


@contextmanager
def running_postgres(programs: Path, folder: Path) -> Iterator[Postgres]:
    """A server that ends with the context.

    Args:
        programs: Result of `find_programs`.
        folder: Empty folder, as of `Postgres`.
    """
    server = Postgres(programs, folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
