"""``recipe: narrow``: what it decides, and that all that knows of the network agrees."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from transformers import LlamaConfig

from callbacks import CompressionMonitor, RunSummary
from fingpt_lightning.cli.main import main
from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.low_rank import LowRankEmbedding, LowRankLinear
from fingpt_lightning.low_rank.embedding import OwnLowRankHead
from fingpt_lightning.models.families import head_of
from fingpt_lightning.models.formats.checkpoint import read_checkpoint
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.modules import LowRankPretraining
from tests.support.token_data import TokenData

SIZES: dict[str, Any] = {
    "preset": "gpt2-nano", "num_layers": 2, "width": 36, "num_heads": 3, "num_positions": 16,
    "vocab_size": 299,
}  # fmt: skip
NARROW: dict[str, Any] = {"recipe": "narrow", "compression": 2.0}
DECIDED = {
    "embedding_rank": 0.875, "head_map": "own", "optimizer": "spectron", "spectron_dense": True,
    "spectron_learning_rate": 0.025, "embedding_optimizer": "mixed",
    "embedding_learning_rate": 0.064, "learning_rate": 0.008,
}  # fmt: skip
DEFAULTS = {
    "embedding_rank": None, "head_map": "shared", "optimizer": "adamw", "spectron_dense": False,
    "spectron_learning_rate": 0.07, "embedding_optimizer": "adamw",
    "embedding_learning_rate": None, "learning_rate": 0.0006,
}  # fmt: skip


def _settings(module: LowRankPretraining) -> dict[str, Any]:
    return {key: module.hparams[key] for key in DECIDED}


def _fit(folder: Path, module: LowRankPretraining, **changes: Any) -> Trainer:
    resume_from = changes.pop("resume_from", None)
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_steps": 3, "max_epochs": -1, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0,
        "enable_model_summary": False, "default_root_dir": folder,
    }  # fmt: skip
    trainer = Trainer(**(settings | changes))
    trainer.fit(module, datamodule=TokenData(4), ckpt_path=resume_from, weights_only=True)
    return trainer


def _stored(module: LowRankPretraining) -> int:
    return sum(parameter.numel() for parameter in module.network.parameters())


def test_it_is_the_network_and_the_rates_of_the_record() -> None:
    file = Path(__file__).parents[2] / "docs" / "benchmarks" / "same_size_quality.json"
    (row,) = (
        row
        for row in json.loads(file.read_text())["rows"]
        if row["contender"] == "low-rank embedding, own map of the head"
    )
    module = LowRankPretraining(
        preset="gpt2-nano", num_layers=6, vocab_size=8192, recipe="narrow", compression=2.64
    )
    module.configure_model()
    config, embedding = module.network.config, module.network.get_input_embeddings()
    assert (config.hidden_size, config.num_attention_heads) == (144, 4)
    assert isinstance(embedding, LowRankEmbedding)
    assert embedding.rank == 126
    assert isinstance(head_of(module.network), OwnLowRankHead)
    assert not any(isinstance(layer, LowRankLinear) for layer in module.network.modules())
    assert _settings(module) == DECIDED
    assert _stored(module) == row["parameters"]
    assert DECIDED["spectron_learning_rate"] == row["rate"]
    assert DECIDED["embedding_learning_rate"] == row["rest_rate"]


def test_the_help_of_each_setting_that_it_decides_says_so() -> None:
    text = inspect.getdoc(LowRankPretraining) or ""
    for key in DECIDED:
        found = re.search(rf"^    {key}: (.*?)(?=^    \w+: |\n\n)", text, re.MULTILINE | re.DOTALL)
        assert found is not None, key
        assert re.search(r"null .*\bor( is)? the recipe's\.$", " ".join(found[1].split())), key


def test_what_is_given_wins() -> None:
    assert _settings(LowRankPretraining(**SIZES)) == DEFAULTS
    given: dict[str, Any] = {
        "learning_rate": 0.001, "spectron_learning_rate": 0.07, "embedding_learning_rate": 0.01,
        "head_map": "shared", "embedding_optimizer": "adamw", "spectron_dense": False,
        "embedding_rank": 7,
    }  # fmt: skip
    for key, value in given.items():
        module = LowRankPretraining(**SIZES, **NARROW, **{key: value})
        assert _settings(module) == DECIDED | {key: value}
    # The rates are those of Spectron: with another optimizer only the network is the recipe's.
    module = LowRankPretraining(**SIZES, **NARROW, optimizer="adamw")
    network = {key: DECIDED[key] for key in ("embedding_rank", "head_map")}
    assert _settings(module) == DEFAULTS | network
    assert "head_map own, adamw at 0.0006; " in str(module.recipe_text())
    assert LowRankPretraining(**SIZES, **NARROW, rank=None).rank_rule.default is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compression": None}, "recipe narrow chooses the width by a total compression: set comp"),
        ({"rank": 3}, "rank 3 and compression 2.0: give one of them"),
        (
            {"rank_overrides": {"*.mlp.*": 3}},
            r"rank_overrides \{.*\}: recipe narrow keeps the blocks dense; leave rank_overrides at",
        ),
        ({"init_from": "x", "compression": None}, "recipe narrow: init_from x decides the archit"),
        ({"embedding_optimizer": "same"}, "embedding_optimizer same moves pairs of factors"),
        ({"embedding_rank": 37}, r"recipe narrow: embedding_rank 37 is outside \[1, 36\]"),
    ],
)
def test_what_contradicts_it_is_named(settings: dict[str, Any], message: str) -> None:
    sizes = {} if "init_from" in settings else SIZES
    with pytest.raises(ValueError, match=message):
        LowRankPretraining(**(sizes | NARROW | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compression": 99.0}, "compression 99.0 is out of reach: width 6, the smallest with as"),
        (
            {"compression": 99.0, "embedding_rank": 12},
            r"the smallest for embedding_rank 12, gives \S+; lower compression or embedding_rank$",
        ),
        ({"vocab_size": 23, "width": 12}, "embedding_rank 0.875 makes the embedding of 23 tokens"),
        (
            {"self_guided": 0.5},
            "model.self_guided 0.5 is about low-rank layers, .* as model.recipe is narrow: set 0.0",
        ),
    ],
)
def test_what_cannot_be_reached_is_named(settings: dict[str, Any], message: str) -> None:
    module = LowRankPretraining(**(SIZES | NARROW | settings))
    with pytest.raises(ValueError, match=message):
        module.configure_model()


def test_a_scaled_embedding_is_refused_by_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    with pytest.raises(ValueError, match="recipe narrow: the embedding of a Gemma 2 is scaled"):
        LowRankPretraining(architecture=str(tmp_path), **NARROW)


def test_budget_summary_and_baseline_are_of_the_requested_width(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = LowRankPretraining(**SIZES, **NARROW)
    _fit(tmp_path, module, callbacks=[CompressionMonitor(), RunSummary(dense_baseline_steps=1)])
    baseline = LowRankPretraining(**SIZES, rank=None)
    budget, dense = module.budget(), baseline.budget(11)
    width = module.network.config.hidden_size
    assert width < 36
    assert budget.total_parameters == _stored(module)
    assert budget.dense_total_parameters == dense.total_parameters
    assert budget.dense_block_parameters == dense.block_parameters
    assert budget.dense_forward_flops_per_token == dense.forward_flops_per_token
    assert 2 <= budget.total_compression_ratio < 2.5
    twin = module.dense_baseline()
    twin.configure_model()
    assert twin.network.config.hidden_size == 36
    assert _stored(twin) == dense.total_parameters
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["parameters"] == _stored(module)
    assert summary["dense_parameters"] == dense.total_parameters
    assert summary["total_parameter_ratio"] == budget.total_compression_ratio
    text = module.recipe_text()
    assert text is not None
    assert text.startswith(f"recipe narrow: width {width} of 36, embedding rank {7 * width // 8},")
    assert f"{budget.total_compression_ratio:.2f}x" in capsys.readouterr().out


def test_it_is_told_once_when_fit_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = LowRankPretraining(**SIZES, **NARROW)
    trainer = _fit(tmp_path, module)
    trainer.validate(module, TokenData(4), verbose=False)
    assert capsys.readouterr().err.count(f"{module.recipe_text()}\n") == 1


def _tied_llama(folder: Path) -> dict[str, Any]:
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=48, intermediate_size=100, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=True,
    )  # fmt: skip
    file = folder / "llama.json"
    file.write_text(json.dumps(config.to_dict()))
    return {"architecture": str(file), "vocab_size": 299}


LLAMA: dict[str, Any] = SIZES | {"preset": "llama-60m", "width": 48}


@pytest.mark.parametrize("family", ["gpt2", "llama", "tied llama"])
def test_a_run_is_loaded_and_exported_as_it_was(tmp_path: Path, family: str) -> None:
    sizes = {"gpt2": SIZES, "llama": LLAMA}.get(family) or _tied_llama(tmp_path)
    torch.manual_seed(3)
    module = LowRankPretraining(**sizes, **NARROW)
    whole = _fit(tmp_path, module, max_steps=4)
    whole.save_checkpoint(tmp_path / "end.ckpt")
    head: Any = head_of(module.network)
    embedding: Any = module.network.get_input_embeddings()
    assert isinstance(head, OwnLowRankHead)
    assert (head.table is embedding.table) == (family != "llama")
    assert module.hparams["head_map"] == ("shared" if family == "llama" else "own")
    ids = torch.arange(11)[None]
    with torch.no_grad():
        logits = module.eval().network(ids).logits
        loaded = load_model(tmp_path / "end.ckpt").network
        torch.testing.assert_close(loaded(ids).logits, logits)
        again = LowRankPretraining.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
        assert torch.equal(again.eval().network(ids).logits, logits)
        assert again.budget(11) == module.budget()
        assert _settings(again) == _settings(module)
        export(load_model(tmp_path / "end.ckpt"), "hf", tmp_path / "hf")
        torch.testing.assert_close(load_model(tmp_path / "hf").network(ids).logits, logits)
    config = read_checkpoint(tmp_path / "end.ckpt").weights.config
    assert config.hidden_size == module.network.config.hidden_size


def test_another_recipe_does_not_take_its_checkpoint(tmp_path: Path) -> None:
    trainer = _fit(tmp_path, LowRankPretraining(**SIZES, **NARROW))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    plain = LowRankPretraining(**SIZES, compression=2.0, embedding_rank=0.875, head_map="own")
    with pytest.raises(ValueError, match=r"model.recipe is None, the checkpoint .* with narrow"):
        _fit(tmp_path, plain, resume_from=tmp_path / "end.ckpt")


@pytest.fixture
def debug_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The debug config, the model's own settings left to the recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    given = {
        "model.rank": "auto", "model.embedding_rank": "null", "model.learning_rate": "null",
        "model.recipe": "narrow", "model.compression": "2.0", "data.cache_dir": "cache",
        "trainer.logger": "false", "trainer.max_steps": "3", "trainer.precision": "32-true",
    }  # fmt: skip
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    return ["--config", "debug_quickstart", *words]


def test_the_command_line_does_what_python_does(
    debug_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", *debug_words, "--trainer.default_root_dir", "run"])
    told = capsys.readouterr().err
    stored = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    saved = stored["hyper_parameters"]
    debug = {"width": 32, "num_heads": 2, "num_positions": 32, "vocab_size": saved["vocab_size"]}
    module = LowRankPretraining(**(SIZES | debug), **NARROW)
    module.configure_model()
    assert {key: saved[key] for key in DECIDED} == DECIDED
    assert module.state_dict().keys() == stored["state_dict"].keys()
    for key, weight in module.state_dict().items():
        assert stored["state_dict"][key].shape == weight.shape, key
    line = str(module.recipe_text())
    assert line in told
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    settings = recorded["model"]["init_args"]
    assert settings["recipe"] == "narrow"
    assert {key: settings[key] for key in DECIDED} == DECIDED
    # The record is a config, and of what was decided nothing differs from the run's checkpoint.
    capsys.readouterr()
    last = ("--ckpt_path", str(tmp_path / "run" / "checkpoints" / "last.ckpt"))
    for words in (["--config", str(tmp_path / "run" / "config.yaml")], debug_words):
        main(["validate", *words, *last])
        told = capsys.readouterr().err
        assert not [key for key in DECIDED if f"model.{key}: " in told]
    main(["plan", *debug_words, "--json", "plan.json"])
    assert line in capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["parameters"] == _stored(module)
    assert plan["dense_parameters"] == module.budget().dense_total_parameters
