import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.models.formats.tokenizer import tokenizer_sha256
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.modules import LowRankPretraining
from tests.models.tiny_models import ids, tiny_tokenizer
from tests.support.short_run import run_shortly
from tests.support.token_data import TokenData


class _Data(TokenData):
    """Tokens of the tokenizer in one folder."""

    def __init__(self, tokenizer_folder: Path) -> None:
        super().__init__(batch_size=2)
        self.folder = tokenizer_folder

    def tokenizer_reference(self) -> dict[str, str | int]:
        digest = tokenizer_sha256(tiny_tokenizer())
        return {"name_or_path": str(self.folder), "sha256": digest, "vocabulary_size": 23}


def _run(folder: Path, **settings: Any) -> LowRankPretraining:
    """A run folder with a best and a last checkpoint, and its tokenizer."""
    torch.manual_seed(3)
    module = LowRankPretraining(
        "gpt2-nano", num_layers=2, width=12, num_heads=3, num_positions=16,
        learning_rate=0.1, warmup=0, **settings,
    )  # fmt: skip
    run_shortly(module, _Data(folder / "tokenizer"), folder / "checkpoints" / "last.ckpt", 2)
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return module.eval()


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"rank": 3, "embedding_rank": 4}, "low-rank gpt2"),
        ({"rank": 0.25, "rank_overrides": {"*.mlp.*": None}}, "low-rank gpt2"),
        ({"rank": None}, "gpt2"),
    ],
)
def test_a_run_gives_its_network_and_tokenizer(
    tmp_path: Path, settings: dict[str, Any], kind: str
) -> None:
    network = _run(tmp_path, **settings).network
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "last.ckpt"):
        loaded = load_model(path)
        # Close, for the training network may compute its attention another way.
        torch.testing.assert_close(loaded.network(ids()).logits, network(ids()).logits)
        weights, saved = loaded.network.state_dict(), network.state_dict()
        assert weights.keys() == saved.keys()
        assert all(torch.equal(weights[name], saved[name]) for name in saved)
        assert loaded.description == f"{path} ({kind})"
        assert loaded.require_tokenizer().decode([3, 5]) == "w3 w5"
    ranks = [
        [module.rank for module in found.modules() if isinstance(module, LowRankLinear)]
        for found in (loaded.network, network)
    ]
    assert ranks[0] == ranks[1]
    assert loaded.network.generation_config.use_cache


def test_the_best_of_a_run_comes_before_its_last(tmp_path: Path) -> None:
    _run(tmp_path, rank=3)
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    for tensor in last["state_dict"].values():
        tensor.zero_()
    torch.save(last, tmp_path / "checkpoints" / "best.ckpt")
    assert load_model(tmp_path).network(ids()).logits.eq(0).all()


def test_the_tokenizer_is_the_runs_own_or_the_one_it_names(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _run(run, rank=3)
    last = run / "checkpoints" / "last.ckpt"
    moved = Path(shutil.copy(last, tmp_path / "moved.ckpt"))
    assert load_model(moved).tokenizer is not None  # the checkpoint names the run's folder
    shutil.move(run / "tokenizer", tmp_path / "elsewhere")
    assert load_model(last).tokenizer is None
    assert load_model(last, tokenizer=tmp_path / "elsewhere").tokenizer is not None
    tiny_tokenizer(22).save_pretrained(run / "tokenizer")
    with pytest.raises(ValueError, match="run/tokenizer differs from the one of 23 tokens"):
        load_model(last)
    with pytest.raises(ValueError, match="run/tokenizer differs from the one of 23 tokens"):
        load_model(last, tokenizer=run / "tokenizer")


def test_what_is_no_checkpoint_of_ours_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(
        ValueError, match=r"other.ckpt is not a checkpoint of a run of this project"
    ):
        load_model(tmp_path / "other.ckpt")
    torch.save({"state_dict": {}, "code": Path}, tmp_path / "code.ckpt")
    with pytest.raises(ValueError, match=r"code.ckpt is not a checkpoint that can be read safely"):
        load_model(tmp_path / "code.ckpt")
    (tmp_path / "damaged.ckpt").write_bytes(b"PK\x03\x04" + bytes(50))
    with pytest.raises(
        ValueError, match=r"damaged.ckpt is not a checkpoint that can be read safely"
    ):
        load_model(tmp_path / "damaged.ckpt")
    with pytest.raises(FileNotFoundError, match=r"damged.ckpt: no such .*did you mean .*damaged"):
        load_model(tmp_path / "damged.ckpt")
