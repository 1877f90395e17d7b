"""A datamodule of random tokens whose rows have unequal numbers of supervised positions."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from fingpt_lightning.data.batch import TokenBatch


class TokenData(LightningDataModule):
    """Rows in order, dealt out to ranks in turn; row i has i + 1 unsupervised positions.

    Args:
        batch_size: Rows per batch.
        num_rows: Rows in all.
        block_length: Tokens per row, above ``num_rows``.
    """

    def __init__(self, batch_size: int, num_rows: int = 8, block_length: int = 11) -> None:
        super().__init__()
        self.batch_size, self.block_length = batch_size, block_length
        self.vocabulary_size, self.eos_token_id = 23, 0
        tokens = torch.randint(
            23, (num_rows, block_length + 1), generator=torch.Generator().manual_seed(7)
        )
        labels = tokens[:, 1:].clone()
        for row in range(num_rows):
            labels[row, : row + 1] = -100
        self.rows = list(zip(tokens[:, :-1], labels, strict=True))

    def tokenizer_reference(self) -> dict[str, str | int]:
        """A reference that is always the same."""
        return {"name_or_path": "random", "sha256": "0", "vocabulary_size": 23}

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        sampler_kwargs: dict[str, Any] = {"num_replicas": 1, "rank": 0}
        if self.trainer is not None:
            sampler_kwargs |= self.trainer.distributed_sampler_kwargs or {}
        sampler: DistributedSampler[Any] = DistributedSampler(
            self.rows,  # type: ignore[arg-type]
            shuffle=False,
            **sampler_kwargs,
        )
        return DataLoader(
            self.rows,  # type: ignore[arg-type]
            self.batch_size,
            sampler=sampler,
            collate_fn=_collate,
        )

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self.train_dataloader()

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self.train_dataloader()


def _collate(rows: list[tuple[Tensor, Tensor]]) -> TokenBatch:
    input_ids, labels = (torch.stack(column) for column in zip(*rows, strict=True))
    return TokenBatch(input_ids=input_ids, labels=labels)
