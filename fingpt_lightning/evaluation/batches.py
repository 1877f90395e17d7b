"""Rows of similar length together, so that little of a batch is padding."""

from collections.abc import Sequence

from fingpt_lightning.shards.options import Shard

_CPU_TOKENS, _GPU_TOKENS = 512, 16384
"""On a CPU the activations of a batch stay in its caches; a GPU needs many rows to be busy."""


def default_batch_tokens(device_type: str) -> int:
    """Tokens of a batch where no number is given."""
    return _CPU_TOKENS if device_type == "cpu" else _GPU_TOKENS


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Cuts rows into batches of at most ``batch_tokens`` tokens, padding included.

    The longest come first: what runs out of memory does so at once. A row longer than
    ``batch_tokens`` is a batch of its own.

    Args:
        lengths: Lengths of the rows, in tokens.
        batch_tokens: Tokens of a batch, at least 1.

    Raises:
        ValueError: ``batch_tokens`` is below 1.

    >>> plan_batches([3, 9, 4, 3], batch_tokens=10)
    [[1], [2, 0], [3]]
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens {batch_tokens} is below 1")
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def batches_of(shard: Shard | None, batches: Sequence[list[int]]) -> list[list[int]]:
    """The batches of a shard, dealt out in turn; None has all of them.

    Batches of all rows, not of some: numbers may depend on what else is in a batch.
    """
    return [batch for index, batch in enumerate(batches) if shard is None or shard.has(index)]
