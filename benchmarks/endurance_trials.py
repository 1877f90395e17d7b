"""One trial of the endurance benchmark: a command in a forked process, and its outcome.

The parent has imported everything once, so that a trial starts in milliseconds.
"""

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fingpt_lightning.cli.main import main
from fingpt_lightning.files import OWNER, PARTIAL

TIMEOUT_S = 300.0
HUNG = -1000
"""The status of a command that had to be ended after `TIMEOUT_S`."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


class Program(NamedTuple):
    """A command, and how to inspect what it left.

    Attributes:
        prepare: Function that puts into a new folder what exists before the command.
        words: Function of a folder that returns the command line, of a run that resumes a killed
            one; None where the command has nothing left to do.
        lost: Function that returns what existed before or was finished and is lost, or None. It
            gets the folder, and the outcome of an undisturbed run.
        outcome: Function that returns the result of the command, to compare.
        keeps_parts: Whether it leaves parts to resume from when it is requested to end.
    """

    prepare: Callable[[Path], None]
    words: Callable[[Path], list[str] | None]
    lost: Callable[[Path, Any], str | None]
    outcome: Callable[[Path], Any]
    keeps_parts: bool = False


class Long(NamedTuple):
    """The lengths of the runs whose memory is watched.

    Attributes:
        num_steps: Optimizer steps of the training.
        num_validations: Validations of the training.
        num_rows: Rows that are labeled.
    """

    num_steps: int
    num_validations: int
    num_rows: int


class Sizes(NamedTuple):
    """The settings of a section.

    Attributes:
        folder: Folder in which trials get their folders.
        programs: Programs by name.
        names: Names of the programs that run.
        num_kills: Approximate number of kills in all.
        seed: Seed of random moments.
        long: Lengths of the runs whose memory is watched.
    """

    folder: Path
    programs: Mapping[str, Program]
    names: Sequence[str]
    num_kills: int
    seed: int
    long: Long


class Found(NamedTuple):
    """The findings of a section.

    Attributes:
        rows: Rows for the record.
        counts: Values of the section's keys of the summary.
        notes: Lines about what was left out, and about each loss.
    """

    rows: list[dict[str, Any]]
    counts: Sequence[int]
    notes: list[str]


class Section(NamedTuple):
    """A kind of fault.

    Attributes:
        run: Function that lets the faults happen.
        summary: Keys of the record's summary, in the order of `Found.counts`.
    """

    run: Callable[[Sizes], Found]
    summary: Sequence[str]


class Aim(NamedTuple):
    """A moment: right before change number ``event`` that a command makes to its files.

    Attributes:
        event: Number of the change, from 1; 0 only counts them.
        signum: Signal that the process then sends itself.
    """

    event: int = 0
    signum: signal.Signals = signal.SIGKILL


class Child:
    """A running command.

    Args:
        words: Words of its command line.
        folder: Working folder; its output goes into ``FOLDER.log``.
        temporary: Folder for ``TMPDIR``.
        aim: Moment at which it ends itself.
        max_file_bytes: Size at which files cannot grow any more.
    """

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        temporary: Path,
        aim: Aim | None = None,
        max_file_bytes: int | None = None,
    ) -> None:
        self.log = folder.with_name(f"{folder.name}.log")
        self.events = folder.with_name(f"{folder.name}.events")
        self._aim = aim
        self.started_s = time.monotonic()
        self.was_signalled = False
        """Whether a signal was sent while it ran."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._be_child(list(words), folder, temporary, aim, max_file_bytes)

    def _be_child(
        self,
        words: list[str],
        folder: Path,
        temporary: Path,
        aim: Aim | None,
        max_file_bytes: int | None,
    ) -> None:
        status = 70
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(log, stream)
            os.chdir(folder)
            os.environ["TMPDIR"] = str(temporary)
            tempfile.tempdir = None
            if max_file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
            count = _counted(aim) if aim is not None else None
            try:
                main(words)
                status = 0
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else 1
            if count is not None:
                number = count()
                self.events.write_text(str(number))
        except KeyboardInterrupt:  # before or after the command itself
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """The exit status; below 0 the signal that ended it."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self._note_signal()
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return HUNG

    def _note_signal(self) -> None:
        if self._aim is not None and self._aim.event:
            reached = int(self.events.read_text()) if self.events.is_file() else self._aim.event
            self.was_signalled = reached >= self._aim.event

    def kill_after(self, seconds: float, signum: signal.Signals) -> int:
        """Sends a signal at a time since the start, once it runs; returns the exit status."""
        deadline_s = self.started_s + seconds
        while time.monotonic() < deadline_s or not self.log.exists():
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        self.was_signalled = True
        os.kill(self.pid, signum)
        return self.wait()


def run(words: Sequence[str] | None, folder: Path, temporary: Path) -> int:
    """Runs a command to its end; one with nothing to do succeeds."""
    return 0 if words is None else Child(words, folder, temporary).wait()


def leftovers(folder: Path, keeps_parts: bool) -> list[str]:
    """The files in a folder that are not whole and should not be there.

    Args:
        folder: Folder of a trial.
        keeps_parts: Whether a folder of whole parts may be there.
    """
    found = []
    for path in folder.rglob(f"*{PARTIAL}"):
        is_parts = keeps_parts and path.is_dir() and (path / OWNER).is_file()
        if not is_parts:
            found.append(str(path.relative_to(folder)))
    return sorted(found)


def _counted(aim: Aim) -> Callable[[], int]:
    """Counts changes of files from now on, and ends the process before one of them."""
    number = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal number
        if event not in _EVENTS:
            return
        if event == "open" and not (arguments[2] or 0) & _WRITING:
            return
        if not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        if os.fsdecode(arguments[0]).startswith(("/dev/null", "/proc", "/sys")):
            return
        number += 1
        if number == aim.event:
            os.kill(os.getpid(), aim.signum)

    sys.addaudithook(hook)
    return lambda: number
