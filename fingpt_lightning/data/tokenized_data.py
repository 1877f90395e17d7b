"""What our datamodules share: a tokenizer that modules can query, ranks, loaders."""

from abc import abstractmethod
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader
from transformers import PreTrainedTokenizerFast
from typing_extensions import override

from fingpt_lightning.data.batch import PreparesBatches, TokenBatch
from fingpt_lightning.data.blocks import BlockSampler, TokenBlocks
from fingpt_lightning.data.predicted_rows import QuestionBatch
from fingpt_lightning.data.tokenizers import vocabulary_size
from fingpt_lightning.models.formats.tokenizer import check_tokens, tokenizer_sha256


class TokenizedData(LightningDataModule):
    """Tokens in batches that ranks share out.

    A subclass sets the attributes and defines what each split holds.

    Attributes:
        tokenizer: The tokenizer, after ``setup``.
        batch_size: Blocks or rows of a batch on one device.
        num_workers: Processes that read ahead.
    """

    tokenizer: PreTrainedTokenizerFast
    batch_size: int
    num_workers: int

    @property
    def vocabulary_size(self) -> int:
        """Rows that the model's embedding needs."""
        return vocabulary_size(self.tokenizer)

    @property
    def eos_token_id(self) -> int:
        """The id that ends each text."""
        return int(self.tokenizer.eos_token_id)

    def tokenizer_reference(self) -> dict[str, str | int]:
        """What a checkpoint has to keep to find its tokenizer again."""
        return {
            "name_or_path": str(self.tokenizer.name_or_path),
            "sha256": tokenizer_sha256(self.tokenizer),
            "vocabulary_size": self.vocabulary_size,
        }

    @override
    def on_before_batch_transfer(
        self, batch: TokenBatch | QuestionBatch, dataloader_idx: int
    ) -> TokenBatch | QuestionBatch:
        """Checks a batch on the host, and has the module prepare it there.

        Only a tokenizer with more entries than the network has rows can give a token without one.

        Raises:
            ValueError: There is such a token; the message names it.
        """
        if isinstance(batch, QuestionBatch):
            return batch
        module = getattr(self.trainer, "lightning_module", None)
        network = getattr(module, "network", None)
        num_rows = getattr(getattr(network, "config", None), "vocab_size", None)
        highest = [int(batch["input_ids"].max()), int(batch["labels"].max())]
        if num_rows is not None and max(highest) >= num_rows:
            check_tokens(self.tokenizer, [highest], num_rows, "a row of the data")
        return module.prepared(batch) if isinstance(module, PreparesBatches) else batch

    @override
    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """All of the validation split, once."""
        return self._evaluation_loader("val")

    @override
    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """All of the test split, once."""
        return self._evaluation_loader("test")

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """All of the test split, once and in its order, each row with its place."""
        return self._loader_in_order(self._predicted())

    @abstractmethod
    def _evaluated(self, split: Any) -> TokenBlocks | ConcatDataset[dict[str, Tensor]]:
        """The loader for evaluating a split, in its order."""

    @abstractmethod
    def _predicted(self) -> ConcatDataset[Any]:
        """The rows of the test split, each with its place."""

    def _evaluation_loader(self, split: str) -> DataLoader[dict[str, Tensor]]:
        return self._loader_in_order(self._evaluated(split))

    def _loader_in_order(self, data: TokenBlocks | ConcatDataset[Any]) -> DataLoader[Any]:
        if self._overfits():
            return DataLoader(data, **self._loading())
        sampler = BlockSampler(data, self.batch_size, training=False, **self._ranks())
        return DataLoader(data, sampler=sampler, **self._loading())

    def _ranks(self) -> dict[str, Any]:
        kwargs = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return {"num_replicas": 1, "rank": 0, **(kwargs or {})}

    def _overfits(self) -> bool:
        """Whether Lightning would warn of our samplers and replace them by sequential ones."""
        return self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]

    def _finder_advice(self) -> str:
        """What ends a search for the largest batch before the data do; nothing without one."""
        if self.batch_size == self.hparams_initial.get("batch_size"):
            return ""
        return f"; a BatchSizeFinder ends before with max_val {self.batch_size // 2}"

    def _loading(self) -> dict[str, Any]:
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        # By keyword, for Lightning makes a loader again to predict with it.
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "pin_memory": on_cuda,
        }
