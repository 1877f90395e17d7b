"""``fingpt compress``: every stage, and what a killed run keeps."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import PreTrainedModel

from fingpt_lightning.cli.main import main
from fingpt_lightning.compression import command, healing, plan, stages
from fingpt_lightning.compression.plan import plan_stages
from fingpt_lightning.compression.settings import Settings
from fingpt_lightning.data import TextBlocks
from fingpt_lightning.data.calibration_text import Calibration, calibration_sources
from fingpt_lightning.decomposition.source import open_source
from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.models.families import head_of
from fingpt_lightning.models.formats.hf_folder import write_network
from fingpt_lightning.models.from_scratch import build_network
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.models.quantization.frozen_matrix import quantization_of
from fingpt_lightning.models.quantization.quantized_embedding import QuantizedHead
from fingpt_lightning.models.shapes import GPT2Shape
from fingpt_lightning.modules import LowRankPretraining
from fingpt_lightning.units import format_bytes
from tests.evaluation.tiny_language import POSITIONS, VOCABULARY, tiny_network, tiny_tokenizer
from tests.support.short_run import run_shortly

Compress = Callable[..., tuple[int, str, str]]
LINES = ["Shares of Foo fell", "Profit rose", "The dividend of Foo Corp was kept as it was"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, texts and the rows of a task."""
    folder = tmp_path_factory.mktemp("compress")
    tiny_network("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    lines = "".join(json.dumps({"text": f"{line} {n}"}) + "\n" for n in range(60) for line in LINES)
    (folder / "text.jsonl").write_text(lines)
    (folder / "other.txt").write_text("Foo Corp kept its dividend as profit rose. " * 20)
    (folder / "fpb").mkdir()
    for split, number in (("train", 40), ("validation", 5)):
        rows = [{"text": "Foo rose", "label": "positive"}, {"text": "It fell", "label": "negative"}]
        text = "".join(f"{json.dumps(row)}\n" for row in rows * number)
        (folder / "fpb" / f"{split}.jsonl").write_text(text)
    return folder


@pytest.fixture
def compress(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Compress:
    """Runs ``fingpt compress`` into ``small``; gives status, output and error."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str | Path) -> tuple[int, str, str]:
        status = 0
        capsys.readouterr()
        own = [
            "--model", given / "model", "--output", tmp_path / "small", "--size", "0.8",
            "--calibration", f"{given / 'text.jsonl'}=2", "task:fpb", "--data_dir", given,
            "--calibration_tokens", "600", "--refine", "3", "--precision", "32-true",
            "--block_length", "32", "--text_tokens", "128", "--texts", given / "other.txt",
        ]  # fmt: skip
        try:
            main(["compress", *map(str, (*own, *words))])
        except SystemExit as error:
            status = int(error.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def _logits(folder: Path) -> torch.Tensor:
    network: PreTrainedModel = load_model(folder).network
    with torch.no_grad():
        logits: torch.Tensor = network(input_ids=torch.arange(20)[None]).logits
    return logits


HEALED = ("--heal", "4", "--learning_rate", "0.003", "--tasks", "fpb", "--limit", "4")


def test_a_model_is_made_small_healed_rounded_and_measured(
    compress: Compress, given: Path, tmp_path: Path
) -> None:
    status, output, error = compress(*HEALED, "--format", "int8")
    assert status == 0, error
    out = tmp_path / "small"
    record = json.loads((out / "compression.json").read_text())
    original, small = record["original"], record["small"]
    assert small["parameters"] == pytest.approx(0.8 * original["parameters"], rel=0.02)
    assert small["file_bytes"] < 0.6 * original["file_bytes"]
    for figures in (original, small):
        (text,) = figures["perplexity"]
        assert text.endswith("other.txt")
        assert figures["perplexity"][text] > 1
        assert 0 <= figures["tasks"]["fpb"] <= 1
        assert figures["decoded_tokens_per_s"] > 0
    assert "small / original" in output
    assert "accuracy, fpb" in output
    for stage in ("decompose", "refine", "heal", "round", "evaluate"):
        assert stage in output
    card = (out / "README.md").read_text()
    assert "| parameters |" in card
    learned = "its predictions (weight 0.5) and the text's own tokens"
    assert f"4 steps of training on {learned}, stored as int8" in card
    data: Any = ModelCard(card).data
    metadata = data.to_dict()
    assert metadata["tags"] == ["fingpt-lightning", "low-rank", "compressed", "int8"]
    assert metadata["datasets"] == ["takala/financial_phrasebank"]
    (result,) = metadata["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(small["tasks"]["fpb"], abs=1e-4)
    assert load_model(out).description.endswith("(low-rank llama, int8)")
    assert _logits(out).isfinite().all()
    assert json.loads((out / "decomposition.json").read_text())["blocks"]
    assert not (tmp_path / "small.partial").exists() or not any(
        path.is_dir() for path in (tmp_path / "small.partial").iterdir()
    )
    status, _, error = compress(*HEALED)
    assert (status, "is there already" in error) == (1, True)


@pytest.mark.parametrize("stage", ["heal", "export", "measure"])
def test_a_killed_run_goes_on_with_what_is_finished(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    real = getattr(stages, stage)

    def killed(*_: Any, **__: Any) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(stages, stage, killed)
    status, _, error = compress("--heal", "2")
    assert (status, "killed" in error) == (1, True)
    parts = tmp_path / "small.partial"
    decomposed = parts / "decomposed" / "model.safetensors"
    finished = [decomposed] if stage == "heal" else [decomposed, parts / "healing" / "end.ckpt"]
    times = [path.stat().st_mtime_ns for path in finished]
    seen: list[int] = []

    def watched(*arguments: Any, **settings: Any) -> Any:
        seen.extend(path.stat().st_mtime_ns for path in finished)
        return real(*arguments, **settings)

    monkeypatch.setattr(stages, stage, watched)
    status, _, error = compress("--heal", "3")
    assert (status, "of an unfinished run with heal 2, now 3" in error) == (1, True)
    status, _, error = compress("--heal", "2")
    assert status == 0, error
    assert seen[: len(times)] == times
    assert (tmp_path / "small" / "compression.json").is_file()


HEALING: dict[str, Any] = {"heal": 2, "teacher_weight": 0.25, "warmup": 0.5, "weight_decay": 0.2}
"""Settings of healing other than the defaults."""


def test_a_killed_healing_ends_at_the_weights_of_a_whole_one_from_python(
    compress: Compress, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = command.compress(
        given / "model", tmp_path / "whole", size=0.8, data_dir=given, calibration_tokens=600,
        calibration=[f"{given / 'text.jsonl'}=2", "task:fpb"], refine=3, precision="32-true",
        block_length=32, text_tokens=128, texts=[given / "other.txt"], device="cpu", format="nf4",
        heal_quantized=2, **HEALING,
    )  # fmt: skip
    assert isinstance(made, stages.Compression)
    assert {key: made.settings[key] for key in HEALING} == HEALING
    assert made.small["device"] == "cpu"
    real = LowRankPretraining.training_step
    killed: dict[str | None, dict[str, Any]] = {}
    steps: list[tuple[str | None, int]] = []

    def watched(self: Any, batch: Any, batch_idx: int) -> Any:
        stage = self.hparams["quantization_aware"]
        if self.trainer.global_step == 1 and stage not in killed:
            killed[stage] = dict(self.hparams)
            raise RuntimeError("killed")
        steps.append((stage, self.trainer.global_step))
        return real(self, batch, batch_idx)

    monkeypatch.setattr(LowRankPretraining, "training_step", watched)
    words = [f"--{key}={value}" for key, value in HEALING.items()]
    words += ["--heal_quantized", "2", "--format", "nf4"]
    for stage in ("healing", "healing_quantized"):
        status, _, error = compress(*words)
        assert (status, "killed" in error) == (1, True), error
        assert (tmp_path / "small.partial" / stage / "last.ckpt").is_file()
    status, _, error = compress(*words, "--teacher_weight", "0.5")
    assert status == 1
    assert "of an unfinished run with teacher_weight 0.25, now 0.5" in error
    status, _, error = compress(*words)
    assert status == 0, error
    assert torch.equal(_logits(tmp_path / "small"), _logits(tmp_path / "whole"))
    assert steps == [(None, 0), (None, 1), ("nf4", 0), ("nf4", 1)], "no step was made twice"
    assert list(killed) == [None, "nf4"]
    for hparams in killed.values():
        assert {key: hparams[key] for key in HEALING if key != "heal"} == {
            key: value for key, value in HEALING.items() if key != "heal"
        }
    card = (tmp_path / "small" / "README.md").read_text()
    assert "2 steps of training on its predictions (weight 0.25) and the text's own tokens" in card
    assert ", 2 more with rounded weights, stored as nf4" in card


def test_a_block_is_left_out_and_the_rest_is_taken_apart(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--size", "0.7", "--drop_blocks", "1", "--heal", "2")

    def killed(*_: Any, **__: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(stages, "decompose_model", killed)
        status, output, error = compress(*words)
        assert (status, "killed" in error) == (1, True)
    assert re.search(r"drop blocks +1 of 2 blocks, by the loss on", output)
    assert re.search(r"^dropping blocks [01]$", output, re.MULTILINE)
    status, output, error = compress(*words)
    assert status == 0, error
    assert "dropping blocks" not in output, "the finished stage was made again"
    out = tmp_path / "small"
    record = json.loads((out / "compression.json").read_text())
    ratio = record["small"]["parameters"] / record["original"]["parameters"]
    assert ratio == pytest.approx(0.7, rel=0.02)
    network = load_model(out).network
    assert network.config.num_hidden_layers == 1
    assert network.num_parameters() == record["small"]["parameters"]
    assert "1 of its blocks left out" in (out / "README.md").read_text()
    assert _logits(out).isfinite().all()


@pytest.fixture(scope="module")
def sources(given: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Dense blocks in each kind of source; those of a run of ours behind a factorized embedding."""
    folder = tmp_path_factory.mktemp("sources")
    export(load_model(given / "model"), "gguf", folder / "gguf")
    module = LowRankPretraining(
        num_layers=2, width=32, num_heads=2, num_positions=POSITIONS, rank=None, embedding_rank=8,
        head_map="own",
    )  # fmt: skip
    text = str(given / "other.txt")
    data = TextBlocks(
        text, text, tokenizer=str(given / "model"), block_length=16, batch_size=2,
        cache_dir=str(folder / "cache"),
    )  # fmt: skip
    run_shortly(module, data, folder / "run.ckpt", 1)
    return {"hf": given / "model", "gguf": folder / "gguf", "run": folder / "run.ckpt"}


@pytest.mark.parametrize("form", ["low_rank", "int8", "nf4"])
@pytest.mark.parametrize("kind", ["hf", "gguf", "run"])
def test_each_kind_of_source_is_shortened_and_healed_for_each_format(
    given: Path, sources: dict[str, Path], tmp_path: Path, kind: str, form: str
) -> None:
    """By the curvature of the loss too: gradients pass heads with factors of their own."""
    size = 0.6 if kind == "run" else 0.7
    heal_quantized = int(form != "low_rank")
    made = command.compress(
        sources[kind], tmp_path / "small", size=size, calibration=given / "text.jsonl", format=form,
        calibration_tokens=330, refine=0, whitening="both", drop_blocks=1, device="cpu",
        tokenizer=given / "model" if kind == "gguf" else None, heal=1, teacher_weight=0.5,
        block_length=16, precision="32-true", heal_quantized=heal_quantized,
    )  # fmt: skip
    assert isinstance(made, stages.Compression)
    ratio = made.small["parameters"] / made.original["parameters"]
    assert ratio == pytest.approx(size, rel=0.04)
    network = load_model(tmp_path / "small").network
    assert network.config.num_hidden_layers == 1
    assert quantization_of(network) == (None if form == "low_rank" else form)
    embedding = network.get_input_embeddings()
    if kind == "run":
        assert embedding.table is head_of(network).table
        assert embedding.up is not head_of(network).up
    assert _logits(tmp_path / "small").isfinite().all()


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_low_rank_weights_are_stored_in_the_dtype_of_the_original(
    compress: Compress, tmp_path: Path, stored: str
) -> None:
    dtype = getattr(torch, stored)
    tiny_network("llama").to(dtype).save_pretrained(tmp_path / "original")
    tiny_tokenizer().save_pretrained(tmp_path / "original")
    status, _, error = compress("--model", tmp_path / "original")
    assert status == 0, error
    weights = load_file(tmp_path / "small" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {dtype}
    record = json.loads((tmp_path / "small" / "compression.json").read_text())
    assert record["small"]["file_bytes"] < record["original"]["file_bytes"]
    assert f"stored as low_rank in {stored}" in (tmp_path / "small" / "README.md").read_text()
    status, _, error = compress(
        "--model", tmp_path / "original", "--overwrite", "--dtype", "float32"
    )
    assert status == 0, error
    weights = load_file(tmp_path / "small" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_a_dtype_beside_rounding_is_refused(compress: Compress) -> None:
    status, _, error = compress("--format", "nf4", "--dtype", "bfloat16")
    assert status == 2
    assert "--dtype has an effect with --format low_rank alone" in error


def test_a_head_with_a_map_of_its_own_keeps_it(
    compress: Compress, given: Path, tmp_path: Path
) -> None:
    shape = GPT2Shape(num_layers=2, width=32, num_heads=2, num_positions=POSITIONS)
    network = build_network(shape, VOCABULARY, None, 20, seed=1, has_own_head_map=True)
    with torch.no_grad():
        head_of(network).get_parameter("up").mul_(1.5)
    (tmp_path / "own").mkdir()
    write_network(network, tmp_path / "own", torch.float32)
    tiny_tokenizer().save_pretrained(tmp_path / "own")
    words = ("--model", tmp_path / "own", "--size", "0.9", "--heal", "2", "--learning_rate", "1e-6")
    status, _, error = compress(*words, "--format", "int8")
    assert status == 0, error
    loaded = load_model(tmp_path / "small")
    assert loaded.description.endswith("(low-rank gpt2, int8)")
    head = head_of(loaded.network)
    assert isinstance(head, QuantizedHead)
    expected = head_of(network).get_parameter("up")
    torch.testing.assert_close(head.get_parameter("up"), expected, rtol=0, atol=1e-4)
    assert _logits(tmp_path / "small").isfinite().all()


def test_ranks_and_factors_by_the_loss_are_made_and_planned(
    compress: Compress, tmp_path: Path
) -> None:
    words = ("--allocation", "loss", "--whitening", "both")
    status, _, error = compress(*words)
    assert status == 0, error
    record = json.loads((tmp_path / "small" / "compression.json").read_text())
    assert record["settings"]["allocation"] == "loss"
    assert record["settings"]["whitening"] == "both"
    ratio = record["small"]["parameters"] / record["original"]["parameters"]
    assert ratio == pytest.approx(0.8, rel=0.02)
    made = json.loads((tmp_path / "small" / "decomposition.json").read_text())["settings"]
    assert (made["allocation"], made["whitening"], made["sequential"]) == ("loss", "both", True)
    assert _logits(tmp_path / "small").isfinite().all()


SETTINGS = Settings(
    model="", size=0.8, format="low_rank", dtype="float32", calibration=(),
    calibration_tokens=10_000,
    data_dir=None, allocation="uniform", whitening="input", drop_blocks=0, embedding_rank=None,
    refine=0, heal=0, heal_quantized=0, batch_size=1, block_length=32, learning_rate=0.1,
    warmup=0.1, weight_decay=0.0, precision="32-true", teacher_weight=1.0, teacher_dtype="float32",
    texts={}, text_tokens=1, tasks=(), limit=None, seed=1, tokenizer=None,
)  # fmt: skip
"""The least that is made."""


def test_a_plan_counts_the_backward_pass(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "measured_peak_flops_per_s", lambda *_: 1e9)
    source = open_source(given / "model")
    stages_of = {}
    ways: list[dict[str, Any]] = [{}, {"allocation": "loss"}, {"whitening": "both"}]
    for way in ways:
        (stages_of[str(way)], _) = plan_stages(source, replace(SETTINGS, **way), 10_000)
    plain, loss, both = stages_of.values()
    assert plain.seconds is not None
    assert loss.seconds is not None
    assert (loss.seconds, loss.num_bytes) == (both.seconds, both.num_bytes)
    network = source.network
    operations = 2 * 10_000 * (
        3 * network.num_parameters() + sum(layer.out_features**2 for layer in source.layers)
    )  # fmt: skip
    assert loss.seconds - plain.seconds == pytest.approx(operations / 0.4e9)
    assert loss.num_bytes >= plain.num_bytes


def test_a_plan_makes_nothing(compress: Compress, tmp_path: Path) -> None:
    status, output, error = compress("--heal", "4", "--plan", "--format", "nf4")
    assert status == 0, error
    rows = [line.split()[0] for line in output.splitlines() if "about" in line]
    assert rows == ["decompose", "refine", "heal", "round", "evaluate"]
    assert not list(tmp_path.iterdir())


def test_a_plan_for_a_gpu_counts_its_bytes_and_knows_no_times(given: Path) -> None:
    source = open_source(given / "model")
    every = replace(
        SETTINGS, drop_blocks=1, refine=1, heal=1, format="int8", allocation="loss", size=0.7
    )
    on_cpu, on_gpu = (
        plan_stages(source, every, 10_000, torch.device(name)) for name in ("cpu", "cuda:1")
    )
    assert [stage.seconds for stage in on_gpu] == [None] * 6
    decompose = [stage.name for stage in on_gpu].index("decompose")
    states = 4 * 10_000 * source.network.config.hidden_size
    # The states before the one block that is left lie on the host, whichever device computes.
    assert on_gpu[decompose].what.endswith(f", {format_bytes(states)} on the host")
    equal = [a.num_bytes == b.num_bytes for a, b in zip(on_cpu, on_gpu, strict=True)]
    assert equal == [True] * 6


@pytest.mark.parametrize(
    ("dtype", "precision"), [("bfloat16", "bf16-mixed"), ("float32", "32-true")]
)
def test_the_precision_of_healing_follows_the_device(
    compress: Compress, monkeypatch: pytest.MonkeyPatch, dtype: str, precision: str
) -> None:
    found: list[Any] = []

    def find_dtype(*given: Any) -> str:
        found.append(given)
        return dtype

    monkeypatch.setattr(command, "find_dtype", find_dtype)
    words = ("--precision", "auto", "--device", "cpu", "--plan")
    status, output, error = compress(*words)
    assert status == 0, error
    assert not found, "nothing is healed"
    assert output.rstrip().endswith("on cpu")
    status, output, error = compress(*words, "--heal", "4")
    assert status == 0, error
    assert precision in output
    ((name, device, sizes),) = found
    assert (name, device.type, sizes) == ("auto", "cpu", (24, 39))


def test_a_killed_run_keeps_its_precision_on_another_device(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: Any, __: Any, made: Path, *___: Any, **____: Any) -> None:
        made.mkdir()
        (made / "layer").touch()
        raise RuntimeError("killed")

    monkeypatch.setattr(stages, "decompose_model", killed)
    words = ("--precision", "auto", "--heal", "4")
    monkeypatch.setattr(command, "find_dtype", lambda *_: "float32")
    status, _, error = compress(*words)
    assert (status, "killed" in error) == (1, True)
    begun = json.loads((tmp_path / "small.partial" / "settings.json").read_text())
    assert (begun["precision"], begun["teacher_dtype"]) == ("32-true", "float32")
    assert not {"device", "devices"} & begun.keys()
    monkeypatch.setattr(command, "find_dtype", lambda *_: "bfloat16")
    status, output, error = compress(*words, "--plan", "--device", "cpu")
    assert (status, "32-true" in output) == (0, True), error
    status, output, error = compress(*words, "--plan", "--overwrite")
    assert (status, "bf16-mixed" in output) == (0, True), error
    status, _, error = compress("--heal", "4", "--precision", "bf16-mixed")
    assert status == 1
    assert "of an unfinished run with precision '32-true', now 'bf16-mixed'" in error


def test_every_stage_is_run_on_the_device_and_figures_are_of_one(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stages stand still here; `tests/test_on_cuda.py` runs them on an emulated device."""
    source = open_source(given / "model")
    every = replace(SETTINGS, drop_blocks=1, heal=1, format="int8", model=str(given / "model"))
    placed: dict[str, Any] = {}

    def stage(name: str, makes: Callable[..., Path | None]) -> None:
        def run(*arguments: Any, **settings: Any) -> Any:
            where = settings.get("device", settings.get("devices"))
            placed.setdefault(name, []).append(where)
            if (made := makes(*arguments)) is not None:
                made.mkdir()
                (made / "decomposition.json").write_text('{"parameters": 9}')

        monkeypatch.setattr(stages, name, run)

    stage("write_shorter", lambda *given: given[-1])
    stage("decompose_model", lambda *given: given[2])
    stage("heal", lambda *_: None)
    stage("load_model", lambda *_: None)
    figures = {
        "file_bytes": 1, "memory_bytes": 1, "perplexity": {}, "tasks": {}, "device": "first GPU"
    }  # fmt: skip
    measured: list[str] = []
    breaking = {"rounded"}

    def measure(model: Any, *_: Any, device: str, **__: Any) -> dict[str, Any]:
        measured.append(f"{Path(model).name} on {device}")
        if Path(model).name in breaking:
            raise RuntimeError("killed")
        return figures

    monkeypatch.setattr(stages, "measure", measure)
    monkeypatch.setattr(stages, "open_source", lambda _: source)
    monkeypatch.setattr(stages, "export", lambda *given, **_: given[2].mkdir())
    monkeypatch.setattr(stages, "device_name", lambda _: figures["device"])

    def run(*devices: str) -> stages.Compression:
        calibration = Calibration(torch.arange(8)[None], "numbers")
        return stages.run_stages(
            source, every, (), calibration, {}, tmp_path / "small", devices=devices
        )

    with pytest.raises(RuntimeError, match="killed"):
        run("cuda:1", "cuda:2")
    assert placed == {
        "write_shorter": ["cuda:1"],
        "decompose_model": [("cuda:1", "cuda:2")],
        "heal": ["cuda:1"],
        "load_model": ["cuda:1", "cuda:1"],
    }
    assert measured == ["model on cuda:1", "rounded on cuda:1"]
    measured.clear()
    with pytest.raises(RuntimeError, match="killed"):
        run("cuda:1")
    assert measured == ["rounded on cuda:1"], "figures of the same kind of device are kept"
    measured.clear()
    breaking.clear()
    figures["device"] = "second GPU"
    made = run("cuda:0")
    assert measured == ["model on cuda:0", "rounded on cuda:0"]
    assert made.original["device"] == made.small["device"] == "second GPU"
    assert "Measured on: second GPU." in (tmp_path / "small" / "README.md").read_text()


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cuda:1", ("cuda", [1])), ("cuda", ("cuda", [0])), ("cpu", ("cpu", 1))],
)
def test_healing_is_run_on_the_device(
    given: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    expected: tuple[str, Any],
) -> None:
    class Seen(Exception):
        pass

    def trainer(**settings: Any) -> None:
        raise Seen(settings["accelerator"], settings["devices"])

    monkeypatch.setattr(healing, "Trainer", trainer)
    with pytest.raises(Seen) as seen:
        healing.heal(
            tmp_path / "healing", given / "model", str(given / "model"),
            calibration_sources(given / "text.jsonl"), tiny_tokenizer(), steps=1, batch_size=1,
            block_length=16, learning_rate=0.1, precision="32-true", teacher_dtype="float32",
            data_dir=None, seed=1, device=device,
        )  # fmt: skip
    assert seen.value.args == expected


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--size", "1"), 2, r"1 is outside (0, 1)"),
        (("--limit", "3"), 2, "--limit has an effect with --tasks alone"),
        (("--learning_rate", "1"), 2, "--learning_rate has an effect with --heal alone"),
        (("--teacher_weight", "0.25"), 2, "--teacher_weight has an effect with --heal alone"),
        (("--warmup", "0.5"), 2, "--warmup has an effect with --heal alone"),
        (("--weight_decay", "0.5"), 2, "--weight_decay has an effect with --heal alone"),
        (("--heal", "2", "--teacher_weight", "1.5"), 2, "1.5 is outside [0, 1]"),
        (("--heal", "2", "--warmup", "-0.1"), 2, "-0.1 is outside [0, 1]"),
        (("--heal", "2", "--weight_decay", "-1"), 2, "-1 is below 0"),
        (
            ("--heal", "2", "--teacher_weight", "0", "--teacher_dtype", "float32"),
            2,
            "--teacher_dtype has no effect with --teacher_weight 0",
        ),
        (
            ("--heal_quantized", "2"),
            2,
            "--heal_quantized has an effect with --format int8 or nf4 alone",
        ),
        (("--format", "gguf"), 2, "invalid choice: 'gguf'"),
        (("--allocation", "los"), 2, "invalid choice: 'los'"),
        (("--whitening", "output"), 2, "invalid choice: 'output'"),
        (("--size", "0.01"), 1, "is out of reach"),
        (("--drop_blocks", "2"), 1, "drop_blocks 2 of 2 blocks is outside [0, 1]"),
        (
            ("--size", "0.9", "--drop_blocks", "1"),
            1,
            "of the parameters, no more than size 0.9; at most 0 fit",
        ),
        (("--embedding_rank", "9", "--drop_blocks", "1"), 1, "is not tied to the head"),
        (("--texts", "gone.txt"), 1, "gone.txt does not exist"),
        (("--tasks", "fbp"), 1, "fbp"),
        (("--device", "gpu"), 2, "--device: 'gpu' is not cpu, cuda or a name such as cuda:1"),
        (("--device", "cuda:7"), 1, "device 'cuda:7': there are "),
        (("--device", "mps"), 1, "device 'mps' is not to be had here"),
        (("--precision", "16-mixed"), 2, "invalid choice: '16-mixed'"),
    ],
)
def test_wrong_words_are_one_line_and_leave_nothing(
    compress: Compress, tmp_path: Path, words: tuple[str, ...], status: int, message: str
) -> None:
    found, _, error = compress(*words)
    assert found == status, error
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "owner"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_weight": 1.5}, "teacher_weight 1.5 is outside [0, 1]"),
        ({"warmup": -0.1}, "warmup -0.1 is outside [0, 1]"),
        ({"weight_decay": -1.0}, "weight_decay -1.0 is below 0"),
        ({"learning_rate": 0.0}, "learning_rate 0.0 is not above 0"),
        ({"heal": -1}, "heal -1 is below 0"),
        ({"heal_quantized": -1, "format": "nf4"}, "heal_quantized -1 is below 0"),
        ({"heal_quantized": 1}, "heal_quantized has an effect with format int8 or nf4 alone"),
        ({"heal": 0, "warmup": 0.2}, "warmup has an effect with heal alone"),
    ],
)
def test_settings_of_healing_are_checked_before_the_model_is_opened(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        command.compress(
            "./none", tmp_path / "small", size=0.5, calibration="none.txt",
            **{"heal": 2} | settings,
        )  # fmt: skip
