import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import decomposed_quality
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer
from tests.support.warm_python import run_warm

# The benchmark, but its processes of one thread are forks of it, here alone.
_FORKING = """
import multiprocessing
from benchmarks import decomposition
from fingpt_lightning.decomposition import layer_pool
layer_pool.get_context = lambda method: multiprocessing.get_context("fork")
decomposition.main()
"""


def _run(main: Callable[[], None], words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *words])
    main()


def test_the_speed_benchmark_writes_its_record(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    words = ["--json", str(file), "--preset", "toy", "--processes_preset", "toy", "--repeats", "1"]
    done = run_warm(["-c", _FORKING, *words], timeout=200)
    assert done.returncode == 0, done.stderr
    record = json.loads(file.read_text())
    assert {"workers_speedup_ratio", "batched_speedup_ratio"} <= record["summary"].keys()
    by_name = {(row["group"], row["contender"]): row for row in record["rows"]}
    assert len(by_name) == 8
    one, two = (by_name["processes", f"{n} process{'es' * (n > 1)}"] for n in (1, 2))
    assert one["relative_weight_error"] == pytest.approx(two["relative_weight_error"], rel=1e-6)
    for row in record["rows"]:
        assert row["error_ratio"] >= 1 - 1e-6
    assert "gpt2" not in file.with_suffix(".md").read_text()


def test_the_quality_benchmark_goes_on_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_network("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    texts = (decomposed_quality.TRAINING, decomposed_quality.OTHER)
    for name in (*decomposed_quality.TEXTS.values(), *texts):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        line = "Shares of Foo fell as the dividend rose and profit was kept"
        text = json.dumps({"text": line * 9}) if path.suffix == ".jsonl" else line * 9
        path.write_text(text + "\n")
    file = tmp_path / "record.json"
    words = [
        "--json", str(file), "--model", str(tmp_path / "model"), "--shares", "0.8",
        "--data_dir", str(tmp_path / "data"), "--work_dir", str(tmp_path / "work"),
        "--tokens", "64", "--block_length", "16", "--calibration_tokens", "64", "--steps", "2",
        "--batch_size", "2", "--dtype", "float32", "--precision", "32-true",
    ]  # fmt: skip
    _run(decomposed_quality.main, [*words, "--max_rows", "2"], monkeypatch)
    first = json.loads(file.read_text())
    assert [row["contender"] for row in first["rows"]] == ["original", "plain"]
    _run(decomposed_quality.main, words, monkeypatch)
    record = json.loads(file.read_text())
    assert record["rows"][:2] == first["rows"]
    assert [row["contender"] for row in record["rows"][1:]] == [
        *decomposed_quality.WAYS, decomposed_quality.TRAINED,
    ]  # fmt: skip
    both = tmp_path / "work" / "both_texts_in_sequence-0.8" / "decomposition.json"
    made = json.loads(both.read_text())
    assert made["calibration"]["tokens"] == 64
    assert made["settings"]["damping"] == 0.01
    assert made["settings"]["sequential"] is True
    rows = {row["contender"]: row for row in record["rows"]}
    assert 32 < rows[decomposed_quality.TRAINED]["training_tokens"] <= 2 * 2 * 16  # ends of texts
    for row in record["rows"][1:]:
        share = row["parameters"] / rows["original"]["parameters"]
        assert share == pytest.approx(0.8, abs=0.02)
    ratios = record["summary"]
    assert ratios["fed_text_perplexity_ratio_0.8_plain"] == pytest.approx(
        rows["plain"]["fed_text_perplexity"] / rows["original"]["fed_text_perplexity"]
    )
