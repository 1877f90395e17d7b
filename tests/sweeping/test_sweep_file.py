from pathlib import Path
from typing import Any

import pytest
import yaml

from fingpt_lightning.sweeping.options import parse_options
from fingpt_lightning.sweeping.sweep_file import Metric, Stopping, WrongSweep, read_sweep
from fingpt_lightning.terminal.command_line import WrongOptions

COMMAND = ["${env}", "${interpreter}", "-m", "fingpt_lightning", "fit", "--config",
           "configs/a.yaml", "--config", "${args_json_file}"]  # fmt: skip


def _content(**changes: Any) -> dict[str, Any]:
    whole = {
        "method": "grid",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": {"model": {"parameters": {"rank": {"values": [1, 2, 3]}}}},
        "command": COMMAND,
    }
    return {key: value for key, value in (whole | changes).items() if value != "left out"}


def _file(folder: Path, **changes: Any) -> Path:
    path = folder / "my_sweep.yaml"
    path.write_text(yaml.safe_dump(_content(**changes)))
    return path


def test_a_sweep_file_is_read(tmp_path: Path) -> None:
    sweep = read_sweep(_file(tmp_path, run_cap=2))
    assert (sweep.name, sweep.metric, sweep.is_maximized) == ("my_sweep", "val/loss", False)
    assert sweep.num_trials == 2
    assert sweep.searched == ["model.rank"]
    assert sweep.arguments({"model.rank": 2}) == {"model": {"rank": 2}}
    words = sweep.fit_words(Path("x.json"))
    assert words == ["fit", "--config", "configs/a.yaml", "--config", "x.json"]


def test_a_grid_knows_its_size_and_others_do_not(tmp_path: Path) -> None:
    assert read_sweep(_file(tmp_path)).num_trials == 3
    assert read_sweep(_file(tmp_path, method="random")).num_trials is None


@pytest.mark.parametrize(
    ("given", "stopping"),
    [
        ({"type": "hyperband", "min_iter": 2}, Stopping(2, 3, None)),
        ({"type": "hyperband", "max_iter": 27, "s": 2}, Stopping(3, 3, 27)),
        ({"type": "hyperband", "max_iter": 3, "s": 4, "eta": 2}, Stopping(1, 2, 3)),
    ],
)
def test_hyperband_begins_where_wandb_begins(
    given: dict[str, Any], stopping: Stopping, tmp_path: Path
) -> None:
    assert read_sweep(_file(tmp_path, early_terminate=given)).stopping == stopping


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": "left out"}, "no sweep file: it has no parameters"),
        ({"parameters": {}}, "parameters is empty"),
        ({"parameters": {"a": {"values": []}}}, "parameter a: values is empty"),
        ({"parameters": {"a": {"min": 0.1, "max": 0.2}}}, "parameter a: a grid needs"),
        ({"method": "gird"}, "method 'gird' is none of grid, random, bayes; did you mean grid"),
        ({"metrik": 1}, "no setting 'metrik'; did you mean metric"),
        ({"metric": "left out", "method": "bayes"}, "metric needs a name"),
        (
            {"metric": "left out", "early_terminate": {"type": "hyperband", "min_iter": 1}},
            "metric needs a name",
        ),
        ({"metric": {"name": "a", "targt": 1}}, "has no setting 'targt'; did you mean target?"),
        ({"metric": {"name": "a", "target": "1e-3"}}, "metric.target '1e-3' is not a finite"),
        ({"metric": {"name": "a", "target": float("nan")}}, "metric.target nan is not a finite"),
        ({"run_cap": True}, "run_cap True is not a whole number"),
        ({"metric": {"name": "a", "goal": "min"}}, "metric.goal 'min' is neither"),
        ({"run_cap": 0}, "run_cap 0 is not a whole number from 1 on"),
        ({"command": "left out"}, "command runs no fingpt fit"),
        ({"command": ["python", "train.py", "${args}"]}, "command runs no fingpt fit"),
        ({"command": ["fingpt", "fit", "${args}"]}, "command has no ${args_json_file}"),
        ({"command": [*COMMAND, "${program}"]}, "command: ${program} is none of ${env}"),
        ({"early_terminate": {"type": "median"}}, "early_terminate.type is not hyperband"),
        ({"early_terminate": {"type": "hyperband"}}, "needs min_iter, or max_iter and s"),
        ({"early_terminate": {"type": "hyperband", "min_itr": 1}}, "did you mean min_iter"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 0}}, "min_iter 0 is not a whole"),
        (
            {"early_terminate": {"type": "hyperband", "min_iter": 1, "s": 2}},
            "early_terminate has s beside min_iter: give min_iter, or max_iter and s",
        ),
    ],
)
def test_what_is_wrong_is_one_line_with_the_file(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = _file(tmp_path, **changes)
    with pytest.raises(WrongSweep) as caught:
        read_sweep(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("method", ["grid", "random"])
def test_without_a_metric_trials_are_compared_by_the_validation_loss(
    method: str, tmp_path: Path
) -> None:
    sweep = read_sweep(_file(tmp_path, metric="left out", method=method))
    assert sweep.compared_by == Metric("val/loss", is_default=True)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"metric": {"name": "a", "impute": "worst"}}, "metric.impute"),
        ({"metric": {"name": "a", "impute_while_running": "best"}}, "metric.impute_while_running"),
        (
            {"early_terminate": {"type": "hyperband", "min_iter": 1, "strict": True}},
            "early_terminate.strict",
        ),
    ],
)
def test_what_the_server_alone_honors_is_refused_locally(
    changes: dict[str, Any], key: str, tmp_path: Path
) -> None:
    sweep = read_sweep(_file(tmp_path, **changes))  # as with --server
    with pytest.raises(WrongSweep, match=rf"my_sweep.yaml: {key} is .* or run with --server"):
        sweep.check_local()


@pytest.mark.parametrize(
    ("goal", "value", "is_reached"),
    [
        ("minimize", 2.5, True),
        ("minimize", 2.6, False),
        ("maximize", 2.6, True),
        ("maximize", 2.4, False),
    ],
)
def test_a_target_is_reached_from_the_side_of_the_goal(
    goal: str, value: float, is_reached: bool, tmp_path: Path
) -> None:
    metric = {"name": "val/loss", "goal": goal, "target": 2.5}
    sweep = read_sweep(_file(tmp_path, metric=metric))
    sweep.check_local()
    assert sweep.compared_by.is_reached(value) is is_reached


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a: [1", "my.yaml line 1 is not YAML"), (b"\xff\xfe\x00", "is not text"), (b"", "no sweep")],
)
def test_a_file_of_another_kind_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes(content)
    with pytest.raises(WrongSweep, match=message):
        read_sweep(path)
    with pytest.raises(FileNotFoundError, match="no such sweep file"):
        read_sweep(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either a sweep file, or --resume"),
        (["a.yaml", "--resume", "b"], "give either a sweep file, or --resume"),
        (["a.yaml", "--server", "--local"], "not allowed with"),
        (["a.yaml", "--server", "--output", "b"], "--output is of local sweeps"),
        (["--resume", "a", "--server"], "--resume is of local sweeps"),
        (["--resume", "a", "--output", "b"], "a resumed sweep stays in its folder"),
        (["a.yaml", "--count", "0"], "0 is below 1"),
        (["a.yaml", "--cuont", "3"], "did you mean --count"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(WrongOptions, match=message):
        parse_options(words)
