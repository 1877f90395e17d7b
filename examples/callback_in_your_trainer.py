"""Only a callback: memory and speed of your own module, in your own Trainer.

Run: python examples/callback_in_your_trainer.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fingpt_lightning.callbacks import MemoryMonitor, ThroughputMonitor


class YourModule(LightningModule):
    """Any module; `ThroughputMonitor` counts the ``labels`` of its batches as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 50))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One step on one batch."""
        logits = self.network(batch["input_ids"])
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def main() -> None:
    """Trains 20 steps and prints what the callbacks logged last."""
    tokens = torch.randint(50, (80, 17))
    rows = [{"input_ids": row[:-1], "labels": row[1:]} for row in tokens]
    trainer = Trainer(
        max_steps=20, accelerator="cpu", log_every_n_steps=5, logger=False,
        callbacks=[MemoryMonitor(), ThroughputMonitor()], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(YourModule(), DataLoader(rows, batch_size=4))  # type: ignore[arg-type]
    for key, value in sorted(trainer.logged_metrics.items()):
        print(f"{key}: {value:.4g}")


if __name__ == "__main__":
    main()
