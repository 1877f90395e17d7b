"""The order in which training reads the blocks of an epoch: shuffled, from one corpus or several.

Cost: 8 bytes per block and epoch, and 2 more in a mixture: 0.5 % of the tokens of blocks of 1024.
"""

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64
from torch import Tensor

_MAX_BLOCKS = 2**30


@runtime_checkable
class BlockOrder(Protocol):
    """The blocks of each epoch, by their index in the data set."""

    def __len__(self) -> int: ...

    def epoch(self, seed: int, epoch: int) -> Int64[Tensor, "num_blocks"]:
        """All blocks of an epoch."""
        ...

    def identity(self) -> dict[str, int | str]:
        """What a checkpoint has to agree with, besides the seed."""
        ...


class ShuffledOrder:
    """Each block of a corpus once per epoch."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks

    def __len__(self) -> int:
        return self.num_blocks

    def epoch(self, seed: int, epoch: int) -> Int64[Tensor, "num_blocks"]:
        """A permutation that follows from ``seed`` and ``epoch``."""
        return _permutation(self.num_blocks, f"seed {seed} epoch {epoch}")

    def identity(self) -> dict[str, int | str]:
        """The number of blocks."""
        return {"num_blocks": self.num_blocks}


class WeightedPart(NamedTuple):
    """One corpus of a mixture."""

    name: str
    num_blocks: int
    weight: float


class WeightedOrder:
    """Blocks of several corpora, in every prefix of an epoch by their weights to within one block.

    Each corpus is read in shuffled passes that continue from epoch to epoch. An epoch ends with the
    last block of the corpus that is largest for its weight: that one is read once per epoch, and
    the others again and again until then. Weights count as they are written: 0.7 is exactly 7/10.

    Args:
        parts: Corpora in the order in which the data set joins their blocks.

    Raises:
        ValueError: A weight is so small for its corpus that no epoch would end.

    Source: https://doi.org/10.1007/BF01940883 (proportionate progress: draw j of a corpus of share
    w belongs into the slots from floor(j / w) to ceil((j + 1) / w) - 1, and taking the draw with
    the earliest end keeps all of them).
    """

    def __init__(self, parts: Sequence[WeightedPart]) -> None:
        self.parts = tuple(parts)
        self.shares = whole_shares([part.weight for part in parts])
        sizes = [part.num_blocks for part in parts]
        times = [Fraction(size, share) for size, share in zip(sizes, self.shares, strict=True)]
        largest = times.index(max(times))
        num_slots = math.ceil(times[largest] * sum(self.shares))
        if num_slots > _MAX_BLOCKS:
            part = parts[largest]
            raise ValueError(
                f"mixture part {part.name!r}: to read its {part.num_blocks} blocks once by weight "
                f"{part.weight} takes an epoch of {num_slots} blocks, more than {_MAX_BLOCKS}"
            )
        slots = interleaved(self.shares, num_slots)
        end = np.flatnonzero(slots == largest)[sizes[largest] - 1] + 1
        self._part_of_slot = slots[:end]

    def __len__(self) -> int:
        return len(self._part_of_slot)

    def epoch(self, seed: int, epoch: int) -> Int64[Tensor, "num_blocks"]:
        """Each slot's corpus is the same in all epochs, its block is drawn from the passes."""
        order = torch.empty(len(self), dtype=torch.int64)
        first_block = 0
        for index, part in enumerate(self.parts):
            slots = torch.from_numpy(np.flatnonzero(self._part_of_slot == index))
            first_pass, num_skipped = divmod(epoch * len(slots), part.num_blocks)
            num_passes = 1 + (num_skipped + len(slots)) // part.num_blocks
            passes = [
                _permutation(part.num_blocks, f"seed {seed} part {index} pass {first_pass + k}")
                for k in range(num_passes)
            ]
            order[slots] = torch.cat(passes)[num_skipped:][: len(slots)] + first_block
            first_block += part.num_blocks
        return order

    def identity(self) -> dict[str, int | str]:
        """Names, sizes and shares, and the number of blocks per epoch."""
        whole = sum(self.shares)
        shares = [
            f"{share}/{whole} from {part.num_blocks} of {part.name}"
            for part, share in zip(self.parts, self.shares, strict=True)
        ]
        return {"num_blocks": len(self), "mixture": ", ".join(shares)}


def whole_shares(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the ratio of the weights, as those are written.

    >>> whole_shares([0.7, 0.2, 0.1])
    [7, 2, 1]
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    shares = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*shares)
    return [share // divisor for share in shares]


def interleaved(shares: Sequence[int], num_slots: int) -> npt.NDArray[np.int16]:
    """The corpus of each draw: after t draws each has had its share of t, to below one.

    Cost: a microsecond for each corpus and slot of one period, which has ``sum(shares)`` slots.

    >>> interleaved([3, 1], 8).tolist()
    [0, 0, 0, 1, 0, 0, 0, 1]
    """
    period = sum(shares)
    counts = [0] * len(shares)
    slots = np.empty(min(period, num_slots), np.int16)
    for slot in range(len(slots)):
        next_end, next_part = period + 1, -1
        for part, share in enumerate(shares):
            if counts[part] * period < share * (slot + 1):  # its next draw may come this early
                end = -(-(counts[part] + 1) * period // share)
                if end < next_end:
                    next_end, next_part = end, part
        counts[next_part] += 1
        slots[slot] = next_part
    return np.resize(slots, num_slots)


def _permutation(num_blocks: int, name: str) -> Int64[Tensor, "num_blocks"]:
    # A sum would give seed 1 the epochs of seed 0, and torch's generator reads 32 bits of a seed.
    digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    return torch.randperm(num_blocks, generator=generator)
