import json
from pathlib import Path

import pytest

# Lightning sets an environment variable when it is imported: not in a test.
import fingpt_lightning.planning.command  # noqa: F401
from benchmarks import plan_accuracy
from tests.evaluation.tiny_language import ROWS, tiny_network, tiny_tokenizer

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


def test_rows_of_a_plan_are_as_long_as_those_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their tokenizer is that of the base, not one trained on the rows."""
    monkeypatch.chdir(tmp_path)
    tiny_network("llama").save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    rows = Path("data/fpb/train.jsonl")
    rows.parent.mkdir(parents=True)
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS["fpb"] * 8))
    config = str(CONFIGS / "debug_finetune_smollm2_fpb.yaml")
    words = ["--config", config, "--data.tasks", "fpb", "--data.data_dir", "data"]
    words += ["--model.base", "base", "--model.random_base", "null", "--model.quantize", "null"]
    found = plan_accuracy.compare(config, [*words, "--data.max_length", "200"], max_steps=5)
    assert found["planned_over_measured"]["activations"] == pytest.approx(1, abs=0.01)
