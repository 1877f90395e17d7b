"""Training on from a folder: what it takes from there, and what it leaves behind."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from fingpt_lightning.data import FinancialInstructions, TextBlocks
from fingpt_lightning.decomposition.runner import Request, decompose_model
from fingpt_lightning.decomposition.source import open_source
from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.modules import LowRankPretraining
from tests.models.tiny_models import save, tiny_gpt2, tiny_llama
from tests.support.token_data import TokenData

MADE = {"gpt2": tiny_gpt2, "llama": tiny_llama}


@pytest.fixture(params=sorted(MADE))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A decomposed network without tokenizer, whose place the random data take."""
    MADE[request.param]().save_pretrained(tmp_path / "dense")
    source = open_source(tmp_path / "dense")
    decompose_model(source, Request(rank_ratio=0.4), tmp_path / "made")
    return tmp_path / "made"


def _trainer(root: Path, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu", "max_steps": 8, "max_epochs": -1, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0,
        "enable_model_summary": False, "default_root_dir": root,
    }  # fmt: skip
    return Trainer(**(settings | changes))


def _fit(root: Path, module: LowRankPretraining, **changes: Any) -> Trainer:
    trainer = _trainer(root, **changes)
    trainer.fit(module, datamodule=TokenData(batch_size=2))
    return trainer


def _logits(network: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = network.eval()(input_ids=torch.arange(9)[None]).logits
    return logits


def test_training_starts_where_the_folder_is_and_moves_its_factors(
    folder: Path, tmp_path: Path
) -> None:
    module = LowRankPretraining(init_from=str(folder), learning_rate=0.01)
    module.configure_model()
    before = load_model(folder).network
    assert module.network.training
    assert torch.equal(_logits(module.network), _logits(before))
    module.network.train()
    _fit(tmp_path, module, max_steps=2)
    was = dict(before.named_parameters())
    moved = [n for n, p in module.network.named_parameters() if not torch.equal(p, was[n])]
    assert any(name.endswith(".down") for name in moved)
    assert any(name.endswith(".up") for name in moved)
    pairs = [m for m in module.network.modules() if isinstance(m, LowRankLinear)]
    assert len(pairs) > 4


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_checkpoint_loads_and_resumes_exactly(folder: Path, tmp_path: Path) -> None:
    whole = LowRankPretraining(init_from=str(folder), learning_rate=0.01)
    _fit(tmp_path, whole)
    first = LowRankPretraining(init_from=str(folder), learning_rate=0.01)
    half = ModelCheckpoint(tmp_path / "kept", "half", every_n_train_steps=4)  # of 8, an epoch
    _fit(tmp_path, first, callbacks=[half], enable_checkpointing=True)
    path = tmp_path / "kept" / "half.ckpt"
    again = LowRankPretraining(init_from=str(folder), learning_rate=0.01)
    other = ModelCheckpoint(tmp_path / "other", "half", every_n_train_steps=4)
    trainer = _trainer(tmp_path, callbacks=[other], enable_checkpointing=True)
    trainer.fit(again, datamodule=TokenData(batch_size=2), ckpt_path=path, weights_only=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    # Evaluation, generation and export need neither folder nor module.
    loaded = load_model(path).network
    kept = LowRankPretraining.load_from_checkpoint(path, weights_only=True)
    assert torch.equal(_logits(loaded), _logits(kept.network))
    config = json.loads((folder / "config.json").read_text())
    assert loaded.config.model_type == config["base_model_type"]


def test_rows_that_share_their_beginning_are_refused(tmp_path: Path) -> None:
    data = FinancialInstructions(num_synthetic_items=20, batch_size=4, vocab_size=400)
    module = LowRankPretraining(
        "gpt2-nano", num_layers=1, width=12, num_heads=3, rank=3, num_positions=512
    )
    with pytest.raises(ValueError, match=r"would not keep apart: set data\.batching"):
        _trainer(tmp_path).fit(module, datamodule=data)


def test_a_start_without_a_tokenizer_needs_one_that_is_named(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "bare")
    module = LowRankPretraining(init_from=str(tmp_path / "bare"))
    with pytest.raises(ValueError, match=r"bare has no tokenizer beside it: data\.tokenizer has"):
        _trainer(tmp_path).fit(module, datamodule=TextBlocks(block_length=16, batch_size=2))


def test_pairs_that_were_loaded_are_moved_by_the_optimizer_for_pairs(
    folder: Path, tmp_path: Path
) -> None:
    module = LowRankPretraining(init_from=str(folder), optimizer="spectron")
    trainer = _fit(tmp_path, module, max_steps=1)
    groups = trainer.optimizers[0].param_groups
    of_pairs = {id(p) for group in groups if group.get("is_low_rank") for p in group["params"]}
    pairs = [m for m in module.network.modules() if isinstance(m, LowRankLinear)]
    assert pairs
    assert {id(pair.up) for pair in pairs} <= of_pairs


def test_a_checkpoint_is_taken_apart_and_trained_on(tmp_path: Path) -> None:
    torch.manual_seed(2)
    sizes: dict[str, Any] = {"num_layers": 1, "width": 12, "num_heads": 3, "num_positions": 16}
    dense = LowRankPretraining("gpt2-nano", rank=None, **sizes)
    path = tmp_path / "dense.ckpt"
    _fit(tmp_path, dense, max_steps=1).save_checkpoint(path)
    made = decompose_model(open_source(path), Request(compression=1.2), tmp_path / "made")
    assert 1.15 < made.total_compression_ratio < 1.3
    for start in (path, tmp_path / "made"):
        module = LowRankPretraining(init_from=str(start))
        _fit(tmp_path, module, max_steps=1)
    expected = [layer.rank for layer in made.layers if layer.rank is not None]
    pairs = [m for m in module.network.modules() if isinstance(m, LowRankLinear)]
    assert [pair.rank for pair in pairs] == expected


def test_the_budget_and_the_dense_baseline_are_those_of_the_dense_model(
    folder: Path, tmp_path: Path
) -> None:
    module = LowRankPretraining(init_from=str(folder))
    record = json.loads((folder / "decomposition.json").read_text())
    budget = module.budget(7)
    assert budget.total_parameters == record["parameters"]
    assert budget.dense_total_parameters == record["dense_parameters"]
    assert budget.forward_flops_per_token < budget.dense_forward_flops_per_token
    twin = module.dense_baseline()
    twin.configure_model()
    assert not any(isinstance(m, LowRankLinear) for m in twin.network.modules())
    stored = sum(p.numel() for p in twin.network.parameters())
    assert stored == record["dense_parameters"]
    assert twin.budget(7).total_parameters == stored
    assert _logits(twin.network).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "gpt2-small"}, "preset gpt2-small: init_from X decides the architecture"),
        ({"rank": 4}, "rank 4: init_from X decides the architecture; leave rank at auto"),
        ({"rank": None}, "rank None: init_from X decides"),
        ({"embedding_rank": 4}, "embedding_rank 4: init_from X decides"),
        ({"compression": 2.0}, "compression 2.0: init_from X decides"),
        ({"num_layers": 3}, "num_layers 3: init_from X decides"),
        ({"vocab_size": 23}, "vocab_size 23: init_from X decides"),
        (
            {"initialization": "cola"},
            "initialization cola: init_from X decides the architecture;"
            " leave initialization at svd",
        ),
        ({"factor_expansion": 0.5}, "leave factor_expansion at 0.0"),
        ({"factor_activation": "silu"}, "leave factor_activation at none"),
    ],
)
def test_a_setting_that_the_folder_decides_is_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LowRankPretraining(init_from="X", **settings)


def test_what_cannot_be_trained_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/made: no such file or folder"):
        LowRankPretraining(init_from=str(tmp_path / "nowhere" / "made")).configure_model()
    tiny_llama().save_pretrained(tmp_path / "llama")
    module = LowRankPretraining(init_from=str(tmp_path / "llama"), dropout=0.1)
    with pytest.raises(ValueError, match=r"dropout 0.1: a Llama has no dropout; set 0.0"):
        module.configure_model()
    with pytest.raises(ValueError, match="block_length 40 is longer than the 32 positions of"):
        module.check_block_length(40)


def test_another_tokenizer_than_the_folders_is_refused(tmp_path: Path) -> None:
    save(tiny_llama(), tmp_path / "llama")
    module = LowRankPretraining(init_from=str(tmp_path / "llama"))
    with pytest.raises(ValueError, match=r"'random' is not the one of model.init_from"):
        _fit(tmp_path, module)
    small = tiny_llama()
    small.resize_token_embeddings(20)
    small.save_pretrained(tmp_path / "small")
    module = LowRankPretraining(init_from=str(tmp_path / "small"))
    with pytest.raises(ValueError, match="knows 20 tokens, the data's tokenizer has 23"):
        _fit(tmp_path, module)


def test_dropout_is_the_settings_not_the_stored_configs(tmp_path: Path) -> None:
    network = tiny_gpt2()
    network.config.resid_pdrop = 0.3
    network.save_pretrained(tmp_path / "gpt2")
    for dropout in (0.0, 0.2):
        module = LowRankPretraining(init_from=str(tmp_path / "gpt2"), dropout=dropout)
        module.configure_model()
        found = {m.p for m in module.network.modules() if isinstance(m, nn.Dropout)}
        assert found == {dropout}
        assert module.network.config.attn_pdrop == dropout
