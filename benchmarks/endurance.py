"""What is lost when a command is killed or its disk is full, and does a long one grow?

A section of this benchmark is one kind of fault. Further kinds are added as a `Section` of
`SECTIONS`; each gives rows for the record and the counts that its summary needs.
"""

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks.endurance_disks import full_disks
from benchmarks.endurance_kills import kills
from benchmarks.endurance_leaks import leaks
from benchmarks.endurance_programs import PROGRAMS, make_materials
from benchmarks.endurance_trials import Found, Long, Section, Sizes
from benchmarks.record import markdown_table, new_record, write_record

QUESTION = (
    "What is lost when a command is killed at any moment or its disk is full: can what was there"
    " before be read, and does the same command, run again, end with what it would have made? And"
    " does a long training or labeling take more and more memory or files?"
)
SECTIONS = {
    "kills": Section(kills, ("kills", "lost", "resumed_equal")),
    "full_disks": Section(full_disks, ("full_disks", "full_disks_lost", "full_disks_one_line")),
    "leaks": Section(leaks, ("long_runs", "memory_grew_over_1_percent", "open_files_grew")),
}

_FOUND = "found.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the sections and writes record and table.

    Args:
        arguments: Options; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="kinds of faults")
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="what they happen to")
    parser.add_argument("--kills", type=int, default=336, help="kills in all, about")
    parser.add_argument("--steps", type=int, default=2000, help="of the long training")
    parser.add_argument("--validations", type=int, default=50, help="of the long training")
    parser.add_argument("--rows", type=int, default=50_000, help="of the long labeling")
    parser.add_argument("--seed", type=int, default=1, help="of the random moments")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the programs")
    parser.add_argument("--folder", type=Path, help="where it runs; a new one by default")
    options = parser.parse_args(arguments)
    names = [_known(parser, name, SECTIONS) for name in options.sections.split(",")]
    programs = [_known(parser, name, PROGRAMS) for name in options.programs.split(",")]
    # No thread pool in the process that forks: a child would wait for it in vain.
    torch.set_num_threads(1)
    long = Long(options.steps, options.validations, options.rows)
    config = {"kills": options.kills, "seed": options.seed, "jobs": options.jobs}
    config |= long._asdict()
    record = new_record(QUESTION, config)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="endurance-") as folder:
        materials = make_materials(Path(folder) / "materials")
        sizes = Sizes(Path(folder), materials, programs, options.kills, options.seed, long)
        found = _in_jobs(sizes, names, min(options.jobs, len(programs)))
    record["rows"] = [{"section": name, **row} for name in names for row in found[name].rows]
    record["summary"] = {
        key: value
        for name in names
        for key, value in zip(SECTIONS[name].summary, found[name].counts, strict=True)
    }
    record["notes"] = [note for name in names for note in found[name].notes]
    tables = [_table(found[name].rows) for name in names]
    write_record(options.json, record, "\n\n".join([*tables, *record["notes"]]))
    print(json.dumps(record["summary"], indent=1))


def _in_jobs(sizes: Sizes, names: Sequence[str], num_jobs: int) -> dict[str, Found]:
    """Runs sections in forked processes, each with some of the programs; joins the findings."""
    processes = {}
    for job in range(num_jobs):
        own = sizes.names[job::num_jobs]
        share = round(sizes.num_kills * len(own) / len(sizes.names))
        folder = sizes.folder / f"job-{job}"
        folder.mkdir()
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            _be_job(sizes._replace(folder=folder, names=own, num_kills=share), names)
        processes[pid] = folder
    failed = [pid for pid in processes if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {num_jobs} processes failed: their messages are above"
        )
    parts = [json.loads((folder / _FOUND).read_text()) for folder in processes.values()]
    joined = {}
    for name in names:
        of_jobs = [Found(*part[name]) for part in parts]
        rows = [row for found in of_jobs for row in found.rows]
        rows.sort(key=lambda row: sizes.names.index(row["program"]))
        counts = [sum(counts) for counts in zip(*(found.counts for found in of_jobs), strict=True)]
        notes = dict.fromkeys(note for found in of_jobs for note in found.notes)
        joined[name] = Found(rows, counts, list(notes))
    return joined


def _be_job(sizes: Sizes, names: Sequence[str]) -> NoReturn:
    status = 1
    try:
        found = {name: SECTIONS[name].run(sizes) for name in names}
        (sizes.folder / _FOUND).write_text(json.dumps(found))
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _known(parser: argparse.ArgumentParser, name: str, known: Collection[str]) -> str:
    if name not in known:
        parser.error(f"{name} is none of {', '.join(known)}")
    return name


def _table(rows: Sequence[dict[str, str | int | float]]) -> str:
    header = list(rows[0]) if rows else []
    return markdown_table(header, [[str(row[key]) for key in header] for row in rows])


if __name__ == "__main__":
    main()
