"""Token blocks, the order they are read in, and a loader that resumes where it stopped.

Axes: B batch, T tokens of a block.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from fingpt_lightning.data.batch import IGNORED_LABEL
from fingpt_lightning.data.block_order import BlockOrder, ShuffledOrder

EMPTY_BLOCK = -1
"""The index of a block without labels, which fills up ranks that have fewer blocks than others."""


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """A stream of tokens, cut into blocks; each token but the first is a label exactly once.

    Block i reads tokens [i T, (i + 1) T) and predicts the ones after them. The last block is filled
    up with ``eos_token_id`` as inputs and ``IGNORED_LABEL`` as labels.

    Args:
        tokens: Token ids, usually memory-mapped: worker processes share the map.
        block_length: T.
        eos_token_id: Token id that fills up the last block.

    Raises:
        ValueError: There are fewer than two tokens, or ``block_length`` is below 1.
    """

    def __init__(
        self, tokens: npt.NDArray[np.unsignedinteger], block_length: int, eos_token_id: int
    ) -> None:
        if block_length < 1:
            raise ValueError(f"block_length {block_length} is below 1")
        if len(tokens) < 2:
            raise ValueError(f"{len(tokens)} tokens hold nothing to predict; 2 are needed")
        self.tokens = tokens
        self.block_length = block_length
        self.eos_token_id = eos_token_id

    def __len__(self) -> int:
        return num_blocks(len(self.tokens), self.block_length)

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A block as a ``TokenBatch`` without the batch axis; ``EMPTY_BLOCK`` has no labels."""
        if not (0 <= index < len(self) or index == EMPTY_BLOCK):
            raise IndexError(f"block {index} is outside [0, {len(self)})")
        input_ids = np.full(self.block_length, self.eos_token_id, np.int64)
        labels = np.full(self.block_length, IGNORED_LABEL, np.int64)
        if index != EMPTY_BLOCK:
            first = index * self.block_length
            window = self.tokens[first : first + self.block_length + 1]
            input_ids[: len(window) - 1] = window[:-1]
            labels[: len(window) - 1] = window[1:]
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map is a copy of the whole file, one for each spawned worker.
        state = self.__dict__.copy()
        if isinstance(self.tokens, np.memmap):
            state["tokens"] = (self.tokens.filename, self.tokens.dtype.str)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["tokens"], tuple):
            filename, dtype = state["tokens"]
            state["tokens"] = np.memmap(filename, dtype, mode="r")
        self.__dict__.update(state)


def num_blocks(num_tokens: int, block_length: int) -> int:
    """Blocks of a stream of tokens: each but the first is a label in one of them."""
    return -(-(num_tokens - 1) // block_length)


class BlockSampler(DistributedSampler[int]):
    """The order of the blocks: W ranks with batches of B see what one rank with W B sees.

    Rank r takes each W-th block from the r-th on, of an order that follows from ``seed`` and the
    epoch. In training, blocks that do not fill a batch on all ranks wait for another epoch; in
    evaluation each block is read once, and ranks that would have fewer get ``EMPTY_BLOCK``.
    It is a ``DistributedSampler`` so that Lightning leaves it in place.

    Args:
        dataset: Data set, of which only the length counts.
        batch_size: B, blocks per rank and batch.
        training: Whether to shuffle and drop blocks; else neither is done.
        seed: Seed of the order.
        order: Order of the training blocks; null for a permutation of all blocks.
        num_replicas: W, the ranks that read different data.
        rank: r, in [0, W).

    Raises:
        ValueError: ``batch_size`` is below 1, or ``rank`` outside [0, W).
    """

    def __init__(
        self,
        dataset: TokenBlocks | ConcatDataset[Any],
        batch_size: int,
        *,
        training: bool,
        seed: int = 0,
        order: BlockOrder | None = None,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is below 1")
        super().__init__(dataset, num_replicas, rank, training, seed, drop_last=training)
        self.batch_size = batch_size
        self.order = ShuffledOrder(len(dataset)) if order is None else order
        self.num_blocks = len(self.order)
        self.first_sample = 0
        """Where the next iteration starts, in samples of all ranks; it is reset by starting."""

    @property
    def samples_per_batch(self) -> int:
        """Blocks in a batch of all ranks together."""
        return self.batch_size * self.num_replicas

    @property
    def samples_per_epoch(self) -> int:
        """Blocks of all ranks together, with the dropped ones gone and the empty ones added."""
        unit = self.samples_per_batch if self.drop_last else self.num_replicas
        num_units = self.num_blocks // unit if self.drop_last else -(-self.num_blocks // unit)
        return num_units * unit

    @override
    def __len__(self) -> int:
        return self.samples_per_epoch // self.num_replicas

    @override
    def __iter__(self) -> Iterator[int]:
        first, self.first_sample = self.first_sample, 0
        if self.shuffle:
            order = self.order.epoch(self.seed, self.epoch)
        else:
            order = torch.arange(self.num_blocks)
        num_left = self.num_blocks - first
        if self.drop_last:
            order = order[first : first + num_left - num_left % self.samples_per_batch]
        else:
            num_empty = -num_left % self.num_replicas
            order = torch.cat([order[first:], torch.full((num_empty,), EMPTY_BLOCK)])
        for index in order[self.rank :: self.num_replicas]:
            yield int(index)


class ResumableDataLoader(DataLoader[dict[str, Tensor]]):
    """A loader over a ``BlockSampler`` whose position can be saved and restored.

    The position counts the batches that were returned, so that worker processes may read ahead,
    and counts them in samples of all ranks, so that another world or batch size can resume from it.
    Lightning finds ``state_dict`` and stores it in its checkpoints.

    The next iteration after ``load_state_dict`` continues the saved epoch, unless the
    sampler's epoch has been set to another one by then; all others are whole epochs. ``len`` is
    always that of a whole epoch. Lightning 2.6.6 counts the batches of an epoch by itself: resumed
    within an epoch with larger global batches, it ends that epoch early, by its own count.
    """

    _epoch = 0
    _num_samples = 0
    _is_restored = False

    @property
    def block_sampler(self) -> BlockSampler:
        """The sampler by its own type."""
        return cast(BlockSampler, self.sampler)

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so that all below runs when the first batch is requested: Lightning
        # calls iter() before it loads the state's epoch into the sampler.
        sampler = self.block_sampler
        goes_on = self._is_restored and self._epoch == sampler.epoch
        self._is_restored = False
        self._epoch = sampler.epoch
        self._num_samples = sampler.first_sample = self._num_samples if goes_on else 0
        for batch in super().__iter__():
            self._num_samples += sampler.samples_per_batch
            yield batch

    def state_dict(self) -> dict[str, int | str]:
        """The position after the last batch that was returned."""
        sampler = self.block_sampler
        return {
            "epoch": self._epoch if self._num_samples else sampler.epoch,
            "num_samples": self._num_samples,
            "seed": sampler.seed,
            **sampler.order.identity(),
        }

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Goes back to a position.

        Raises:
            ValueError: The position belongs to other data or another order.
        """
        sampler = self.block_sampler
        here = {"mixture": None, **sampler.order.identity(), "seed": sampler.seed}
        for name, ours in here.items():
            if state.get(name) != ours:
                raise ValueError(
                    f"the checkpoint stopped in data with {name} {state.get(name)}, but here "
                    f"{name} is {ours}: resume with the files, block_length and seed of the first "
                    "run"
                )
        self._epoch, self._num_samples = int(state["epoch"]), int(state["num_samples"])
        if self._num_samples + sampler.samples_per_batch > sampler.num_blocks:
            self._epoch, self._num_samples = self._epoch + 1, 0
        self._is_restored = True
        sampler.set_epoch(self._epoch)
