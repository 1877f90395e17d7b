import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Lightning sets an environment variable when it is imported: not in a test.
import fingpt_lightning.planning.command  # noqa: F401
from fingpt_lightning.cli.main import main
from fingpt_lightning.modules import LowRankPretraining
from tests.models.tiny_models import tiny_gpt2

CONFIGS = Path(__file__).parents[2] / "configs"

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


def test_a_tokenizer_that_is_not_here_is_the_reason_that_data_are_not_read(plan: Plan) -> None:
    status, text, _ = plan("debug_quickstart.yaml", "--data.tokenizer", "nobody/nothing")
    assert status == 0, text
    assert "data were not read (tokenizer nobody/nothing is not on this machine)" in text
    assert "not calibrated: the data were not read" in text


@pytest.mark.parametrize(
    ("config", "billions", "weights_gb"),
    [
        ("finetune_llama2_7b_qlora.yaml", 6.7, 3.9),
        ("finetune_llama2_13b_qlora.yaml", 13.0, 7.3),
        ("finetune_llama2_70b_qlora_pipeline.yaml", 69.0, 36.8),
    ],
)
def test_a_model_that_is_not_there_is_planned_by_its_shapes(
    plan: Plan, config: str, billions: float, weights_gb: float
) -> None:
    status, text, found = plan(config, "--data.max_length", "64", "--trainer.accelerator", "cpu")
    assert status == 0, text
    assert found["parameters"] == pytest.approx(1e9 * billions, rel=0.02)
    assert found["trained"] < 0.01 * found["parameters"]
    assert found["bytes"]["weights"] == pytest.approx(1e9 * weights_gb, rel=0.03)
    assert not found["is_calibrated"]
    assert "the data were not read (they lie on the hub)" in text
    assert "not calibrated: " in text
    assert found["seconds"] is None
    assert f"Plan of {config}" in text, "in one line"
    if "pipeline" in config:
        assert len(found["stages"]) == 4
        fullest = max(s["weights_and_state"] + s["activations"] for s in found["stages"])
        assert 9e9 < fullest < 10.1e9


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


def test_a_plan_names_the_rank_that_fills_the_tiles_of_a_gpu(plan: Plan) -> None:
    words = ["--trainer.accelerator", "cpu", "--no_calibrate", "--model.num_layers", "1"]
    words += ["--model.width", "768", "--model.num_heads", "12", "--model.embedding_rank", "null"]
    status, text, found = plan("debug_pretrain_gpt2_small.yaml", *words, "--model.rank", "224")
    assert status == 0, text
    assert "88%, all at rank 256 in place of 224" in text
    (tiles,) = found["rank_tiles"]["ranks"]
    assert tiles == {"rank": 224, "num_layers": 4, "filled": 0.875, "full_rank": 256}


def test_a_teacher_is_counted_in_the_peak_and_in_the_time(plan: Plan, tmp_path: Path) -> None:
    words = ("--trainer.accelerator", "cpu", "--no_calibrate")
    _, _, alone = plan("debug_pretrain_gpt2_small.yaml", *words)
    folder = tmp_path.with_name(f"{tmp_path.name}_teacher")
    network = tiny_gpt2()
    network.save_pretrained(folder)
    taught = ("--model.teacher", str(folder), "--model.teacher_dtype")
    status, text, found = plan("debug_pretrain_gpt2_small.yaml", *words, *taught, "float32")
    assert status == 0, text
    weights = 4 * sum(p.numel() for p in network.parameters())
    assert found["teacher_bytes"] == weights
    logits = found["tokens_a_step"] * network.config.vocab_size * 8
    assert found["bytes"]["peak"] == alone["bytes"]["peak"] + weights + logits
    assert "the teacher's weights, in the peak" in text
    assert found["bytes"]["weights"] == alone["bytes"]["weights"]
    _, _, halved = plan("debug_pretrain_gpt2_small.yaml", *words, *taught, "bfloat16")
    assert halved["teacher_bytes"] == weights // 2


def test_weights_that_are_held_twice_are_counted_in_the_peak(plan: Plan) -> None:
    narrow: dict[str, Any] = {
        "recipe": "narrow", "compression": 2.0, "rank": "auto", "embedding_rank": None,
        "learning_rate": None, "vocab_size": 4096,
    }  # fmt: skip
    words = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--no_calibrate"]
    for key, value in narrow.items():
        words += [f"--model.{key}", "null" if value is None else str(value)]
    _, _, alone = plan("debug_quickstart.yaml", *words)
    assert alone["copied_bytes"] == 0
    sizes: dict[str, Any] = {"num_layers": 2, "width": 32, "num_heads": 2, "num_positions": 32}
    network = LowRankPretraining("gpt2-nano", **sizes, **narrow).laid_out()
    # An export rounds neither positions nor a map that the head has of its own.
    kept = ("transformer.wpe.weight", "lm_head.up")
    matrices = {n: p for n, p in network.named_parameters() if p.ndim == 2 and n not in kept}
    average = "lightning.pytorch.callbacks.EMAWeightAveraging"
    for extra, copied in (
        (("--model.quantization_aware", "nf4"), 4 * sum(p.numel() for p in matrices.values())),
        (("--trainer.callbacks", average), alone["bytes"]["weights"]),
        (("--trainer.callbacks", average, "--trainer.callbacks.device", "cuda"), 0),
    ):
        status, text, found = plan("debug_quickstart.yaml", *words, *extra)
        assert status == 0, text
        assert found["copied_bytes"] == copied
        assert found["bytes"]["peak"] == alone["bytes"]["peak"] + copied
        assert ("weights held a second time, in the peak" in text) == bool(copied)
