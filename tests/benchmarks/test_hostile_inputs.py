"""Mutated inputs go through the real program, as in the record, at toy size."""

import json
import os
from pathlib import Path

from tests.support.warm_python import run_warm

KINDS = ("config", "task", "safetensors", "checkpoint")
# A payload that does run, to see that it would be found.
RUNS_A_PICKLE = """
import pickle, sys, tempfile
from pathlib import Path
import benchmarks.hostile_inputs as hostile

folder = Path(tempfile.mkdtemp())

def run(words):
    pickle.loads(pickle.dumps(hostile.Payload(Path.cwd() / "canary")))
    raise KeyError("no line")

hostile.run_program = run
fork = hostile._Fork(hostile.Case("any", "none", []), hostile._made(folder / "one"))
while (outcome := fork.poll()) is None:
    pass
assert hostile.is_wrong(outcome)
found = hostile.summary([outcome])
assert found == {
    "inputs": 1, "code_run": 1, "tracebacks": 1, "over_30_s": 0, "died_by_signal": 0,
    "failed_without_a_line": 1,
}, found
"""


def test_mutated_inputs_run_no_code_and_end_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "hostile.json"
    words = ["--per_kind", "2", "--kinds", *KINDS, "--at_once", "1", "--json", str(path)]
    done = run_warm(["-m", "benchmarks.hostile_inputs", *words], timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    assert [row["kind"] for row in record["rows"]] == list(KINDS)
    assert record["summary"] == {"inputs": 8} | dict.fromkeys(
        ("code_run", "tracebacks", "over_30_s", "died_by_signal", "failed_without_a_line"), 0
    )
    assert "| kind | inputs |" in path.with_suffix(".md").read_text()


def test_code_that_runs_and_a_traceback_are_found() -> None:
    done = run_warm(["-c", RUNS_A_PICKLE], env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200)
    assert done.returncode == 0, done.stderr
