"""Checkpoints of our modules: their entries on network and tokenizer, written and read.

Nothing here unpickles: checkpoints are read with ``weights_only=True``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from fingpt_lightning.models.formats.network_config import network_config
from fingpt_lightning.models.formats.weights import Weights, check_num_layers
from fingpt_lightning.models.low_rank_config import drop_guides, folded_tensors
from fingpt_lightning.terminal.shapes import check_shape, kind_of

CHECKPOINT = ".ckpt"
"""Suffix of a checkpoint."""
_NETWORK = "network."  # where our modules keep the network
_CONFIG, _TOKENIZER, _BASE_REVISION = "network_config", "tokenizer", "base_revision"
_ADAPTER_CONFIG, _BASE_QUANTIZE = "adapter_config", "base_quantize"


class Checkpoint(NamedTuple):
    """A checkpoint of a training run: its weights and its entry on the tokenizer."""

    weights: Weights
    tokenizer: dict[str, str | int] | None


def describe_network(
    checkpoint: dict[str, Any],
    config: PreTrainedConfig,
    tokenizer: dict[str, str | int] | None,
) -> None:
    """Adds to a checkpoint what `read_checkpoint` needs beside the weights.

    Args:
        checkpoint: Contents that are about to be written; changed in place.
        config: Config of the network.
        tokenizer: Name, digest and size of the tokenizer; None where there is none.
    """
    checkpoint[_CONFIG] = config.to_dict()
    if tokenizer is not None:
        checkpoint[_TOKENIZER] = tokenizer


class AdapterCheckpoint(NamedTuple):
    """The adapters of a finetuning's checkpoint.

    ``config`` are the contents of their ``adapter_config.json``, ``base_quantize`` says how their
    base was quantized, and ``state`` holds their weights, by layer and parameter.
    """

    config: dict[str, Any]
    base_quantize: str | None
    state: dict[str, Tensor]


def describe_adapters(
    checkpoint: dict[str, Any],
    base_revision: str,
    config: Mapping[str, Any],
    base_quantize: str | None,
) -> None:
    """Makes a checkpoint one of adapters alone, which `read_adapter_checkpoint` reads.

    Args:
        checkpoint: Contents that are about to be written; changed in place.
        base_revision: Revision of the base under the adapters.
        config: Contents of the adapters' ``adapter_config.json``.
        base_quantize: ``nf4`` or ``int8``, where the base was quantized.
    """
    checkpoint.pop(_CONFIG, None)
    checkpoint[_BASE_REVISION] = base_revision
    checkpoint[_ADAPTER_CONFIG] = dict(config)
    checkpoint[_BASE_QUANTIZE] = base_quantize


def holds_adapters(file: Path) -> bool:
    """Whether a file is a checkpoint of adapters; one that cannot be read is not."""
    try:
        contents = load_contents(file)
    except (OSError, ValueError):
        return False
    return isinstance(contents, dict) and _ADAPTER_CONFIG in contents


def read_adapter_checkpoint(file: Path) -> AdapterCheckpoint:
    """The adapters of a checkpoint that a finetuning wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not one, is damaged, or cannot be read without unpickling.
    """
    contents = load_contents(file)
    if not isinstance(contents, dict) or not {"state_dict", _ADAPTER_CONFIG} <= contents.keys():
        raise ValueError(f"{file} is not a checkpoint of adapters: it has no {_ADAPTER_CONFIG}")
    shape = {_ADAPTER_CONFIG: dict, "state_dict": dict, f"{_BASE_QUANTIZE}?": str | None}
    check_shape(contents, shape, str(file))
    config, state = contents[_ADAPTER_CONFIG], contents["state_dict"]
    base_quantize = contents.get(_BASE_QUANTIZE)
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{file}: {name!r} is not a tensor's name")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{file}: {name!r} holds {kind_of(tensor)}, not a tensor")
    return AdapterCheckpoint(
        config, base_quantize, {name.removeprefix(_NETWORK): t for name, t in state.items()}
    )


def read_checkpoint(file: Path) -> Checkpoint:
    """The network of a checkpoint that one of our modules wrote.

    Raises:
        ValueError: It is not one, is damaged, or cannot be read without unpickling.
    """
    contents = load_contents(file)
    if isinstance(contents, dict) and _BASE_REVISION in contents:
        raise ValueError(
            f"{file} holds adapters alone, written before their checkpoints named the base: go on"
            f" from it by fingpt fit --ckpt_path {file}, or take adapter/ of its run"
        )
    if not isinstance(contents, dict) or not {"state_dict", _CONFIG} <= contents.keys():
        raise ValueError(f"{file} is not a checkpoint of a run of this project: no {_CONFIG}")
    state = {
        name.removeprefix(_NETWORK): tensor
        for name, tensor in contents["state_dict"].items()
        if name.startswith(_NETWORK)
    }
    config = network_config(contents[_CONFIG], file)
    check_num_layers(config, len(state), str(file))
    drop_guides(state, str(file))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    weights = Weights(config, (file,), shapes, folded_tensors(config, state))
    return Checkpoint(weights, contents.get(_TOKENIZER))


def load_contents(file: Path) -> Any:
    """The contents of a checkpoint, whose tensors are only read when they are used.

    Raises:
        OSError: The file is not there, or may not be read.
        ValueError: It is damaged, or cannot be read without unpickling.
    """
    with file.open("rb"):
        pass
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # what torch's reader runs into, it does not catch itself
        raise ValueError(f"{file} is not a checkpoint that can be read safely") from error
