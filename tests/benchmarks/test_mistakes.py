"""The benchmark of mistakes times the real program, as in the record."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import mistakes
from fingpt_lightning.cli.early_checks import OFF_VARIABLE
from fingpt_lightning.cli.main import COMMANDS, main

_RECORD = Path(__file__).parents[2] / "docs" / "benchmarks" / "mistakes.json"


def test_every_command_is_timed_with_an_unknown_option() -> None:
    assert set(mistakes.MISTAKES) == set(COMMANDS)
    assert all("unknown option" in kinds for kinds in mistakes.MISTAKES.values())


def test_a_mistake_is_named_within_the_bound(tmp_path: Path) -> None:
    words = ["fit", *mistakes.MISTAKES["fit"]["unknown option"]]
    named = mistakes.run(words, tmp_path, early_checks=True)
    assert named.status == 2
    assert named.line.endswith("no option --trainer.max_stps; did you mean --trainer.max_steps?")
    assert named.seconds < 10 * mistakes.LIMIT_S, "another program may be busy beside the test"


@pytest.mark.parametrize("is_off", ["0", "1"], ids=["early", "late"])
def test_every_output_that_is_there_is_named_early_and_late(
    is_off: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mistakes.make_files(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(OFF_VARIABLE, is_off)
    found = {}
    for command, kinds in mistakes.MISTAKES.items():
        if (words := kinds.get("output is there already")) is not None:
            with pytest.raises(SystemExit, match="1"):
                main([command, *words])
            found[command] = capsys.readouterr().err.strip().splitlines()[-1]
    there = "is there already; --overwrite replaces it"
    assert found == {
        command: f"fingpt: error: {line}"
        for command, line in {
            "evaluate": "output done holds results already; --overwrite replaces them",
            "generate": f"output done.jsonl {there}",
            "label": f"output done.jsonl {there}",
            "decompose": f"output done {there}",
            "export": f"output done {there}",
            "compress": f"output done {there}",
            "sweep": "output done is not empty; --resume goes on with a sweep",
            "configs": "done/quickstart.yaml is there already and differs; copy to another folder",
        }.items()
    }
    assert sorted(tmp_path.rglob("*")) == before


def test_the_record_keeps_the_bounds() -> None:
    record = json.loads(_RECORD.read_text())
    assert {row["command"] for row in record["rows"]} == set(COMMANDS)
    found = record["summary"]
    assert found["longest_s"] < mistakes.LIMIT_S < found["longest_without_early_checks_s"]
    assert found["first_line_of_fit_s"] < mistakes.FIRST_LINE_LIMIT_S
    assert found["over_2.5_s"] == found["other_lines"] == 0


def test_the_summary_counts_slow_and_differing_lines() -> None:
    spread = {"median": 3.0}
    row: dict[str, Any] = {
        "command": "fit",
        "kind": "x",
        "seconds": spread,
        "seconds_before": {"median": 9.0},
    }
    rows = [row | {"same_line": True}, row | {"same_line": False, "seconds": {"median": 1.0}}]
    found = mistakes.summary(rows, [0.5])
    assert found["over_2.5_s"] == found["other_lines"] == 1
    assert found["longest_s"] == pytest.approx(3.0)
