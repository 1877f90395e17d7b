import os
import resource
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from fingpt_lightning.files import NoSpaceError
from fingpt_lightning.strategies.checkpoint_files import WholeCheckpoints
from tests.support.warm_python import run_warm

_KILLED = """
import os, signal, sys
import torch
from fingpt_lightning.strategies.checkpoint_files import WholeCheckpoints
write = os.fsync
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
WholeCheckpoints().save_checkpoint({"state_dict": {"a": torch.ones(10_000)}}, sys.argv[1])
"""


def _checkpoint(value: float) -> dict[str, Any]:
    return {"state_dict": {"a": torch.full((1000,), value)}, "global_step": 3}


@pytest.mark.parametrize("name", ["last.ckpt", "l[a]s*t?.ckpt"])
def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    files, path = WholeCheckpoints(), tmp_path / "new" / name
    for value in (1.0, 2.0):
        files.save_checkpoint(_checkpoint(value), str(path))
        found = files.load_checkpoint(path, weights_only=True)
        assert found["global_step"] == 3
        assert torch.equal(found["state_dict"]["a"], torch.full((1000,), value))
    assert list(path.parent.iterdir()) == [path]
    (tmp_path / "new" / "last1.ckpt").touch()  # no pattern in a name is followed
    files.remove_checkpoint(str(path))
    files.remove_checkpoint(str(path))
    assert [left.name for left in path.parent.iterdir()] == ["last1.ckpt"]


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save({"evil": subprocess.Popen}, tmp_path / "last.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        WholeCheckpoints().load_checkpoint(tmp_path / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_kill_while_saving_leaves_the_one_before(tmp_path: Path, elsewhere: bool) -> None:
    path, files = tmp_path / "last.ckpt", WholeCheckpoints()
    files.save_checkpoint(_checkpoint(1.0), path)
    before = path.read_bytes()
    temporary = "/dev/shm" if elsewhere else str(tmp_path)
    env = os.environ | {"TMPDIR": temporary}
    killed = run_warm(["-c", _KILLED, path], env=env, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    assert len(list(tmp_path.glob("last.ckpt.*.partial"))) == 1
    files.save_checkpoint(_checkpoint(2.0), path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_one_before_and_names_path_and_bytes(tmp_path: Path) -> None:
    path, files = tmp_path / "last.ckpt", WholeCheckpoints()
    files.save_checkpoint(_checkpoint(1.0), path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(NoSpaceError) as full:
            files.save_checkpoint(_checkpoint(2.0), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    full.match(rf"{path} cannot be written \(File too large\): it needs {len(before):,} bytes,")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
