"""The weights of a network as every format's reader gives them, still on disk."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedConfig

from fingpt_lightning.models.formats.quantized_folder import QuantizedLayers


class Weights(NamedTuple):
    """The weights of a network, still on disk.

    ``files`` hold them, ``shapes`` are their sizes by stored name (empty for GGUF, which knows no
    low-rank layers), and ``tensors`` reads them one by one. ``quantized`` are the layers that are
    stored quantized; neither ``shapes`` nor ``tensors`` have them.
    """

    config: PreTrainedConfig
    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    tensors: Iterator[tuple[str, Tensor]]
    quantized: QuantizedLayers | None = None
