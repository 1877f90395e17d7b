import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import STAGES, Stage, main
from benchmarks.training_step import TrainingStep

Note = Callable[[dict[str, Any]], None]


@pytest.mark.filterwarnings("ignore")  # of Lightning, as in its own process
def test_all_stages_run_without_a_device_and_find_nothing_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(command: list[str], limit_s: float) -> tuple[int | None, list[str]]:
        assert command[1:3] == ["-m", "benchmarks.gpu_check"]
        return main(command[3:]), []  # here: ten processes would import torch for a minute

    monkeypatch.setattr(gpu_check, "_ended", ended)
    # torch.compile does not trace the type checks of tests.
    monkeypatch.setattr(TrainingStep, "compile", lambda step: None)
    path = tmp_path / "record.json"
    assert main(["--device", "cpu", "--toy", "--json", str(path)]) == 0
    record: dict[str, Any] = json.loads(path.read_text())
    rows = {row["stage"]: row for row in record["rows"]}
    assert rows.keys() == STAGES.keys()
    assert {name: row["state"] for name, row in rows.items() if row["state"] != "done"} == {
        "waits": "skipped"
    }
    assert record["summary"]["num_checks"] == 49
    assert record["summary"]["wrong"] == []
    assert rows["decoding"]["found"]["rows_1_ratio"] > 0
    assert "| parity |" in path.with_suffix(".md").read_text()


def test_a_stage_runs_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A machine with other work takes long to import torch.
    monkeypatch.setitem(STAGES, "waits", STAGES["waits"]._replace(limit_s=250.0))
    path = tmp_path / "record.json"
    arguments = ["--device", "cpu", "--toy", "--json", str(path), "--stages", "waits"]
    assert main(arguments) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["reason"] == "only torch with CUDA reports them"


def _in_this_process(
    monkeypatch: pytest.MonkeyPatch, stages: dict[str, Callable[[Note], None]]
) -> None:
    """Stages that are run here, by what each does with a function that notes findings."""

    def ended(command: list[str], limit_s: float) -> tuple[int | None, list[str]]:
        name, path = command[4], Path(command[6])

        def note(found: dict[str, Any]) -> None:
            path.write_text(json.dumps(found))

        try:
            stages[name](note)
        except TimeoutError:
            return None, []
        except RuntimeError as error:
            return 1, [str(error)]
        return 0, []

    def unused(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(gpu_check, "STAGES", {name: Stage(unused, 9.0, "") for name in stages})
    monkeypatch.setattr(gpu_check, "_ended", ended)


def _cut(note: Note) -> None:
    note({"b": {"error": 0.0, "bound": 0.0}, "speed_ratio": 2.0})
    raise TimeoutError


def _failed(note: Note) -> None:
    raise RuntimeError("no memory")


def test_only_wrong_numbers_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: dict[str, Callable[[Note], None]] = {
        "right": lambda note: note({"a": {"error": 0.5, "bound": 1.0}}),
        "cut": _cut,
        "failed": _failed,
        "skipped": lambda note: note({"skipped": "no package"}),
    }
    _in_this_process(monkeypatch, stages)
    path = tmp_path / "record.json"
    arguments = ["--device", "cpu", "--json", str(path)]
    assert main([*arguments, "--stages", *stages]) == 0
    record = json.loads(path.read_text())
    assert record["summary"]["num_checks"] == 2
    assert record["summary"]["cut_speed_ratio"] == 2.0
    assert [row["state"] for row in record["rows"]] == ["done", "cut", "failed", "skipped"]
    assert [row.get("reason") for row in record["rows"]] == [
        None, "longer than 9 s", "no memory", "no package",
    ]  # fmt: skip


@pytest.mark.parametrize("error", [2.0, float("nan")])
def test_an_error_outside_its_bound_or_none_at_all_is_wrong(
    error: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _in_this_process(
        monkeypatch, {"parity": lambda note: note({"layer": {"error": error, "bound": 1.0}})}
    )
    path = tmp_path / "record.json"
    assert main(["--device", "cpu", "--json", str(path), "--stages", "parity"]) == 1
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["state"], row["reason"]) == ("wrong", "outside their bounds: layer")


def test_a_stage_that_hangs_is_ended(tmp_path: Path) -> None:
    status, errors = gpu_check._ended([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
    assert (status, errors) == (None, [])
    failing = "import sys; print('why', file=sys.stderr); sys.exit(3)"
    assert gpu_check._ended([sys.executable, "-c", failing], 30) == (3, ["why"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "pariti"], "stage 'pariti' is none of .* did you mean parity"),
        (["--seconds", "0"], "--seconds 0 is not above 0"),
        (["--device", "cuda"], "torch finds no CUDA device"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cpu", "--json", str(tmp_path / "record.json"), *arguments])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)
