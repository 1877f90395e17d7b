"""The table of families: every cell equal to its oracle, or refused by name."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import families
from benchmarks.families import CELLS, CONFIGS, bound, cell, made_case
from fingpt_lightning.models.families import FAMILIES

_NO_WINDOW = "format gguf: sliding_window 5 below the 96 positions has no place"
_REFUSED = {
    ("mistral, window", "GGUF"): _NO_WINDOW,
    ("qwen2, window", "GGUF"): _NO_WINDOW,
    ("phi3, window", "GGUF"): _NO_WINDOW,
    ("phi3, longrope", "GGUF"): "rope_type longrope is not written as gguf; default is",
}
_IN_PROCESS = [column for column in CELLS if column != "llama.cpp"]


def test_every_family_has_a_row() -> None:
    assert {name.partition(",")[0] for name in CONFIGS} == FAMILIES.keys()
    assert {config().model_type for config in CONFIGS.values()} == FAMILIES.keys()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_every_cell_of_a_family_equals_its_oracle(name: str, tmp_path: Path) -> None:
    case, wrong = made_case(name, tmp_path), dict[str, float | str]()
    for column in _IN_PROCESS:
        if column == "GGUF" and not find_spec("gguf"):
            continue
        found, refusal = cell(case, column), _REFUSED.get((name, column))
        if isinstance(found, str) and refusal is not None and found.startswith(refusal):
            continue
        if isinstance(found, str) or refusal is not None or found > bound(name, column):
            wrong[column] = found
    assert wrong == {}


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_llama_cpp_computes_the_same_from_the_file(name: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    if not find_spec("xllamacpp"):
        pytest.skip("xllamacpp is not installed")
    found = cell(made_case(name, tmp_path), "llama.cpp")
    assert isinstance(found, float)
    assert found <= bound(name, "llama.cpp")


def test_the_record_has_each_cell_and_counts_the_wrong_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "CELLS", {"logits": lambda _: 0.0, "plan": lambda _: 2.0})
    path = tmp_path / "record.json"
    monkeypatch.setattr(
        sys, "argv", ["families", "--json", str(path), "--families", "gpt2", "phi3"]
    )
    families.main()
    record = json.loads(path.read_text())
    assert record["summary"] == {
        "num_cells": 4, "num_equal": 2, "num_refused": 0, "num_wrong": 2
    }  # fmt: skip
    assert record["rows"][1]["family"] == "Phi-3"
    assert "| phi3 | 0 | **2e+00** |" in path.with_suffix(".md").read_text()
