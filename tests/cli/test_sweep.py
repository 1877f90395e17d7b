"""What is wrong with a sweep is one line before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

# Lightning sets an environment variable when it is imported: not in a test.
import fingpt_lightning.cli.sweep  # noqa: F401
from fingpt_lightning.cli.main import main

CONFIG = Path(__file__).parents[2] / "configs" / "debug_quickstart.yaml"


def _sweep(settings: dict[str, Any], metric: str = "val/loss") -> str:
    command = ["${env}", "${interpreter}", "-m", "fingpt_lightning", "fit", "--config"]
    content = {
        "method": "grid",
        "metric": {"name": metric, "goal": "minimize"},
        "parameters": {"model": {"parameters": {"init_args": {"parameters": settings}}}},
        "command": [*command, str(CONFIG), "--config", "${args_json_file}"],
    }
    return yaml.safe_dump(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_sweep({"rnk": {"values": [1, 2]}}), "model has no setting 'rnk'; did you mean rank?"),
        (_sweep({"rank": {"values": [4, 99]}}), "rank 99 is outside [1, 32]"),
        (_sweep({"rank": {"values": [4]}}, "val/los"), "'val/los' is logged by no module or"),
        (_sweep({"rank": {"values": []}}), "parameter model.init_args.rank: values is empty"),
        (_sweep({}), "parameters is empty"),
        ("a: [1,", "mine.yaml line 1 is no YAML"),
        (
            _sweep({"rank": {"values": [4]}}).replace("goal:", "impute: worst\n  goal:"),
            "mine.yaml: metric.impute is honored by W&B's server alone; remove it or run with",
        ),
    ],
    ids=["name", "value", "metric", "empty_values", "empty_grid", "no_yaml", "server_alone"],
)
def test_a_wrong_sweep_ends_before_anything_runs(
    text: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "mine.yaml", "--local"])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"], "no folder was made"


@pytest.mark.parametrize("words", [("sweep", "--resume", "empty"), ("report", "empty")])
def test_a_folder_that_is_no_sweep_or_run_is_said_to_be_none(
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "fingpt: error: empty is no " in error
