"""A pipeline over two processes: each holds and trains half of the blocks.

Run: torchrun --nproc-per-node 2 examples/pipeline_with_torchrun.py
"""

from lightning.pytorch import Trainer, seed_everything

from fingpt_lightning import LowRankPretraining, PipelineStrategy, TextBlocks


def main() -> None:
    """Trains a tiny low-rank GPT-2 on synthetic news; the module knows nothing of the pipeline."""
    seed_everything(1)
    module = LowRankPretraining(
        preset="gpt2-nano", rank=8, num_layers=4, width=64, num_heads=2, num_positions=32, warmup=1
    )
    data = TextBlocks(
        vocab_size=512, num_synthetic_items=60, block_length=32, batch_size=8, val_share=0.2,
        cache_dir="runs/cache",
    )  # fmt: skip
    strategy = PipelineStrategy(schedule="1F1B", num_microbatches=4)
    trainer = Trainer(
        strategy=strategy, accelerator="cpu", devices=2, max_steps=8, limit_val_batches=2,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    own = sum(parameter.numel() for parameter in module.parameters())
    loss = trainer.validate(module, datamodule=data, verbose=False)[0]["val/loss"]
    print(f"rank {trainer.global_rank}: {own:,} parameters here, validation loss {loss:.3f}")


if __name__ == "__main__":
    main()
