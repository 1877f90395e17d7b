import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.warm_python import WarmProcess, run_warm, running

_TOLD = """
import json, os, sys
print(json.dumps({
    "arguments": sys.argv, "folder": os.getcwd(), "name": __name__, "path": sys.path,
    "variable": os.environ.get("OURS"), "input": sys.stdin.read(),
    "leads": os.getsid(0) == os.getpid(), "threads": os.environ["OMP_NUM_THREADS"],
    "is_warm": "torch" in sys.modules,
}))
print("an error", file=sys.stderr)
"""


@pytest.mark.parametrize("threads", ["1", "3"], ids=["fork", "fresh interpreter"])
def test_a_program_is_started_as_by_subprocess(tmp_path: Path, threads: str) -> None:
    words = ["-c", _TOLD, "--word", "two words"]
    env = os.environ | {"OURS": "here", "OMP_NUM_THREADS": threads, "PYTHONPATH": "/elsewhere"}
    warm = run_warm(words, cwd=tmp_path, env=env, timeout=60)
    real = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=True,
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    found, expected = json.loads(warm.stdout), json.loads(real.stdout)
    assert found.pop("is_warm") == (threads == "1")
    assert not expected.pop("is_warm")
    assert found == expected
    assert (warm.returncode, warm.stderr, warm.args) == (0, "an error\n", real.args)


def test_a_module_is_run_as_the_main_one(tmp_path: Path) -> None:
    (tmp_path / "ours.py").write_text(
        "import sys\nprint(sys.argv, sys.modules['__main__'].__spec__.name, sys.path[0])\n"
    )
    done = run_warm(["-m", "ours", "word"], cwd=tmp_path, timeout=60, merges=True)
    assert done.stdout == f"['{tmp_path}/ours.py', 'word'] ours {tmp_path}\n"


@pytest.mark.parametrize(
    ("program", "status", "message"),
    [
        ("import atexit; atexit.register(print, 'the end')", 0, "the end"),
        ("raise SystemExit(7)", 7, ""),
        ("raise SystemExit('too late')", 1, "too late"),
        ("raise LookupError('no batch')", 1, "LookupError: no batch"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM, ""),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV, ""),
    ],
)
def test_a_program_ends_as_in_a_fresh_interpreter(program: str, status: int, message: str) -> None:
    done = run_warm(["-c", program], timeout=60, merges=True)
    assert done.returncode == status
    assert message in done.stdout


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_a_fork_has_the_rank_of_its_environment(variable: str) -> None:
    program = "from lightning.pytorch.utilities import rank_zero_only as only; print(only.rank)"
    done = run_warm(["-c", program], env=os.environ | {variable: "3"}, timeout=60)
    assert done.stdout == "3\n"


def test_forks_do_not_draw_the_same_numbers() -> None:
    program = "import random, numpy; print(random.random(), numpy.random.random())"
    drawn = [run_warm(["-c", program], timeout=60).stdout.split() for _ in range(2)]
    assert drawn[0][0] != drawn[1][0]
    assert drawn[0][1] != drawn[1][1]


def test_a_signal_arrives_and_the_status_is_kept() -> None:
    process = WarmProcess(["-c", "import time; time.sleep(600)"])
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == process.poll() == process.returncode == -signal.SIGTERM
    process.send_signal(signal.SIGTERM)  # nobody is there any more


def test_what_runs_too_long_is_killed_with_its_children() -> None:
    program = (
        "import subprocess, time; subprocess.Popen(['sleep', '600'])\n"
        "print('begun', flush=True); time.sleep(600)"
    )
    with pytest.raises(subprocess.TimeoutExpired) as error:
        run_warm(["-c", program], timeout=2)
    printed: Any = error.value.stdout
    assert printed == "begun\n"
    deadline_s = time.monotonic() + 10
    while running() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not running()
