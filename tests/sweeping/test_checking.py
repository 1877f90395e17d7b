import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from callbacks.financial_evaluation import FinancialEvaluation
from fingpt_lightning.modules import LowRankPretraining
from fingpt_lightning.sweeping.checking import Built, check_sweep, described, documented_keys
from fingpt_lightning.sweeping.sweep_file import Sweep, WrongSweep, read_sweep
from tests.sweeping.test_sweep_file import COMMAND


class _Stranger:
    """Logs what nobody knows."""


def _sweep(folder: Path, **changes: Any) -> Sweep:
    content = {
        "method": "grid",
        "metric": {"name": "val/loss"},
        "parameters": {
            "model": {"parameters": {"rank": {"values": [4, 7]}, "alpha": {"values": [1, 2]}}}
        },
        "command": COMMAND,
    } | changes
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return read_sweep(path)


class _Parser:
    """Stands in for the command line: a rank of 7 is wrong."""

    def __init__(self, *observers: type) -> None:
        self.seen: list[dict[str, Any]] = []
        self.words: list[str] = []
        self.observers = observers or (LowRankPretraining,)

    def __call__(self, words: list[str]) -> Built:
        self.words = words
        (path,) = [word for word in words if word.endswith("arguments.json")]
        model = json.loads(Path(path).read_text())["model"]
        self.seen.append(model)
        if model["rank"] == 7:
            raise ValueError(f"rank 7 is odd ({path} line 1)")
        return Built({}, self.observers)


def test_every_trial_of_a_grid_is_built_and_the_wrong_one_named(tmp_path: Path) -> None:
    parser = _Parser()
    with pytest.raises(WrongSweep) as caught:
        check_sweep(_sweep(tmp_path), parser, extra=["--trainer.logger.project", "p"])
    assert str(caught.value) == (f"{tmp_path}/mine.yaml: rank 7 is odd (with rank 7, alpha 1)")
    assert parser.seen == [
        {"rank": 4, "alpha": 1},
        {"rank": 4, "alpha": 2},
        {"rank": 7, "alpha": 1},
    ]
    assert parser.words[:3] == ["fit", "--config", "configs/a.yaml"]
    assert parser.words[-2:] == ["--trainer.logger.project", "p"]


def test_trials_that_will_not_run_are_not_built(tmp_path: Path) -> None:
    parser = _Parser()
    check_sweep(_sweep(tmp_path), parser, count=2)
    assert len(parser.seen) == 2


def test_both_ends_and_the_middle_of_a_range_are_built(tmp_path: Path) -> None:
    parameters = {"model": {"parameters": {"rank": {"min": 0.5, "max": 1.5}}}}
    parser = _Parser()
    check_sweep(_sweep(tmp_path, method="random", parameters=parameters), parser)
    assert [model["rank"] for model in parser.seen] == [1.0, 0.5, 1.5]


def test_a_metric_that_nobody_logs_names_the_nearest(tmp_path: Path) -> None:
    sweep = _sweep(tmp_path, metric={"name": "val/los"})
    with pytest.raises(WrongSweep, match=r"metric 'val/los' is logged by no .* mean val/loss\?"):
        check_sweep(sweep, _Parser(), count=1)
    # Of another's callback it is not known what it logs.
    check_sweep(sweep, _Parser(LowRankPretraining, _Stranger), count=1)


def test_keys_of_tasks_are_those_of_the_tasks_that_are_evaluated() -> None:
    callback = {"class_path": "callbacks.FinancialEvaluation", "init_args": {"tasks": ["fpb"]}}
    built = Built({"trainer": {"callbacks": [callback]}}, [FinancialEvaluation])
    single = Built({"trainer": {"callbacks": callback}}, [FinancialEvaluation])
    assert documented_keys(single) == documented_keys(built)
    keys = documented_keys(built)
    assert keys is not None
    assert "eval/fpb/macro_f1" in keys
    assert not any("TASK" in key or "tfns" in key for key in keys)


def test_trials_or_the_space_are_shown(tmp_path: Path) -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(described(_sweep(tmp_path), 3))
        console.print(
            described(
                _sweep(
                    tmp_path,
                    method="random",
                    parameters={"a": {"distribution": "log_uniform_values", "min": 0.1, "max": 1}},
                )
            )
        )
    lines = [line.split() for line in capture.get().splitlines()]
    assert lines[:4] == [["trial", "rank", "alpha"], ["0", "4", "1"], ["1", "4", "2"],
                         ["2", "7", "1"]]  # fmt: skip
    assert ["a", "log", "0.1", "to", "1"] in lines
