"""A run of a few steps, and its checkpoint."""

from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule, Trainer


def run_shortly(
    module: LightningModule, data: LightningDataModule, checkpoint: Path, num_steps: int
) -> Path:
    """Trains a module on the CPU without logs, and saves a checkpoint after the last step.

    Args:
        module: Module to train.
        data: Data of the training.
        checkpoint: File that is made.
        num_steps: Number of steps.

    Returns:
        The checkpoint.
    """
    trainer = Trainer(
        accelerator="cpu", max_steps=num_steps, max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, default_root_dir=checkpoint.parent,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(checkpoint)
    return checkpoint
