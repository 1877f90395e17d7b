"""Commands whose disk is full, or whose files reach a limit, and run again with enough space."""

import itertools
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.endurance_kills import left_alone
from benchmarks.endurance_trials import Child, Found, Program, Sizes, leftovers, run
from fingpt_lightning.units import MIB

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Shares of the space that an undisturbed run takes."""
_ROOM_BYTES = 512 * MIB
_SAID = " cannot be written ("
_SHOWN = 300


def full_disks(sizes: Sizes) -> Found:
    """Runs each program with too little space, in a tmpfs of its own if that is allowed.

    Otherwise, and in addition, no file may grow above a share of the largest one that the program
    makes.
    """
    rows, notes = [], []
    totals = Counter[str]()
    trials = (sizes.folder / f"disk-{number:05d}" for number in itertools.count())
    kinds = ["file_limit"]
    if (reason := _why_no_mount(sizes.folder)) is None:
        kinds.append("full_disk")
    else:
        notes.append(f"full_disk: skipped, a tmpfs cannot be mounted ({reason})")
    for name in sizes.names:
        program = sizes.programs[name]
        whole = left_alone(name, program, _made(trials), sizes.folder)
        room, largest = _needed(program, next(trials), sizes.folder)
        for kind in kinds:
            counts = Counter[str]()
            for share in SHARES:
                folder = next(trials)
                folder.mkdir()
                limit = max(1, int(share * largest))
                if kind == "file_limit":
                    found = _limited(program, folder, sizes.folder, limit, whole.outcome)
                else:
                    disk = folder / "disk"
                    disk.mkdir()
                    with _mounted(disk, room[0] + int(share * (room[1] - room[0]))):
                        found = _filled(program, disk, sizes.folder, whole.outcome)
                counts += found[0]
                notes += [f"{name}, {kind}, {share:g}: {fault}" for fault in found[1]]
            rows.append(
                {
                    "program": name,
                    "fault": kind,
                    "faults": counts["faults"],
                    "lost": counts["lost"],
                    "one_line": counts["one_line"],
                    "run_again_equal": counts["equal"],
                    "had_room": counts["had_room"],
                }
            )
            print(rows[-1], flush=True)
            totals += counts
    return Found(rows, [totals["faults"], totals["lost"], totals["one_line"]], notes)


def _limited(
    program: Program, folder: Path, temporary: Path, limit: int, outcome: object
) -> tuple[Counter[str], list[str]]:
    program.prepare(folder)
    words = program.words(folder)
    assert words is not None
    child = Child(words, folder, temporary, max_file_bytes=limit)
    return _judged(program, folder, temporary, child, outcome)


def _filled(
    program: Program, folder: Path, temporary: Path, outcome: object
) -> tuple[Counter[str], list[str]]:
    program.prepare(folder)
    words = program.words(folder)
    assert words is not None
    child = Child(words, folder, temporary)
    return _judged(program, folder, temporary, child, outcome, folder)


def _judged(
    program: Program,
    folder: Path,
    temporary: Path,
    child: Child,
    outcome: object,
    mount: Path | None = None,
) -> tuple[Counter[str], list[str]]:
    """What a command left that had too little space, and whether it succeeds with enough space."""
    counts, faults = Counter[str](), list[str]()
    status, log = child.wait(), child.log.read_text(errors="replace")
    if status == 0:
        counts["had_room"] += 1
        return counts, faults
    counts["faults"] += 1
    lines = [line for line in log.splitlines() if line.startswith("fingpt: error")]
    if status == 1 and len(lines) == 1 and "Traceback" not in log and _SAID in lines[0]:
        counts["one_line"] += 1
    else:
        faults.append(f"ended with {status}: {log[-_SHOWN:]!r}")
    try:
        lost = program.lost(folder, outcome)
    except Exception as error:
        lost = f"{type(error).__name__}: {error}"
    if lost is not None:
        counts["lost"] += 1
        faults.append(f"lost: {lost}")
    if left := leftovers(folder, program.keeps_parts):
        faults.append(f"left behind: {', '.join(left)}")
    if mount is not None:
        _mount(mount, _ROOM_BYTES, "remount")
    status = run(program.words(folder), folder, temporary)
    if status == 0 and program.outcome(folder) == outcome:
        counts["equal"] += 1
    else:
        again = child.log.read_text(errors="replace")
        faults.append(f"run again ended with {status} or is not equal: {again[-_SHOWN:]!r}")
    return counts, faults


def _needed(program: Program, folder: Path, temporary: Path) -> tuple[tuple[int, int], int]:
    """Bytes on the disk before and after a run, and those of the largest file that it makes."""
    folder.mkdir()
    program.prepare(folder)
    there = _stamped_sizes(folder)
    before = sum(size for size, _ in there.values())
    run(program.words(folder), folder, temporary)
    now = _stamped_sizes(folder)
    largest = max(stamped[0] for path, stamped in now.items() if there.get(path) != stamped)
    after = sum(size for size, _ in now.values())
    shutil.rmtree(folder)
    return (before, max(after, before + largest)), largest


def _stamped_sizes(folder: Path) -> dict[Path, tuple[int, int]]:
    states = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    page = os.sysconf("SC_PAGESIZE")  # unit in which a tmpfs counts
    return {
        path: (-(-state.st_size // page) * page, state.st_mtime_ns)
        for path, state in states.items()
    }


def _made(folders: Iterator[Path]) -> Iterator[Path]:
    for folder in folders:
        folder.mkdir()
        yield folder


def _why_no_mount(folder: Path) -> str | None:
    test = folder / "mount"
    test.mkdir()
    try:
        with _mounted(test, MIB):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        text = getattr(error, "stderr", "") or str(error)
        return " ".join(str(text).split())[:_SHOWN]
    finally:
        test.rmdir()


@contextmanager
def _mounted(folder: Path, num_bytes: int) -> Iterator[None]:
    _mount(folder, num_bytes)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def _mount(folder: Path, num_bytes: int, *options: str) -> None:
    mount_options = ",".join([*options, f"size={num_bytes}"])
    command = ["mount", "-t", "tmpfs", "-o", mount_options, "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True, text=True)
