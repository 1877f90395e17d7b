import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.models import Recompute
from fingpt_lightning.modules import LowRankPretraining, low_rank_pretraining
from tests.support.token_data import TokenData

SIZES: dict[str, Any] = {
    "preset": "gpt2-nano", "num_layers": 2, "width": 12, "num_heads": 3, "num_positions": 16,
}  # fmt: skip


def _fit(folder: Path, module: LowRankPretraining, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu", "max_steps": 2, "max_epochs": -1, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0,
        "enable_model_summary": False, "default_root_dir": folder,
    }  # fmt: skip
    trainer = Trainer(**(settings | changes))
    trainer.fit(module, datamodule=TokenData(batch_size=2))
    return trainer


@pytest.mark.parametrize("settings", [{"rank": 3, "embedding_rank": 4}, {"rank": None}])
def test_a_checkpoint_needs_nothing_else(tmp_path: Path, settings: dict[str, Any]) -> None:
    module = LowRankPretraining(**SIZES, **settings)
    path = tmp_path / "run.ckpt"
    _fit(tmp_path, module).save_checkpoint(path)
    loaded = LowRankPretraining.load_from_checkpoint(path, weights_only=True)
    ids = torch.arange(11)[None]
    assert torch.equal(loaded.eval().network(ids).logits, module.eval().network(ids).logits)
    saved = torch.load(path, weights_only=True)
    assert saved["network_config"]["n_layer"] == 2
    assert saved["tokenizer"]["vocabulary_size"] == 23
    assert loaded.tokens_seen == module.tokens_seen > 0


def test_the_dense_baseline_has_the_same_settings_and_no_pair() -> None:
    module = LowRankPretraining(**SIZES, rank=3, embedding_rank=4, vocab_size=23)
    twin = module.dense_baseline()
    for made in (module, twin):
        made.configure_model()
    assert not any(isinstance(m, LowRankLinear) for m in twin.network.modules())
    budget = module.budget()
    assert budget.dense_total_parameters == twin.budget().total_parameters
    assert budget.sequence_length == 16


@pytest.mark.parametrize("embedding_rank", [None, 4])
@pytest.mark.parametrize("overrides", [None, {"*.mlp.c_fc": 2}])
def test_a_compression_is_of_all_parameters_and_as_near_as_ranks_allow(
    embedding_rank: int | None, overrides: dict[str, int | float | None] | None
) -> None:
    sizes = SIZES | {"width": 36, "vocab_size": 67, "embedding_rank": embedding_rank}
    module = LowRankPretraining(**sizes, compression=1.7, rank_overrides=overrides)
    budget = module.budget()
    found = abs(budget.total_parameters - budget.dense_total_parameters / 1.7)
    others = []
    for rank in range(1, 37):
        twin = LowRankPretraining(**sizes, rank=rank / 36, rank_overrides=overrides).budget()
        others.append(abs(twin.total_parameters - budget.dense_total_parameters / 1.7))
    assert found == min(others)
    module.configure_model()
    stored = sum(parameter.numel() for parameter in module.network.parameters())
    assert stored == budget.total_parameters


def test_ranks_in_multiples_train_as_the_same_ranks_by_hand(tmp_path: Path) -> None:
    by_hand = {"rank": 4, "embedding_rank": 6, "rank_overrides": {"*.c_fc": 8}}
    rounded = {"rank": 0.3, "embedding_rank": 5, "rank_overrides": {"*.c_fc": 7}}
    weights = []
    for settings in (by_hand, rounded | {"rank_multiple": 2}):
        torch.manual_seed(2)
        module = LowRankPretraining(**SIZES | settings)
        _fit(tmp_path, module)
        weights.append(module.state_dict())
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.equal(weights[1][name], weight), name
    assert module.dense_baseline().hparams["rank_multiple"] == 1


def test_no_ranks_in_multiples_come_nearer_to_a_compression() -> None:
    sizes = SIZES | {"width": 36, "vocab_size": 67, "embedding_rank": 7}
    budget = LowRankPretraining(**sizes, compression=1.7, rank_multiple=4).budget()
    dense = budget.dense_total_parameters
    gaps = {
        rank: abs(LowRankPretraining(**sizes | {"embedding_rank": 8}, rank=rank).budget()
            .total_parameters - dense / 1.7)
        for rank in range(4, 20, 4)
    }  # fmt: skip
    assert abs(budget.total_parameters - dense / 1.7) == min(gaps.values())
    out_of_reach = LowRankPretraining(**sizes, compression=4.0, rank_multiple=8)
    with pytest.raises(ValueError, match=r"compression 4.0 is out of reach: rank 8 everywhere"):
        out_of_reach.budget()


def test_a_compression_out_of_reach_says_what_is_within_it() -> None:
    module = LowRankPretraining(**SIZES, vocab_size=5000, compression=4.0)
    with pytest.raises(ValueError, match=r"compression 4.0 is out of reach: rank 1 .* gives 1\.0"):
        module.configure_model()


def test_recomputing_changes_no_weight(tmp_path: Path) -> None:
    weights = {}
    for recompute in Recompute:
        torch.manual_seed(2)
        module = LowRankPretraining(**SIZES | {"recompute": recompute.value}, rank=3)
        _fit(tmp_path, module)
        block = module.network.get_submodule("transformer.h.0")
        assert block.gradient_checkpointing == (recompute != "none")
        weights[recompute] = module.state_dict()
    assert len(weights) == 3
    for name, weight in weights[Recompute.NONE].items():
        assert torch.equal(weights[Recompute.BLOCK][name], weight)
        assert torch.equal(weights[Recompute.LOW_RANK][name], weight)


def test_a_residual_stream_in_bfloat16_trains_near_one_in_float32(tmp_path: Path) -> None:
    weights = []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(2)
        module = LowRankPretraining(**SIZES | {"residual_dtype": dtype}, rank=3, warmup=0)
        _fit(tmp_path, module, precision="bf16-mixed")
        weights.append(torch.cat([p.detach().flatten() for p in module.network.parameters()]))
    assert not torch.equal(*weights)
    # AdamW moves each weight by about the rate; few small gradients change their sign.
    assert float((weights[0] - weights[1]).norm() / weights[0].norm()) < 0.01


def test_blocks_are_compiled_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(low_rank_pretraining, "compile_blocks", compiled.append)
    for compiles in (False, True):
        module = LowRankPretraining(**SIZES, rank=3, vocab_size=23, compile=compiles)
        module.configure_model()
    assert compiled == [module.network]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "gpt2-smal"}, "did you mean gpt2-small"),
        ({"rank": 13}, r"h\.0\.attn\.c_attn: rank 13 is outside [1, 12]"),
        ({"rank": 0}, "rank 0 is below 1"),
        ({"rank": 1.5}, "rank 1.5 is outside (0, 1] (a share of the full rank)"),
        ({"embedding_rank": -0.5}, "embedding_rank -0.5 is outside (0, 1] (a share of the full"),
        ({"embedding_rank": 13}, "embedding_rank 13 is outside [1, 12]"),
        ({"rank_overrides": {"*.c_atn": 3}}, "rank_overrides: '*.c_atn' fits no layer"),
        ({"dropout": 1.0}, "dropout 1.0 is outside [0, 1)"),
        ({"learning_rate": 0.0}, "learning_rate 0.0 is not above 0"),
        ({"learning_rate": float("nan")}, "learning_rate nan is not a finite number"),
        ({"weight_decay": float("inf")}, "weight_decay inf is not a finite number"),
        ({"warmup": float("nan")}, "warmup nan is outside"),
        ({"warmup": 1.5}, "warmup 1.5 is outside [0, 1] (a share of the steps)"),
        ({"loss_chunk_size": 0}, "loss_chunk_size 0 is below 1"),
        ({"vocab_size": 0}, "vocab_size 0 is below 1"),
        ({"final_learning_rate_ratio": 2.0}, "final_learning_rate_ratio 2.0 is outside [0, 1]"),
        ({"weight_decay": -1.0}, "weight_decay -1.0 is below 0"),
        ({"beta2": 1.0}, "beta2 1.0 is outside [0, 1)"),
        ({"width": 13}, "width 13 is not a multiple of num_heads 3"),
        ({"num_layers": 10**7}, "num_layers 10,000,000 is above 10,000"),
        ({"rank_multiple": 0}, "rank_multiple 0 is below 1"),
        (
            {"rank_multiple": 128, "rank": None},
            "rank_multiple 128 has no effect where rank and embedding_rank are null: set one",
        ),
        (
            {"rank_multiple": 128, "recipe": "narrow", "compression": 1.7},
            "rank_multiple 128: recipe narrow decides the ranks; leave rank_multiple at 1",
        ),
        ({"compression": 0.9}, "compression 0.9 is below 1"),
        ({"compression": float("inf")}, "compression inf is not a finite number"),
        ({"compression": 2.0, "rank": 3}, "rank 3 and compression 2.0: give one of them"),
        ({"compression": 2.0, "rank": None}, "rank None and compression 2.0: give one of them"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    pattern = message if "\\" in message else re.escape(message)
    with pytest.raises(ValueError, match=pattern.replace("[1, 12]", r"\[1, 12\]")):
        LowRankPretraining(**(SIZES | settings))


def test_a_block_longer_than_the_positions_is_refused(tmp_path: Path) -> None:
    module = LowRankPretraining(**(SIZES | {"num_positions": 10}))
    with pytest.raises(ValueError, match="block_length 11 is longer than the 10 positions"):
        _fit(tmp_path, module)


def test_fewer_tokens_than_the_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size 22 is below the 23 tokens"):
        _fit(tmp_path, LowRankPretraining(**SIZES, vocab_size=22))


def test_a_schedule_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_steps or trainer.max_epochs must be set"):
        _fit(tmp_path, LowRankPretraining(**SIZES), max_steps=-1)


def test_resuming_with_another_rank_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    _fit(tmp_path, LowRankPretraining(**SIZES, rank=3)).save_checkpoint(path)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path,
        enable_progress_bar=False,
    )  # fmt: skip
    module = LowRankPretraining(**SIZES, rank=4)
    with pytest.raises(ValueError, match=r"model.rank is 4, the checkpoint was trained with 3"):
        trainer.validate(module, TokenData(2), ckpt_path=path, weights_only=True)


def test_a_compression_of_1_is_told_when_fit_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for compression, told in ((1.0, 1), (1.2, 0)):
        _fit(tmp_path, LowRankPretraining(**SIZES, compression=compression))
        line = "compression 1: as many parameters as the dense baseline, so that nothing gets"
        assert capsys.readouterr().err.count(line) == told
