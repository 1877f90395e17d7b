"""How long does it take until a mistake on the command line is named?

Each command is started anew with each kind of mistake, as a person would, once with the checks that
come before the imports and once with them switched off, in turn. Both must end with the same line.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.record import markdown_table, new_record, spread, write_record
from fingpt_lightning.cli.early_checks import OFF_VARIABLE
from fingpt_lightning.compression.options import RECORD as COMPRESSION
from fingpt_lightning.decomposition.options import RECORD as DECOMPOSITION
from fingpt_lightning.evaluation.run_evaluations import RESULTS
from fingpt_lightning.hub.card import CARD, EXPORT_MARK

QUESTION = "How long does it take until a mistake on the command line is named?"
LIMIT_S = 2.5
FIRST_LINE_LIMIT_S = 4.0
_MODEL = ("--model", "./none")
_COMPRESS = (*_MODEL, "--size", "0.5", "--output", "out", "--calibration")
_FIT = ("--config", "quickstart")
_IS_THERE = "output is there already"
_TUNE = ("--config", "finetune_smollm2_fpb")
MISTAKES: dict[str, dict[str, tuple[str, ...]]] = {
    "fit": {
        "unknown option": (*_FIT, "--trainer.max_stps", "3"),
        "unknown setting": (*_FIT, "--model.rnk", "3"),
        "wrong value": (*_FIT, "--trainer.max_steps", "many"),
        "out of range": (*_FIT, "--data.batch_size", "0"),
        "missing config": ("--config", "none.yaml"),
        "missing file": (*_FIT, "--data.train_files", "none.jsonl"),
        "missing model": (*_TUNE, "--data.tasks", "[fpb]", "--model.base", "./none"),
        "unknown task": (*_TUNE, "--data.tasks", "[fpd]"),
    },
    "validate": {
        "unknown option": (*_FIT, "--trainer.max_stps", "3"),
        "wrong value": (*_FIT, "--trainer.max_steps", "many"),
        "missing file": (*_FIT, "--ckpt_path", "none.ckpt"),
    },
    "test": {
        "unknown option": (*_FIT, "--trainer.max_stps", "3"),
        "wrong value": (*_FIT, "--model.rank", "many"),
        "missing file": (*_FIT, "--ckpt_path", "none.ckpt"),
    },
    "predict": {
        "unknown option": (*_FIT, "--trainer.max_stps", "3"),
        "missing file": (*_FIT, "--ckpt_path", "none.ckpt"),
    },
    "tokenize": {
        "unknown option": (*_FIT, "--shrad", "1/2"),
        "wrong value": (*_FIT, "--shard", "3/2"),
        "missing file": (*_FIT, "--data.train_files", "none.jsonl"),
    },
    "evaluate": {
        "unknown option": (*_MODEL, "--taskss", "fpb"),
        "wrong value": (*_MODEL, "--tasks", "fpb", "--limit", "0"),
        "missing model": (*_MODEL, "--tasks", "fpb", "--data_dir", "sets"),
        "unknown task": (*_MODEL, "--tasks", "fpd"),
        _IS_THERE: (*_MODEL, "--tasks", "fpb", "--data_dir", "sets", "--output", "done"),
    },
    "generate": {
        "unknown option": (*_MODEL, "--promt", "x"),
        "wrong value": (*_MODEL, "--prompt", "x", "--top_k", "0"),
        "missing file": (*_MODEL, "--prompts", "none.txt"),
        "missing model": (*_MODEL, "--prompt", "x"),
        _IS_THERE: (*_MODEL, "--prompt", "x", "--output", "done.jsonl"),
    },
    "chat": {
        "unknown option": (*_MODEL, "--contxt", "9"),
        "wrong value": (*_MODEL, "--context", "0"),
        "missing model": _MODEL,
    },
    "label": {
        "unknown option": (*_MODEL, "--task", "fpb", "--inptu", "x"),
        "wrong value": (*_MODEL, "--task", "fpb", "--input", "x.csv", "--dtype", "float"),
        "missing file": (*_MODEL, "--task", "fpb", "--input", "none.csv", "--output", "x.csv"),
        "unknown task": (*_MODEL, "--task", "fpd", "--input", "none.csv", "--output", "x.csv"),
        _IS_THERE: (*_MODEL, "--task", "fpb", "--input", "none.csv", "--output", "done.jsonl"),
    },
    "decompose": {
        "unknown option": (*_MODEL, "--rnk_ratio", "0.5", "--output", "out"),
        "wrong value": (*_MODEL, "--rank_ratio", "5", "--output", "out"),
        "missing model": (*_MODEL, "--rank_ratio", "0.5", "--output", "out"),
        _IS_THERE: (*_MODEL, "--rank_ratio", "0.5", "--output", "done"),
    },
    "export": {
        "unknown option": (*_MODEL, "--fromat", "hf", "--output", "out"),
        "wrong value": (*_MODEL, "--format", "hff", "--output", "out"),
        "missing model": (*_MODEL, "--format", "hf", "--output", "out"),
        _IS_THERE: (*_MODEL, "--format", "hf", "--output", "done"),
    },
    "sweep": {
        "unknown option": ("quick_rank", "--cont", "3"),
        "missing file": ("none",),
        _IS_THERE: ("quick_rank", "--output", "done"),
    },
    "configs": {
        "unknown option": ("quickstart", "--cpy", "x"),
        "missing file": ("none",),
        _IS_THERE: ("quickstart", "--copy", "done"),
    },
    "tasks": {"unknown option": ("fpb", "--date_dir", "x"), "unknown task": ("fpd",)},
    "report": {"unknown option": ("none", "--outptu", "x"), "missing file": ("none",)},
    "serve": {
        "unknown option": (*_MODEL, "--prt", "3"),
        "wrong value": (*_MODEL, "--port", "many"),
        "missing model": _MODEL,
        "unknown task": (*_MODEL, "--tasks", "fpd"),
    },
    "compare": {
        "unknown option": ("one", "other", "--outptu", "x"),
        "wrong value": ("one", "other", "--output", "x.htm"),
        "missing file": ("one", "other"),
    },
    "compress": {
        "unknown option": (*_MODEL, "--outptu", "x"),
        "wrong value": (*_COMPRESS, "none.jsonl", "--format", "nf5"),
        "missing file": (*_COMPRESS, "none.jsonl"),
        "missing model": (*_COMPRESS, "task:fpb"),
        "unknown task": (*_COMPRESS, "task:fpd"),
        _IS_THERE: (*_MODEL, "--size", "0.5", "--output", "done", "--calibration", "task:fpb"),
    },
    "plan": {
        "unknown option": (*_FIT, "--trainer.max_stps", "3"),
        "wrong value": (*_FIT, "--model.rank", "many"),
        "missing config": ("--config", "none"),
    },
}
"""Words after each command, by the kind of mistake."""


class Named(NamedTuple):
    """How one command ended.

    Attributes:
        seconds: Time from start to end.
        line: Last line on standard error.
        status: Exit status.
    """

    seconds: float
    line: str
    status: int


def main() -> None:
    """Times every mistake and writes record and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--commands", nargs="+", choices=list(MISTAKES), default=list(MISTAKES))
    options = parser.parse_args()
    record = new_record(QUESTION, {"repeats": options.repeats, "commands": options.commands})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder)
        record["rows"] = [
            _row(command, kind, words, folder, options.repeats)
            for command in options.commands
            for kind, words in MISTAKES[command].items()
        ]
        first_s = [_first_line_s(folder) for _ in range(options.repeats)]
    record["first_line_of_fit_s"] = spread(first_s)
    record["summary"] = summary(record["rows"], first_s)
    write_record(options.json, record, table(record["rows"]))


def make_files(folder: Path) -> None:
    """Makes the rows that commands read, and outputs of earlier commands: ``done``.

    Args:
        folder: Folder in which the commands are started.
    """
    rows_folder, done = folder / "sets" / "fpb", folder / "done"
    rows_folder.mkdir(parents=True)
    row = '{"sentence": "Shares rose.", "label": 2}\n'
    (rows_folder / "validation.jsonl").write_text(row)
    done.mkdir()
    for name in (RESULTS, DECOMPOSITION, COMPRESSION, "quickstart.yaml"):
        (done / name).write_text("{}")
    (done / CARD).write_text(EXPORT_MARK)
    done.with_suffix(".jsonl").touch()


def summary(rows: Sequence[dict[str, Any]], first_s: Sequence[float]) -> dict[str, Any]:
    """The figures that answer the question."""
    longest = max(rows, key=lambda row: float(row["seconds"]["median"]))
    return {
        "mistakes": len(rows),
        "longest_s": longest["seconds"]["median"],
        "longest": f"{longest['command']}, {longest['kind']}",
        "longest_without_early_checks_s": max(row["seconds_before"]["median"] for row in rows),
        "over_2.5_s": sum(row["seconds"]["median"] > LIMIT_S for row in rows),
        "other_lines": sum(not row["same_line"] for row in rows),
        "first_line_of_fit_s": spread(first_s)["median"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    cells = [
        [
            row["command"],
            row["kind"],
            f"{row['seconds_before']['median']:.2f}",
            f"{row['seconds']['median']:.2f}",
            row["line"],
        ]
        for row in rows
    ]
    header = ["command", "mistake", "seconds, checks off", "seconds", "named as"]
    return markdown_table(header, cells)


def _row(
    command: str, kind: str, words: Sequence[str], folder: Path, repeats: int
) -> dict[str, Any]:
    early, late = [], []
    for _ in range(repeats):
        late.append(run([command, *words], folder, early_checks=False))
        early.append(run([command, *words], folder, early_checks=True))
    return {
        "command": command,
        "kind": kind,
        "words": " ".join(words),
        "seconds": spread([one.seconds for one in early]),
        "seconds_before": spread([one.seconds for one in late]),
        "same_line": len({(one.line, one.status) for one in (*early, *late)}) == 1,
        "line": early[0].line,
    }


def run(words: Sequence[str], folder: Path, *, early_checks: bool) -> Named:
    """Starts the program and waits for its end.

    Args:
        words: Command and its options.
        folder: Folder in which it is started.
        early_checks: Whether the checks before the imports are on.
    """
    environment = dict(os.environ) | {OFF_VARIABLE: "0" if early_checks else "1"}
    started_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "fingpt_lightning", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - started_s
    return Named(seconds, (done.stderr.strip().splitlines() or [""])[-1], done.returncode)


def _first_line_s(folder: Path) -> float:
    """Seconds until ``fit`` has written its first line; it is ended then."""
    words = ["fit", "--config", "debug_quickstart", "--trainer.logger", "false"]
    command = [sys.executable, "-m", "fingpt_lightning", *words]
    started_s = time.perf_counter()
    with subprocess.Popen(
        command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        seconds = time.perf_counter() - started_s
        process.terminate()
    assert line.startswith("fingpt: fit"), line
    return seconds


if __name__ == "__main__":
    main()
