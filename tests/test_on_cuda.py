"""What our recipes do to a CUDA device, by an emulated one (`tests/support/cuda_emulation`)."""

import json
from typing import Any

import pytest

from tests.support.cuda_emulation.building import run_on_cuda

_PRETRAINING = (
    "low-rank", "low-rank in float32", "low-rank in bfloat16 alone", "low-rank in float16",
    "dense", "llama", "spectron", "spectron in float16", "spectron of dense layers",
    "product decay", "cola", "expansion", "self-guided", "recomputed low-rank",
    "recomputed blocks", "dropout", "dropout recomputed", "aware of nf4", "aware of int8",
)  # fmt: skip
_FINETUNING = (
    "lora", "lora without quantization", "lora in int8", "lora of odd rows", "dora",
    "lora packed", "lora behind a shared prefix", "lora with dropout, blocks recomputed",
    "lora with dropout, offloaded", "lora with divergence",
)  # fmt: skip
_RECIPES = _PRETRAINING + _FINETUNING


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a step of each recipe did, by its name; all are run in one process."""
    result = tmp_path_factory.mktemp("cuda") / "steps.json"
    run_on_cuda("tests.support.cuda_emulation.recipes", result)
    return json.loads(result.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_all_recipes_are_tested(steps: dict[str, Any]) -> None:
    assert set(steps) == set(_RECIPES)


@pytest.mark.parametrize("recipe", _RECIPES)
def test_a_recipe_trains_and_validates_on_the_device(steps: dict[str, Any], recipe: str) -> None:
    step = steps[recipe]
    assert "error" not in step, step["error"]
    assert step["not_on_device"] == []
    assert sum(step["operators"].values()) > 100


@pytest.mark.parametrize("recipe", _PRETRAINING)
def test_attention_in_16_bits_is_that_of_a_fused_kernel(steps: dict[str, Any], recipe: str) -> None:
    kernel = "efficient" if recipe == "low-rank in float32" else "flash"
    assert set(steps[recipe]["attention"]) == {kernel}
