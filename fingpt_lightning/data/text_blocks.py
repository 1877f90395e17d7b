"""The data of pretraining: text files in, blocks of tokens out."""

import logging
import operator
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader
from transformers import PreTrainedTokenizerFast
from typing_extensions import override

from fingpt_lightning.data.block_order import (
    BlockOrder,
    ShuffledOrder,
    WeightedOrder,
    WeightedPart,
)
from fingpt_lightning.data.blocks import BlockSampler, ResumableDataLoader, TokenBlocks, num_blocks
from fingpt_lightning.data.corpus import Corpus, OnBadRow
from fingpt_lightning.data.predicted_rows import NumberedBlocks
from fingpt_lightning.data.text_sources import MixturePart, Split, TextSources, joined
from fingpt_lightning.data.token_cache import (
    BadRows,
    TokenFile,
    build_token_file,
    find_token_file,
)
from fingpt_lightning.data.tokenized_data import TokenizedData
from fingpt_lightning.data.tokenizers import (
    MIN_VOCAB_SIZE,
    cached_tokenizer_folder,
    load_tokenizer,
    train_cached_tokenizer,
)
from fingpt_lightning.terminal.inputs import refuse_file_as_cache

_log = logging.getLogger(__name__)


class TextBlocks(TokenizedData):
    """Blocks of text for next-token prediction, tokenized once and cached.

    Args:
        train_files: ``.jsonl``, ``.txt``, both with ``.gz``, and ``.parquet`` files, folders or
            globs, or data sets of the hub as ``hf://OWNER/NAME[/CONFIG][@REVISION][:SPLIT]``;
            null for the embedded synthetic news.
        val_files: Files for validation, given likewise; null to hold out ``val_share`` of the
            training documents.
        test_files: Files for testing, given likewise; null to test on the validation text.
        mixture: Several corpora to train on, each with its share of the blocks, in place of
            ``train_files``.
        val_share: Share of the training documents that is held out, in (0, 1); unused with
            ``val_files``.
        text_field: Field of a JSON line, or column, that holds the text.
        tokenizer: Folder or hub name of a tokenizer; null to train a byte-level BPE of
            ``vocab_size`` entries on the training text.
        vocab_size: Largest number of entries of a trained tokenizer; unused with ``tokenizer``.
        block_length: Tokens of a block.
        batch_size: Blocks of a batch on one device.
        num_workers: Processes that read ahead; blocks are slices of a memory map, so 0 is fast.
        num_tokenizing_workers: Threads that tokenize; null for one on each available core.
        cache_dir: Folder of tokens and trained tokenizers.
        seed: Seed of the order of training blocks, and of the synthetic news.
        num_synthetic_items: Number of documents of synthetic news.
        on_bad_row: ``error`` ends the run at a line or row that is not JSON or UTF-8 or has no text
            in ``text_field``; ``skip`` skips it, counted in the log and the run's summary.

    Attributes:
        tokenizer: The tokenizer, after ``setup``.

    Raises:
        ValueError: An argument is outside its range.
    """

    def __init__(
        self,
        train_files: str | list[str] | None = None,
        val_files: str | list[str] | None = None,
        test_files: str | list[str] | None = None,
        mixture: list[MixturePart] | None = None,
        val_share: float = 0.01,
        text_field: str = "text",
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        block_length: int = 512,
        batch_size: int = 8,
        num_workers: int = 0,
        num_tokenizing_workers: int | None = None,
        cache_dir: str = "~/.cache/fingpt_lightning",
        seed: int = 1,
        num_synthetic_items: int = 4000,
        on_bad_row: OnBadRow = "error",
    ) -> None:
        super().__init__()
        least = {
            "vocab_size": (vocab_size, MIN_VOCAB_SIZE),
            "block_length": (block_length, 1),
            "batch_size": (batch_size, 1),
            "num_workers": (num_workers, 0),
            "num_tokenizing_workers": (num_tokenizing_workers, 1),
            "num_synthetic_items": (num_synthetic_items, 1),
        }
        for name, (value, minimum) in least.items():
            if value is not None and value < minimum:
                raise ValueError(f"{name} {value} is below {minimum}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed {seed} is outside [0, 2**32)")
        self.sources = TextSources(
            {"train": train_files, "val": val_files, "test": test_files},
            mixture,
            val_share,
            text_field,
            num_synthetic_items,
            seed,
            on_bad_row,
        )
        self.save_hyperparameters(logger=False)
        self.tokenizer_name = tokenizer
        self.max_vocab_size = vocab_size
        self.block_length = block_length
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.num_tokenizing_workers = num_tokenizing_workers
        self.cache_dir = Path(cache_dir).expanduser()
        self.seed = seed
        self._token_files: dict[Split, tuple[TokenFile, ...]] = {}

    @property
    def num_train_tokens(self) -> int:
        """Tokens of the training text, of all corpora together."""
        return sum(file.num_tokens for file in self._opened("train"))

    def bytes_per_token(self, split: Split) -> float | None:
        """UTF-8 bytes of a split's text over its tokens, the ends of documents among them.

        Those of a mixture count by their weights.

        Args:
            split: ``train``, ``val`` or ``test``.

        Returns:
            The bytes that were counted when the text was tokenized; None of a cache that has not
            counted them, as those of version 0.2.
        """
        files = self._opened(split)
        ratios = [None if x.num_bytes is None else x.num_bytes / x.num_tokens for x in files]
        known = [ratio for ratio in ratios if ratio is not None]
        if len(known) < len(files):
            return None
        weights: Sequence[float] = [float(file.num_tokens) for file in files]
        if split == "train" and self.sources.weights:
            weights = list(self.sources.weights.values())
        total: float = sum(map(operator.mul, known, weights))
        return total / sum(weights)

    def skipped_rows(self) -> tuple[int, str | None]:
        """Bad rows skipped in the text that is open, and place and fault of the first.

        Zero without ``on_bad_row: skip``. Text that two splits read is counted once.
        """
        files = {file.path: file for opened in self._token_files.values() for file in opened}
        total = sum((file.bad_rows for file in files.values()), BadRows())
        return total.number, total.first

    @override
    def prepare_data(self) -> None:
        """Trains the tokenizer and tokenizes the text, unless that has been done before."""
        tokenizer = self.prepare_tokenizer()
        files = {
            split: [
                build_token_file(corpus, tokenizer, self.cache_dir, self.num_tokenizing_workers)
                for corpus in self.sources.corpora(split)
            ]
            for split in self._splits()
        }
        for split, built in files.items():
            for file in built:
                if file.bad_rows.number:
                    _log.warning("%s text: skipped %s", split, file.bad_rows)
        if "train" in files:  # now, before a run's loggers and folders are made
            self._check_fills_a_batch(files["train"])

    def prepare_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, trained where it has to be and has not been before.

        Raises:
            NotADirectoryError: ``cache_dir`` is a file.
        """
        refuse_file_as_cache(self.cache_dir)
        if self.tokenizer_name is None:
            training = joined(self.sources.corpora("train"))
            train_cached_tokenizer(training, self.max_vocab_size, self.cache_dir)
        return self._load_tokenizer()

    def all_corpora(self) -> list[Corpus]:
        """What all splits read, each corpus once."""
        corpora = (corpus for split in self._splits() for corpus in self.sources.corpora(split))
        return list({corpus.fingerprint(): corpus for corpus in corpora}.values())

    @override
    def setup(self, stage: str | None = None) -> None:
        """Opens what ``prepare_data`` made."""
        # Lightning's advice for loaders that compute; a block is a slice of a memory map.
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        self.tokenizer = self._load_tokenizer()
        for split in self._splits():
            self._token_files[split] = tuple(
                find_token_file(corpus, self.tokenizer, self.cache_dir)
                for corpus in self.sources.corpora(split)
            )

    @override
    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Shuffled blocks; the loader's position is stored in checkpoints.

        Raises:
            ValueError: The text does not fill one batch on all ranks.
        """
        files = self._opened("train")
        parts = [self._blocks(file) for file in files]
        blocks: TokenBlocks | ConcatDataset[dict[str, Tensor]]
        blocks = parts[0] if len(parts) == 1 else ConcatDataset(parts)
        loading = self._loading()
        if self._overfits():
            return DataLoader(blocks, drop_last=True, **loading)
        sampler = BlockSampler(
            blocks,
            self.batch_size,
            training=True,
            seed=self.seed,
            order=self._order(files),
            **self._ranks(),
        )
        self._check_fills_a_batch(files)
        return ResumableDataLoader(blocks, sampler=sampler, drop_last=True, **loading)

    @override
    def _evaluated(self, split: Split) -> TokenBlocks:
        (file,) = self._opened(split)
        return self._blocks(file)

    @override
    def _predicted(self) -> NumberedBlocks:
        return NumberedBlocks(self._evaluated("test"))

    def _order(self, files: Sequence[TokenFile]) -> BlockOrder:
        sizes = [num_blocks(file.num_tokens, self.block_length) for file in files]
        if not self.sources.weights:
            return ShuffledOrder(*sizes)
        weights = self.sources.weights.items()
        return WeightedOrder(
            [
                WeightedPart(name, size, weight)
                for size, (name, weight) in zip(sizes, weights, strict=True)
            ]
        )

    def _check_fills_a_batch(self, files: Sequence[TokenFile]) -> None:
        num_tokens, size = sum(file.num_tokens for file in files), len(self._order(files))
        num_replicas = self._ranks()["num_replicas"]
        if size < self.batch_size * num_replicas:
            raise ValueError(
                f"the training text has {num_tokens} tokens, {size} blocks of "
                f"{self.block_length}, but one batch takes {self.batch_size * num_replicas} "
                f"(batch_size {self.batch_size} x {num_replicas} ranks): give more text, or lower "
                f"block_length or batch_size{self._finder_advice()}"
            )

    def _blocks(self, file: TokenFile) -> TokenBlocks:
        return TokenBlocks(file.open(), self.block_length, self.eos_token_id)

    def _opened(self, split: Split) -> tuple[TokenFile, ...]:
        if split not in self._token_files:
            raise RuntimeError(f"the {split} text is not open: setup has to run first")
        return self._token_files[split]

    def _splits(self) -> Iterator[Split]:
        """The splits that the trainer is about to read, or all without a trainer."""
        doing = None if self.trainer is None else self.trainer.state.fn
        if doing in (None, TrainerFn.FITTING):
            yield "train"
        if doing in (None, TrainerFn.FITTING, TrainerFn.VALIDATING):
            yield "val"
        if doing in (None, TrainerFn.TESTING, TrainerFn.PREDICTING):
            yield "test"

    def _load_tokenizer(self) -> PreTrainedTokenizerFast:
        if self.tokenizer_name is not None:
            return load_tokenizer(self.tokenizer_name)
        training = joined(self.sources.corpora("train"))
        folder = cached_tokenizer_folder(training, self.max_vocab_size, self.cache_dir)
        if not folder.is_dir():
            raise RuntimeError(f"no tokenizer {folder}: prepare_data has to run first")
        return load_tokenizer(str(folder))
