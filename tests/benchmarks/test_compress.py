import json
import sys
from pathlib import Path

import pytest

from benchmarks import compress
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer


def test_the_benchmark_goes_on_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_network("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name in ("fed_text/train.jsonl", *compress.TEXTS.values()):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        line = "Shares of Foo fell as the dividend rose and profit was kept. " * 9
        is_lines = path.suffix == ".jsonl"
        path.write_text((json.dumps({"text": line}) + "\n") * 20 if is_lines else line * 20)
    (tmp_path / "data" / "fpb").mkdir()
    for split in ("train", "validation"):
        rows_of_labels = [
            json.dumps({"text": f"Foo {label}", "label": label})
            for label in ("positive", "negative", "neutral")
        ]
        text = "\n".join(rows_of_labels * 15)
        (tmp_path / "data" / "fpb" / f"{split}.jsonl").write_text(f"{text}\n")
    file = tmp_path / "record.json"
    words = [
        "--json", str(file), "--model", str(tmp_path / "model"), "--shares", "0.8",
        "--data_dir", str(tmp_path / "data"), "--work_dir", str(tmp_path / "work"),
        "--tokens", "64", "--block_length", "16", "--calibration_tokens", "90", "--refine", "2",
        "--calibration", "fed_text/train.jsonl=2,task:fpb=1", "--heal", "2", "--batch_size", "2",
        "--heal_quantized", "2", "--command_heal", "1", "--teacher_dtype", "float32",
        "--precision", "32-true", "--tasks", "fpb", "--limit", "4",
    ]  # fmt: skip

    def run(*extra: str) -> dict[str, object]:
        monkeypatch.setattr(sys, "argv", ["benchmark", *words, *extra])
        compress.main()
        found: dict[str, object] = json.loads(file.read_text())
        return found

    first = run("--only", "plain SVD;sequential", "--max_rows", "2")
    rows = first["rows"]
    assert isinstance(rows, list)
    assert [row["contender"] for row in rows] == ["original", "plain SVD"]
    only = ["sequential", compress.HEALED, compress.NF4_CALIBRATED]
    only += [compress.COMMAND, "0.8: blocks dropped, healed", "0.5: refined"]
    again = run("--only", ";".join(only))
    found = again["rows"]
    assert isinstance(found, list)
    assert found[:2] == rows
    assert [row["contender"] for row in found] == [
        "original", "plain SVD", "sequential", "healed", "blocks dropped, healed",
        compress.NF4_CALIBRATED, compress.COMMAND,
    ]  # fmt: skip
    made = sorted(path.name for path in (tmp_path / "work").glob("*-0_8"))
    assert made == [
        "blocks_dropped-0_8",
        "blocks_dropped_healed-0_8",
        "fingpt_compress-0_8",
        "healed-0_8",
        "healed_healed_rounded_NF4-0_8",
        "healed_healed_rounded_NF4_calibrated-0_8",
        "plain_SVD-0_8",
        "refined-0_8",
        "sequential-0_8",
    ]
    for row in found[1:]:
        assert row["parameters"] / found[0]["parameters"] == pytest.approx(0.8, abs=0.02)
        assert row["peak_memory_gib"] > 0.1
        assert row["mean_accuracy"] == row["fpb_accuracy"]
    ratios = again["summary"]
    assert isinstance(ratios, dict)
    ratio = found[1]["reuters_validation_perplexity"] / found[0]["reuters_validation_perplexity"]
    assert ratios["perplexity_ratio_nf4_calibrated_over_healed_0.8"] == pytest.approx(1, rel=0.5)
    assert ratios["reuters_validation_perplexity_ratio_0.8_plain_SVD"] == pytest.approx(ratio)
    assert "| sequential |" in file.with_suffix(".md").read_text()
    assert file.with_suffix(".svg").read_text().startswith("<?xml")
