"""What our recipes do to a CUDA device, by an emulated one (`tests/support/cuda_emulation`)."""

import json
from typing import Any

import pytest

from tests.support.cuda_emulation.building import run_on_cuda

# All recipes together take half a minute of a core, which may have other work.
pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("emulation")]

_PRETRAINING = (
    "low-rank", "low-rank in float32", "low-rank in bfloat16 alone", "low-rank in float16",
    "dense", "llama", "spectron", "spectron in float16", "spectron of dense layers",
    "spectron of the embedding's map", "own map of the head", "lora-muon", "lora-muon in float16",
    "lora-muon of dense layers", "healing", "healing softened, by nf4",
    "product decay", "cola", "expansion", "self-guided", "recomputed low-rank",
    "recomputed blocks", "dropout", "dropout recomputed", "aware of nf4", "aware of int8",
    "low-rank with monitors", "residual stream in bfloat16",
)  # fmt: skip
_FINETUNING = (
    "lora", "lora without quantization", "lora in int8", "lora in float64", "lora of odd rows",
    "dora", "lora packed", "lora behind a shared prefix",
    "lora with dropout, blocks recomputed", "lora with dropout, offloaded", "lora with divergence",
    "lora by a teacher", "lora packed, by int8",
)  # fmt: skip
_EVALUATIONS = (
    "evaluation", "evaluation in nf4", "evaluation in int8",
    "generation", "generation in nf4", "generation in int8",
)  # fmt: skip
_RECIPES = _PRETRAINING + _FINETUNING


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a step of each recipe did, by its name; all are run in one process."""
    result = tmp_path_factory.mktemp("cuda") / "steps.json"
    run_on_cuda("tests.support.cuda_emulation.recipes", result)
    return json.loads(result.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_all_recipes_are_tested(steps: dict[str, Any]) -> None:
    others = {"causal attention", "plan of pretraining", "plan of finetuning"}
    others |= {"compression", "rounding to nf4"}
    assert set(steps) == {*_RECIPES, *_EVALUATIONS, *others}


@pytest.mark.parametrize("recipe", _RECIPES)
def test_a_recipe_trains_and_validates_on_the_device(steps: dict[str, Any], recipe: str) -> None:
    step = steps[recipe]
    assert "error" not in step, step["error"]
    assert step["not_on_device"] == []
    assert sum(step["operators"].values()) > 100


@pytest.mark.parametrize("recipe", _EVALUATIONS)
def test_answers_are_scored_and_written_on_the_device(steps: dict[str, Any], recipe: str) -> None:
    found = steps[recipe]
    assert "error" not in found, found["error"]
    assert len(found["answers"]) == 2
    assert sum(found["operators"].values()) > 100


@pytest.mark.parametrize("recipe", _PRETRAINING)
def test_attention_in_16_bits_is_that_of_a_fused_kernel(steps: dict[str, Any], recipe: str) -> None:
    kernel = "efficient" if recipe == "low-rank in float32" else "flash"
    assert set(steps[recipe]["attention"]) == {kernel}


_ON_A_SCALER = ("low-rank in float16", "spectron in float16", "lora-muon in float16")


@pytest.mark.parametrize("recipe", [r for r in _RECIPES if r not in _ON_A_SCALER])
def test_the_host_waits_for_the_device_in_no_step(steps: dict[str, Any], recipe: str) -> None:
    assert steps[recipe]["waits"] == {}


@pytest.mark.parametrize("recipe", _ON_A_SCALER)
def test_in_float16_it_waits_where_the_gradient_scaler_decides(
    steps: dict[str, Any], recipe: str
) -> None:
    read, decided = sorted(steps[recipe]["waits"])
    assert "finite_steps.py" in read
    assert "optimizer_step" in decided
    assert sum(steps[recipe]["waits"].values()) == 2


@pytest.mark.parametrize("recipe", _RECIPES)
def test_a_step_copies_nothing_that_the_host_waits_for(steps: dict[str, Any], recipe: str) -> None:
    copies = steps[recipe]["blocking_copies"]
    if recipe == "aware of nf4":
        # The table of codes, which bitsandbytes 0.50 copies with each matrix.
        assert {place.rpartition(": ")[2] for place in copies} == {"codes, state = quantize_4bit("}
    else:
        assert copies == {}


def test_an_offloaded_block_repeats_the_dropout_of_the_device(steps: dict[str, Any]) -> None:
    offloaded, recomputed = (
        steps[f"lora with dropout, {how}"]["restored_random_states"]
        for how in ("offloaded", "blocks recomputed")
    )
    assert offloaded > 0
    assert recomputed > 0


def test_an_offloaded_block_waits_for_no_copy(steps: dict[str, Any]) -> None:
    step = steps["lora with dropout, offloaded"]
    of_blocks = [place for place in step["copies"] if "models/offload.py" in place]
    assert sorted(place.split(" at ")[0] for place in of_blocks) == ["cpu to cuda", "cuda to cpu"]


@pytest.mark.parametrize("recipe", ["lora packed", "lora behind a shared prefix"])
def test_masks_of_packed_rows_are_made_on_the_device(steps: dict[str, Any], recipe: str) -> None:
    assert not [place for place in steps[recipe]["copies"] if "packed_attention.py" in place]


def test_causal_attention_takes_tensors_of_the_device(steps: dict[str, Any]) -> None:
    assert "error" not in steps["causal attention"]
    assert steps["causal attention"]["operators"]["bmm"] == 2


@pytest.mark.parametrize(
    ("plan", "kernels"), [("pretraining", {"flash"}), ("finetuning", {"efficient"})]
)
def test_a_plan_counts_the_kernels_of_the_device(
    steps: dict[str, Any], plan: str, kernels: set[str]
) -> None:
    found = steps[f"plan of {plan}"]
    assert "error" not in found, found["error"]
    assert set(found["attention"]) == kernels
    assert found["bytes"]["peak"] > found["bytes"]["activations"] > 0


def test_all_stages_of_a_compression_but_healing_run_on_the_device(steps: dict[str, Any]) -> None:
    found = steps["compression"]
    assert "error" not in found, found["error"]
    assert found["measured_on"] == ["NVIDIA H200"] * 2
    moved = " ".join(place for place in found["blocking_copies"] if place.startswith("cpu to cuda"))
    for where in (
        "compression/depth.py", "decomposition/runner.py", "decomposition/sequential.py",
        "data/calibration_text.py", "compression/figures.py",
    ):  # fmt: skip
        assert where in moved, where
    # Blocks refined, layers decomposed with gradients at their outputs, rows rounded to int8.
    for operator in ("addcdiv_", "linalg_solve_triangular", "cholesky_inverse", "round_"):
        assert operator in found["operators"], operator


def test_rounding_with_calibration_stays_on_the_device(steps: dict[str, Any]) -> None:
    found = steps["rounding to nf4"]
    assert "error" not in found, found["error"]
    assert found["not_on_device"] == []
    assert found["operators"]["addr_"] > 100
