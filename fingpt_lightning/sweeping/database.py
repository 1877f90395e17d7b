"""The database in which several machines keep one sweep."""

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from fingpt_lightning.files import InUseError, try_lock

DATABASE_ERRORS = (StorageInternalError, SQLAlchemyError)
HEARTBEAT_S = 15
STALE_S = 60
"""Seconds without a heartbeat after which a trial's worker counts as dead."""
_LOCK_KEY = 0x66696E677074  # "fingpt"; only this package locks it
_LOCK_PATIENCE_S = 120.0
CONNECT_S = 10
_SERVER_OPTIONS = {
    "connect_timeout": CONNECT_S,
    # A machine that vanished would else hold a connection, and with it the lock, for hours.
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    "options": (
        "-c timezone=UTC -c client_encoding=UTF8"
        " -c tcp_keepalives_idle=15 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3"
    ),
}


class Database:
    """Optuna's storage behind a URL, and a lock that all workers share.

    Args:
        url: URL of PostgreSQL or of an SQLite file.

    Attributes:
        shown: URL without its password.
        storage: Optuna's storage.

    Raises:
        ValueError: The URL is not valid, or its driver is not installed.
        RuntimeError: The server cannot be reached or refuses.
    """

    def __init__(self, url: str) -> None:
        try:
            found = sqlalchemy.make_url(url)
        except (ArgumentError, ValueError):
            raise ValueError(
                "--storage is not a database URL; write postgresql://USER@HOST/DATABASE or"
                " sqlite:///FILE"
            ) from None
        self._is_server = found.drivername != "sqlite"
        if not self._is_server and (found.host or found.database in (None, "", ":memory:")):
            raise ValueError("--storage names no SQLite file; write sqlite:///FILE")
        if self._is_server:
            found = found.set(drivername="postgresql+psycopg")
        self._password = str(found.password or "")
        self.shown = found.set(drivername=found.get_backend_name()).render_as_string()
        self._lock_file = Path(f"{found.database}.lock")
        options = _SERVER_OPTIONS if self._is_server else {"timeout": CONNECT_S}
        try:
            self._engine = sqlalchemy.create_engine(
                found, poolclass=NullPool, connect_args=options, isolation_level="AUTOCOMMIT"
            )
        except ImportError:
            raise ValueError(
                "--storage: PostgreSQL needs psycopg: pip install 'fingpt-lightning[postgres]'"
            ) from None
        # Without the lock the first workers would make the same tables at once.
        with self.explained(), self.locked(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # of heartbeats
            self.storage = RDBStorage(
                found.render_as_string(hide_password=False),
                {"connect_args": options, "pool_pre_ping": True},
                heartbeat_interval=HEARTBEAT_S,
                grace_period=STALE_S,
            )

    def close(self) -> None:
        """Ends the connections; the next use of the storage makes new ones."""
        self.storage.remove_session()
        self.storage.engine.dispose()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Within it an error of the database raises a RuntimeError of one line, no password."""
        try:
            yield
        except DATABASE_ERRORS as error:
            raise RuntimeError(self.described(error)) from None

    def described(self, error: BaseException) -> str:
        """One line about an error of the database, without the password."""
        return f"{self.shown}: {self._reason(error)}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lets one worker at a time choose a trial; a worker that dies gives it up.

        Raises:
            InUseError: Another worker has held it for two minutes.
        """
        deadline_s = time.monotonic() + _LOCK_PATIENCE_S
        with self._try_locks() as is_taken:
            while not is_taken():
                if time.monotonic() > deadline_s:
                    raise InUseError(f"{self.shown} is locked by another worker")
                time.sleep(0.05)
            yield

    @contextmanager
    def _try_locks(self) -> Iterator[Callable[[], bool]]:
        if self._is_server:
            with self._engine.connect() as connection:
                words = sqlalchemy.text(f"SELECT pg_try_advisory_lock({_LOCK_KEY})")
                # The lock goes with the connection, which no pool keeps.
                yield lambda: bool(connection.execute(words).scalar())
            return
        self._lock_file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Where there are no locks, a warning has said so: as of a sweep's own folder.
            yield lambda: try_lock(descriptor) is not False
        finally:
            os.close(descriptor)

    def _reason(self, error: BaseException) -> str:
        cause = getattr(error, "orig", None) or error.__cause__ or error
        cause = getattr(cause, "orig", None) or cause
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        said = next((line for line in lines if "FATAL" in line or "refused" in line), None)
        line = said or (lines[0] if lines else type(cause).__name__)
        return line.replace(self._password, "***") if self._password else line
