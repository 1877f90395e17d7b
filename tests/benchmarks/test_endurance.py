import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import endurance_kills
from benchmarks.endurance_leaks import Sample, growth
from benchmarks.endurance_trials import Program, leftovers
from fingpt_lightning.units import MIB
from tests.support.warm_python import ROOT, run_warm


def _record(folder: Path, *words: str) -> dict[str, Any]:
    # A process of its own: one that forks must not have computed with threads before.
    command = ["-m", "benchmarks.endurance", "--json", str(folder / "found.json")]
    done = run_warm([*command, "--folder", str(folder), *words], cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


@pytest.mark.slow
def test_killed_commands_and_full_disks_lose_nothing_and_long_ones_do_not_grow(
    tmp_path: Path,
) -> None:
    record = _record(
        tmp_path, "--programs", "fit,label", "--kills", "12", "--jobs", "2", "--steps", "40",
        "--validations", "4", "--rows", "200",
    )  # fmt: skip
    summary = record["summary"]
    assert summary["kills"] == summary["resumed_equal"] == 12
    assert summary["full_disks"] == summary["full_disks_one_line"] > 0
    assert summary["lost"] == summary["full_disks_lost"] == 0
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    table = (tmp_path / "found.md").read_text()
    assert "| fit | SIGKILL | aimed | 1 |" in table
    long = {row["program"]: row for row in record["rows"] if row["section"] == "leaks"}
    assert long["fit"]["samples"] == 8
    assert long["label"]["samples"] == 50
    assert summary["long_runs"] == 2
    assert summary["open_files_grew"] == 0
    assert all(50 < row["rss_mib_at_half"] < 2000 for row in long.values())


def test_growth_is_that_of_the_second_half() -> None:
    rss = [100.0 + 900 * min(step, 40) / 40 + (8 if step >= 95 else 0) for step in range(101)]
    rss[30] = rss[97] = 1e6  # a single moment does not count
    samples = [Sample(step / 100, int(x * MIB), 7 + step // 60) for step, x in enumerate(rss)]
    found = growth(samples)
    assert found["rss_mib_at_half"] == 1000.0
    assert found["growth_percent"] == 0.8
    assert (found["files_at_half"], found["files_at_end"]) == (7, 8)


def test_what_is_lost_left_or_made_otherwise_is_seen(tmp_path: Path) -> None:
    """A program that does all of it wrongly, judged without being run."""
    folder = tmp_path / "trial"
    folder.mkdir()
    (folder / "out.1-0.partial").mkdir()
    assert leftovers(folder, keeps_parts=True) == ["out.1-0.partial"]
    (folder / "out.1-0.partial" / "owner.lock").touch()
    assert leftovers(folder, keeps_parts=True) == []

    def lost(_: Path, whole: object) -> str | None:
        raise ValueError(f"cannot be read beside {whole}")

    program = Program(lambda _: None, lambda _: None, lost, lambda _: "other")
    whole = endurance_kills.Whole("this", 1.0, 3)
    trial = endurance_kills._Trial(program, whole, iter([folder]), tmp_path)
    assert trial._lost(folder) == "ValueError: cannot be read beside this"
    (tmp_path / "trial.log").write_text("its last words")
    assert not trial._is_equal_again(folder)
    assert trial.faults == ["run again ended with 0 or is not equal: 'its last words'"]
