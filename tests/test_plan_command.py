import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Lightning sets an environment variable when it is imported: not in a test.
import fingpt_lightning.plan_command  # noqa: F401
from fingpt_lightning.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"

Plan = Callable[..., tuple[int, str, dict[str, Any]]]


@pytest.fixture
def plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Plan:
    """Plans a shipped config in a folder of its own: status, text and figures."""
    monkeypatch.chdir(tmp_path)

    def call(config: str, *words: str) -> tuple[int, str, dict[str, Any]]:
        figures, status = tmp_path / "plan.json", 0
        own = ["--config", str(CONFIGS / config), "--json", str(figures)]
        if "finetune" not in config:
            own += ["--data.cache_dir", str(tmp_path / "cache")]
        try:
            main(["plan", *own, *words])
        except SystemExit as error:
            status = int(error.code or 0)
        captured = capsys.readouterr()
        found = json.loads(figures.read_text()) if figures.exists() else {}
        left = {path.name for path in tmp_path.iterdir()} - {"plan.json", "cache"}
        assert left == set(), "a plan makes no run folder"
        return status, captured.out + captured.err, found

    return call


@pytest.mark.parametrize(
    "config",
    ["debug_quickstart.yaml", "debug_pretrain_gpt2_small.yaml", "debug_finetune_smollm2_fpb.yaml"],
)
def test_planned_bytes_are_those_that_a_run_measures(plan: Plan, config: str) -> None:
    status, text, found = plan(config, "--trainer.log_every_n_steps", "10")
    assert status == 0, text
    planned, measured = found["bytes"], found["measured_bytes"]
    assert set(measured) == {"weights", "gradients", "optimizer", "activations"}
    for part, num_bytes in measured.items():
        assert math.isclose(planned[part], num_bytes, rel_tol=0.1), (part, planned, measured)
    assert found["is_calibrated"]
    assert found["steps"] == 6
    assert found["seconds"] == pytest.approx(6 * found["step_time_s"])
    assert "fits: the run accounts for" in text


def test_a_model_that_is_not_there_is_planned_by_its_shapes(plan: Plan) -> None:
    status, text, found = plan("finetune_llama2_7b_qlora.yaml", "--data.max_length", "64")
    assert status == 0, text
    assert found["parameters"] > 6.7e9
    assert found["trained"] < 0.01 * found["parameters"]
    assert 3.4e9 < found["bytes"]["weights"] < 4.2e9
    assert not found["is_calibrated"]
    assert "the data were not read (they lie on the hub)" in text
    assert "not calibrated: there are no data" in text
    assert found["seconds"] is None


def test_a_pipeline_is_planned_rank_by_rank(plan: Plan) -> None:
    words = ("--config", str(CONFIGS / "overlays" / "pipeline.yaml"), "--devices", "2")
    status, text, found = plan("debug_quickstart.yaml", *words, "--data.batch_size", "8")
    assert status == 0, text
    assert [stage["blocks"] for stage in found["stages"]] == ["0 to 0", "1 to 1"]
    held = sum(stage["parameters"] for stage in found["stages"])
    assert held >= found["parameters"]
    assert "not calibrated: the run has 2 processes" in text
    assert "the fullest rank accounts for" in text


def test_wrong_words_are_told_as_by_fit(plan: Plan) -> None:
    status, text, _ = plan("debug_quickstart.yaml", "--model.init_args.rnak", "3")
    assert status == 2
    assert "did you mean" in text
    assert len(text.strip().splitlines()) == 1
    status, text, _ = plan("debug_quickstart.yaml", "--json", "absent/plan.json")
    assert status == 1
    assert "there is no folder absent" in text
    status, text, _ = plan("debug_quickstart.yaml", "--calibrate", "--no_calibrate")
    assert status == 2
    assert "not allowed with" in text
