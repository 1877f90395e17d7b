import os
from pathlib import Path

import pytest
import torch

from fingpt_lightning.cli.run_folders import find_checkpoint, keep_old_metrics, remove_run_leftovers


def _checkpoint(runs: Path, name: str, kind: str, time_s: int, step: int = 1) -> Path:
    path = runs / name / "checkpoints" / f"{kind}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {"a": torch.ones(999)}, "global_step": step}, path)
    os.utime(path, (time_s, time_s))
    return path


def _cut(path: Path) -> None:
    stamp = path.stat().st_mtime_ns
    os.truncate(path, path.stat().st_size // 2)
    os.utime(path, ns=(stamp, stamp))


@pytest.mark.parametrize("name", ["tiny", "ti[n]y*", "[a-z]?", "{a,b}"])
@pytest.mark.parametrize("parent", ["runs", "r[uv]ns*"])
def test_last_is_the_newest_readable_one_whatever_the_names(
    tmp_path: Path, name: str, parent: str
) -> None:
    runs = tmp_path / parent
    _checkpoint(runs, "x-20260101-000000", "last", 9)
    oldest = _checkpoint(runs, f"{name}-20260101-000000", "last", 1, step=70)
    best = _checkpoint(runs, f"{name}-20260101-000001", "best", 2, step=80)
    last = _checkpoint(runs, f"{name}-20260101-000001", "last", 3, step=90)
    notes: list[str] = []
    assert find_checkpoint("last", name, runs, notes.append) == last
    assert notes == []
    _cut(last)
    assert find_checkpoint("last", name, runs, notes.append) == best
    assert notes == [f"ckpt_path last: {last} is damaged; {best} of step 80 is taken"]
    best.write_bytes(b"")
    assert find_checkpoint("last", name, runs, notes.append) == oldest
    _cut(oldest)
    with pytest.raises(ValueError, match="is not a checkpoint that can be read safely"):
        find_checkpoint("last", name, runs, notes.append)


def test_best_falls_back_to_an_older_best_only(tmp_path: Path) -> None:
    older = _checkpoint(tmp_path, "a-20260101-000000", "best", 1)
    newer = _checkpoint(tmp_path, "a-20260101-000001", "best", 2)
    _checkpoint(tmp_path, "a-20260101-000001", "last", 3)
    _cut(newer)
    assert find_checkpoint("best", "a", tmp_path) == older


def test_what_a_killed_run_was_writing_goes_when_it_is_gone_on_from(tmp_path: Path) -> None:
    last = _checkpoint(tmp_path, "a-20260101-000000", "last", 1)
    for path in (last, last.parents[1] / "metrics.csv", last.with_name("own.ckpt")):
        path.with_name(f"{path.name}.7-0.partial").touch()
    remove_run_leftovers(last)
    assert [path.name for path in tmp_path.rglob("*.partial")] == ["own.ckpt.7-0.partial"]
    remove_run_leftovers(Path("last.ckpt"))


def test_metrics_of_each_earlier_run_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "r[u]n*"
    folder.mkdir()
    for number in (1, 2):
        (folder / "metrics.csv").write_text(str(number))
        keep_old_metrics(folder)
    assert [(folder / f"metrics-{n}.csv").read_text() for n in (1, 2)] == ["1", "2"]
