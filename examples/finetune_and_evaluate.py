"""Finetune and evaluate from Python: a tiny Llama and nine rows, both made here, no network.

Run: python examples/finetune_and_evaluate.py
"""

import json
import tempfile
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from transformers import LlamaConfig, LlamaForCausalLM

from fingpt_lightning import FinancialInstructions, QuantizedFinetuning, evaluate
from fingpt_lightning.data.tokenizers import train_tokenizer

WORDS = {"positive": "rose", "negative": "fell", "neutral": "was as before"}
ROWS = [{"text": f"{what} {word}", "label": label}
        for what in ("Profit", "Revenue", "The dividend")
        for label, word in WORDS.items()]  # fmt: skip


def main(folder: Path) -> None:
    """Writes data and base, trains adapters on the frozen base, and scores both."""
    seed_everything(1)
    for split in ("train", "validation"):  # one set for both: it is to be learned by heart
        file = folder / "data" / "fpb" / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    base, data_dir = folder / "base", folder / "data"
    train_tokenizer([row["text"] for row in ROWS], vocab_size=300).save_pretrained(base)
    shape = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                        num_attention_heads=4, initializer_range=0.2)  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(base)

    module = QuantizedFinetuning(str(base), rank=8, dtype="float32", learning_rate=0.02)
    data = FinancialInstructions(["fpb"], str(data_dir), str(base), batch_size=8)
    trainer = Trainer(max_steps=40, accelerator="cpu", default_root_dir=folder, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False)  # fmt: skip
    trainer.fit(module, datamodule=data)

    for name, model in (("base", base), ("with adapter", folder / "adapter")):
        found = evaluate(model, "fpb", data_dir=data_dir, device="cpu").results["fpb"].metrics
        print(f"{name}: accuracy {found['accuracy']:.2f}, macro F1 {found['macro_f1']:.2f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
