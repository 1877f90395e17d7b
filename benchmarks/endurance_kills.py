"""Commands killed at random and at aimed moments, and run again."""

import itertools
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.endurance_trials import (
    HUNG,
    Aim,
    Child,
    Found,
    Program,
    Sizes,
    leftovers,
    run,
)

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MOMENTS = ("random", "aimed")
_STATUSES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}
_TRIES = 4
_ELSEWHERE = Path("/dev/shm")
_SHOWN = 300


class Whole(NamedTuple):
    """An undisturbed run.

    Attributes:
        outcome: Result of the run.
        seconds: Duration of the run.
        num_events: Number of changes to its files.
    """

    outcome: Any
    seconds: float
    num_events: int


def kills(sizes: Sizes) -> Found:
    """Kills each program by each signal, at random times and before changes of files, in turn.

    Each second trial has ``TMPDIR`` on another file system.
    """
    cells = list(itertools.product(sizes.names, SIGNALS, MOMENTS))
    each, rest = divmod(sizes.num_kills, len(cells))
    draw = random.Random(sizes.seed)
    folders = _folders(sizes.folder)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory(dir=_ELSEWHERE) as elsewhere:
        temporary = (sizes.folder, Path(elsewhere))
        has_elsewhere = sizes.folder.stat().st_dev != Path(elsewhere).stat().st_dev
        if not has_elsewhere:
            notes.append(f"TMPDIR on another file system: skipped, {_ELSEWHERE} is on the same")
        wholes: dict[str, Whole] = {}
        for index, (name, signum, moment) in enumerate(cells):
            program = sizes.programs[name]
            if name not in wholes:
                wholes[name] = left_alone(name, program, folders, sizes.folder)
            whole, counts = wholes[name], Counter[str]()
            number = each + (index < rest)
            for turn in range(number):
                other = has_elsewhere and turn % 2 == 1
                share = (turn + draw.random()) / number
                trial = _Trial(program, whole, folders, temporary[other])
                counts += trial.run(signum, moment, share, draw)
                counts["elsewhere"] += other
                notes += [f"{name}, {signum.name}, {moment}: {x}" for x in trial.faults]
            rows.append(
                {
                    "program": name,
                    "signal": signum.name,
                    "moment": moment,
                    "kills": counts["kills"],
                    "tmpdir_elsewhere": counts["elsewhere"],
                    "lost": counts["lost"],
                    "left_behind": counts["left_behind"],
                    "resumed_equal": counts["equal"],
                    "finished_anyway": counts["finished_anyway"],
                    "ended_before": counts["ended_before"],
                }
            )
            print(rows[-1], flush=True)
    totals = [sum(row[key] for row in rows) for key in ("kills", "lost", "resumed_equal")]
    return Found(rows, totals, notes)


def left_alone(name: str, program: Program, folders: Iterator[Path], temporary: Path) -> Whole:
    """Runs a program to its end, twice: its outcome must be reproducible.

    Raises:
        RuntimeError: It failed, or the two runs differ.
    """
    found = []
    for _ in range(2):
        folder = next(folders)
        program.prepare(folder)
        words = program.words(folder)
        assert words is not None
        child = Child(words, folder, temporary, Aim())
        status, seconds = child.wait(), time.monotonic() - child.started_s
        if status:
            raise RuntimeError(f"{name} ended with {status}: {child.log.read_text()}")
        outcome = program.outcome(folder)
        found.append(Whole(outcome, seconds, int(child.events.read_text())))
        shutil.rmtree(folder)
    if found[0].outcome != found[1].outcome:
        raise RuntimeError(f"{name}: two runs that were left alone differ")
    return found[1]


class _Trial:
    """One kill and the run after it.

    Attributes:
        faults: Lines about what went wrong.
    """

    def __init__(
        self, program: Program, whole: Whole, folders: Iterator[Path], temporary: Path
    ) -> None:
        self._program, self._whole = program, whole
        self._folders, self._temporary = folders, temporary
        self.faults: list[str] = []

    def run(
        self, signum: signal.Signals, moment: str, share: float, draw: random.Random
    ) -> Counter[str]:
        """Kills at a share of the run, earlier where the run has ended by then."""
        counts = Counter[str]()
        for _ in range(_TRIES):
            folder = next(self._folders)
            self._program.prepare(folder)
            child = self._started(folder, signum, moment, share)
            if moment == "aimed":
                status = child.wait()
            else:
                status = child.kill_after(share * self._whole.seconds, signum)
            if child.was_signalled:
                break
            counts["ended_before"] += 1
            share *= draw.random()
            shutil.rmtree(folder)
        else:
            return counts
        counts["kills"] += 1
        log = child.log.read_text(errors="replace")
        if status == 0:  # the signal came at its very end, or a library swallowed it
            counts["finished_anyway"] += 1
        elif status not in (_STATUSES[signum], -signum) or "Traceback" in log:
            self.faults.append(f"ended with {status}: {log[-_SHOWN:]!r}")
        if (lost := self._lost(folder)) is not None:
            counts["lost"] += 1
            self.faults.append(f"lost: {lost}")
        if signum != signal.SIGKILL and (left := leftovers(folder, self._program.keeps_parts)):
            counts["left_behind"] += 1
            self.faults.append(f"left behind: {', '.join(left)}")
        counts["equal"] += self._is_equal_again(folder)
        shutil.rmtree(folder)
        return counts

    def _started(self, folder: Path, signum: signal.Signals, moment: str, share: float) -> Child:
        words = self._program.words(folder)
        assert words is not None
        event = 1 + int(share * self._whole.num_events)
        aim = Aim(event, signum) if moment == "aimed" else None
        return Child(words, folder, self._temporary, aim)

    def _lost(self, folder: Path) -> str | None:
        try:
            return self._program.lost(folder, self._whole.outcome)
        except Exception as error:  # what cannot be read is lost
            return f"{type(error).__name__}: {error}"

    def _is_equal_again(self, folder: Path) -> bool:
        try:
            status = run(self._program.words(folder), folder, self._temporary)
            if status == 0 and bool(self._program.outcome(folder) == self._whole.outcome):
                if left := leftovers(folder, keeps_parts=False):
                    self.faults.append(f"left by the run after it: {', '.join(left)}")
                return True
        except Exception as error:
            self.faults.append(f"run again: {type(error).__name__}: {error}")
            return False
        how = "hung" if status == HUNG else f"ended with {status}"
        log = folder.with_name(f"{folder.name}.log").read_text(errors="replace")
        self.faults.append(f"run again {how} or is not equal: {log[-_SHOWN:]!r}")
        return False


def _folders(parent: Path) -> Iterator[Path]:
    for number in itertools.count():
        folder = parent / f"trial-{number:05d}"
        folder.mkdir()
        yield folder
