from pathlib import Path

import peft
import pytest
import torch

from fingpt_lightning.evaluation.scoring import score
from fingpt_lightning.models.loading import load_model
from tests.evaluation.tiny_language import examples_of, tiny_network, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def save_adapter(base: Path, folder: Path) -> None:
    """Writes a random adapter of a tiny Llama in ``base``, which is written too."""
    network = tiny_network("llama")
    network.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    network.name_or_path = str(base)
    config = peft.LoraConfig(
        r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    peft.get_peft_model(network, config).save_pretrained(str(folder))


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_an_adapter_answers_as_its_merged_network(quantize: str | None, tmp_path: Path) -> None:
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    plain = load_model(tmp_path / "base", quantize=quantize)
    tokenizer = plain.require_tokenizer()
    examples = examples_of(tmp_path, "nwgi7")
    before = score(plain.network, tokenizer, examples)
    network = load_model(tmp_path / "adapter", quantize=quantize).network
    assert not any(part.training for part in network.modules())
    found = score(network, tokenizer, examples)
    assert [p.scores for p in found] != [p.scores for p in before]
    if quantize is None:
        base = load_model(tmp_path / "base").network
        merged = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
        expected = score(merged.merge_and_unload(), tokenizer, examples)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-5, atol=1e-4)
