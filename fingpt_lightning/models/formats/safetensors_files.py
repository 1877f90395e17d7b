"""Safetensors files, read by their headers or tensor by tensor; pickled files are refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

_BYTES_OF_A_MAP = 2**24
PICKLED_SUFFIXES = (".bin", ".pt", ".pth")
_CONVERTING = (
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) of transformers"
)


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The sizes in a safetensors file, by name, from its header alone.

    Raises:
        OSError: The file cannot be opened, such as one that its owner alone may read.
        ValueError: The file is damaged.
    """
    with _opened(file) as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def stored_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        OSError: The file cannot be opened.
        ValueError: The file is damaged.
    """
    with _opened(file) as opened:
        return dict(opened.metadata() or {})


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    file.open("rb").close()  # safetensors says of any file that it cannot open that there is none
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error})") from error


def stored_tensors(files: tuple[Path, ...]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of some files by name, each read when it is wanted."""
    for file in files:
        names = iter(stored_shapes(file))
        name = next(names, None)
        # Opened anew at times: the pages of a map count as memory until it is closed. Not for
        # each tensor: opening reads the names of all.
        while name is not None:
            num_bytes = 0
            with safe_open(file, "pt") as opened:
                while name is not None and num_bytes < _BYTES_OF_A_MAP:
                    tensor = opened.get_tensor(name)
                    num_bytes += tensor.nbytes
                    yield name, tensor
                    name = next(names, None)


def refuse_pickled(files: list[Path], converting: str = _CONVERTING) -> None:
    """Raises if weights are among the files that only unpickling could read.

    Args:
        files: Files of a folder.
        converting: Call that converts them to safetensors, for the message.

    Raises:
        ValueError: They are; the message names the first and how to convert it.
    """
    for file in files:
        if file.suffix in PICKLED_SUFFIXES:
            raise ValueError(
                f"{file} is pickled and could run code, so it is not read; where you trust it,"
                f" {converting} makes safetensors of it"
            )
