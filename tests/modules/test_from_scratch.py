"""Networks of other families than GPT-2, trained from scratch by the same module."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.modules import LowRankPretraining
from tests.modules.test_recipes import RECIPES, checkpoint_of, fit_recipe

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]
LLAMA: dict[str, Any] = {
    "preset": "llama-60m", "num_layers": 2, "width": 12, "num_heads": 3, "num_positions": 16,
    "rank": 3, "embedding_rank": 5,
}  # fmt: skip


def _ids() -> torch.Tensor:
    return torch.randint(23, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", RECIPES)
def test_a_llama_is_trained_resumed_and_read_as_a_network_under_every_recipe(
    tmp_path: Path, name: str
) -> None:
    recipe = LLAMA | RECIPES[name]
    if recipe.pop("head_map", "shared") == "own":
        with pytest.raises(ValueError, match="head_map own: the head of this architecture is not"):
            fit_recipe(tmp_path, recipe | {"head_map": "own"})
        return
    stay_dense = "rank_overrides" in recipe
    recipe |= {"rank_overrides": {"*.up_proj": None}} if stay_dense else {}
    whole = fit_recipe(tmp_path, recipe)
    resumed = fit_recipe(tmp_path, recipe, resume_from=checkpoint_of(tmp_path))
    expected = whole.state_dict()
    for key, tensor in resumed.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=0)
    layers = [m for m in whole.network.modules() if isinstance(m, LowRankLinear)]
    assert len(layers) == (0 if "recipe" in recipe else 12 if stay_dense else 14)
    whole.trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = load_model(tmp_path / "end.ckpt", dtype=torch.float64).network
    whole.network.eval()
    with torch.no_grad():
        logits = whole.network(_ids()).logits
        torch.testing.assert_close(loaded(_ids()).logits, logits, rtol=0, atol=1e-6)


def test_an_untied_low_rank_head_is_exported_dense_and_kept(tmp_path: Path) -> None:
    module = fit_recipe(tmp_path, LLAMA)
    module.trainer.save_checkpoint(tmp_path / "end.ckpt")
    logits = load_model(tmp_path / "end.ckpt").network(_ids()).logits
    export(load_model(tmp_path / "end.ckpt"), "hf", tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(theirs(_ids()).logits, logits)
    assert not theirs.config.tie_word_embeddings
    for form in ("low_rank", "nf4", "int8"):
        export(load_model(tmp_path / "end.ckpt"), form, tmp_path / form)
    again = load_model(tmp_path / "low_rank").network
    torch.testing.assert_close(again(_ids()).logits, logits)
    assert {"table", "up"} == {n for n, _ in again.get_submodule("lm_head").named_parameters()}


def test_a_config_file_of_another_family_decides_the_sizes(tmp_path: Path) -> None:
    config = Qwen3Config(
        num_hidden_layers=2, hidden_size=12, intermediate_size=20, num_attention_heads=3,
        num_key_value_heads=1, head_dim=6, max_position_embeddings=16, vocab_size=999,
        tie_word_embeddings=True,
    )  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    module = fit_recipe(tmp_path, LLAMA | {
        "preset": None, "num_layers": None, "width": None, "num_heads": None,
        "num_positions": None, "architecture": str(file),
    })  # fmt: skip
    assert module.network.config.model_type == "qwen3"
    assert module.network.config.vocab_size == 23
    module.trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = load_model(tmp_path / "end.ckpt", dtype=torch.float64).network
    logits = module.network.eval()(_ids()).logits
    torch.testing.assert_close(loaded(_ids()).logits, logits, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"width 8: architecture .*config.json decides the sizes"):
        LowRankPretraining(architecture=str(file), width=8)
    with pytest.raises(ValueError, match=r"architecture .*: init_from x decides the architecture"):
        LowRankPretraining(architecture=str(file), init_from="x")
    with pytest.raises(ValueError, match=r"dropout 0.1: a Llama has no dropout; set 0.0"):
        LowRankPretraining(preset="llama-60m", dropout=0.1)
    with pytest.raises(FileNotFoundError, match=r"architecture nowhere is neither a config.json"):
        LowRankPretraining(architecture="nowhere")
