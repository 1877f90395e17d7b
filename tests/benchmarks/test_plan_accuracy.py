import json
from pathlib import Path

import pytest

# Lightning sets an environment variable when it is imported: not in a test.
import fingpt_lightning.plan_command  # noqa: F401
from fingpt_lightning.benchmarks import plan_accuracy

CONFIGS = Path(__file__).parents[2] / "configs"


def test_plans_of_debug_configs_are_within_a_tenth_of_their_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("debug_quickstart", "debug_finetune_smollm2_fpb")
    words = ["--json", "record.json", "--max_steps", "3", "--configs"]
    plan_accuracy.main([*words, *(str(CONFIGS / f"{name}.yaml") for name in names)])
    record = json.loads(Path("record.json").read_text())
    assert [row["contender"] for row in record["rows"]] == list(names)
    for row in record["rows"]:
        together = {**row["planned_mib"]}
        assert together.pop("together") == pytest.approx(sum(together.values()), abs=0.05)
        assert row["measured_mib"]["activations"] > 0
    assert 0 < record["summary"]["largest_part_difference"] < 0.1
    assert record["summary"]["largest_total_difference"] < 0.1
    assert "| debug_quickstart, activations |" in Path("record.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"record.json", "record.md"}
