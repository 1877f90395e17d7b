import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fingpt_lightning.models.formats.safetensors_files import stored_metadata, stored_shapes


@pytest.mark.parametrize("read", [stored_shapes, stored_metadata])
def test_why_a_file_cannot_be_opened_is_said(
    read: Callable[[Path], object], tmp_path: Path
) -> None:
    """Permissions, as those of a colleague's file, are not tested: root has them all."""
    loop = tmp_path / "model.safetensors"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="symbolic links") as error:
        read(loop)
    assert error.value.errno == errno.ELOOP
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.safetensors")


def test_a_file_that_is_cut_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(3)}, file, {"format": "pt"})
    assert stored_shapes(file) == {"weight": (3,)}
    assert stored_metadata(file) == {"format": "pt"}
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        stored_shapes(file)
