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


def check_num_layers(config: PreTrainedConfig, num_tensors: int, where: str) -> None:
    """Checks before a network is laid out, which takes time and memory for each layer.

    Args:
        config: Config of the network.
        num_tensors: Number of stored weights, of which each layer has one or more.
        where: File of the config, for the message.

    Raises:
        ValueError: There are more layers than weights.
    """
    if config.num_hidden_layers > num_tensors:
        raise ValueError(
            f"{where}: {config.num_hidden_layers:,} layers, and {num_tensors:,} weights in all"
        )
