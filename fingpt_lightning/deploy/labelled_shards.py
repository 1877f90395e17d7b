"""One labeled file written by many jobs: the parts of each lie in a folder until they are merged.

The parts are those of one run, dealt out in turn, so that the merged file has its bytes.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from typing_extensions import override

from fingpt_lightning.deploy.labelled_file import LabelledFile, join_parts, part_in
from fingpt_lightning.files import written_whole
from fingpt_lightning.shards.folders import (
    FinishedShard,
    begun_shard,
    finish_shard,
    merged_shards,
    shard_folder,
)
from fingpt_lightning.shards.options import Shard


class LabelledShard(LabelledFile):
    """The parts of one shard.

    Args:
        path: Output that the shards are merged into.
        settings: As in `LabelledFile`.
        schema: As in `LabelledFile`; needed for Parquet.
        shard: Shard that this job writes.
        facts: Facts for the merge: the number of rows, the device.

    Attributes:
        was_finished: Whether an earlier job had finished the shard; known once it is begun.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, object],
        schema: Any,
        shard: Shard,
        facts: Mapping[str, object],
    ) -> None:
        super().__init__(path, settings, schema)
        self.folder, self.was_finished = shard_folder(path, shard), False
        self._shard, self._facts = shard, facts

    @override
    @contextmanager
    def begun(self, overwrite: bool) -> Iterator[int]:
        """As of `LabelledFile`, but the output itself is left alone.

        Args:
            overwrite: Whether existing parts are deleted.

        Yields:
            Number of parts of the shard that are whole.

        Raises:
            InUseError: Another process writes this shard.
            ValueError: The existing parts are of other settings.
        """
        with begun_shard(self.folder, self._settings, overwrite) as self.was_finished:
            yield len(self._parts())

    @override
    def finish(self) -> None:
        """Notes that all parts of the shard are there."""
        finish_shard(self.folder, self._facts)

    @override
    def _numbers(self) -> Iterable[int]:
        return count(self._shard.number - 1, self._shard.count)


def merge_labelled(
    path: Path, num_shards: int, command: str, given: Mapping[str, object]
) -> list[FinishedShard]:
    """Writes one file of the parts of all shards, whole or not at all, and removes them then.

    Args:
        path: File to write; one of that name is replaced.
        num_shards: Number of the shards, or `fingpt_lightning.shards.options.ANY_COUNT`.
        command: Command line of a shard, but for ``I/N`` at its end.
        given: Settings that the shards must be of.

    Raises:
        FileNotFoundError: A shard is not whole.
        InUseError: Another process works on one.
        ValueError: The shards are of different settings.
    """
    with merged_shards(path, num_shards, command, given) as shards:
        num_parts = shards[0].facts["num_parts"]
        parts = [
            part_in(shards[number % len(shards)].folder, number) for number in range(num_parts)
        ]
        with written_whole(path) as aside:
            join_parts(parts, aside, path.suffix)
    return shards
