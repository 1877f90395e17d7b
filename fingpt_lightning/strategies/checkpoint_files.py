"""Checkpoint files that are whole on any file system, at any moment."""

from pathlib import Path
from typing import Any

import torch
from fsspec.utils import get_protocol  # type: ignore[import-untyped]
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from typing_extensions import override

from fingpt_lightning.files import CountedWriter, written_whole


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its name and renames it when it is on the disk.

    The one before is there until then, also where the disk is full. Lightning 2.6.6 writes into
    ``TMPDIR`` and copies where that is another file system, so that a kill in between leaves half
    a file; and it holds a second copy of all tensors in memory. Paths with a protocol, such as
    ``s3://``, are left to it.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as aside, CountedWriter(aside) as writer:
            torch.save(checkpoint, writer)  # type: ignore[arg-type]  # it only writes


def _is_local(path: _PATH) -> bool:
    return isinstance(path, Path) or get_protocol(str(path)) == "file"
