"""A PostgreSQL server on loopback for tests and benchmarks, where one is installed."""

import os
import pwd
import shutil
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


@contextmanager
def running_postgres(programs: Path, folder: Path) -> Iterator[str]:
    """A server of its own, which ends with the context.

    Args:
        programs: Result of `find_programs`.
        folder: Empty folder; its owner becomes the server's user, since root may not run one.

    Yields:
        URL with its password.
    """
    user: int | None = None
    group: int | None = None
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        user, group = nobody.pw_uid, nobody.pw_gid
        os.chown(folder, user, group)
    word = folder / "word"
    word.write_text(PASSWORD)
    word.chmod(0o644)
    data = folder / "data"
    environment = {"PATH": str(programs), "LC_ALL": "C"}
    subprocess.run(
        [
            programs / "initdb", "--no-sync", "-A", "scram-sha-256", "-U", "tester",
            f"--pwfile={word}", "-D", data,
        ],
        check=True, capture_output=True, cwd=folder, env=environment, timeout=_TIMEOUT_S,
        user=user, group=group,
    )  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [
                programs / "postgres", "-D", data, "-p", str(port), "-c", "fsync=off",
                "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=",
            ],
            stdout=log, stderr=log, cwd=folder, env=environment, user=user, group=group,
        )  # fmt: skip
    try:
        deadline_s = time.monotonic() + _TIMEOUT_S
        while "ready to accept" not in (folder / "log").read_text():
            if server.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError((folder / "log").read_text())
            time.sleep(0.05)
        yield f"postgresql://tester:{PASSWORD}@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()  # by its process id; waits for its clients to end
        try:
            server.wait(5)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
