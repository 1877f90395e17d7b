"""Checkpoints of our modules: their entries on network and tokenizer, written and read.

Nothing here unpickles: checkpoints are read with ``weights_only=True``.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from fingpt_lightning.models.formats.network_config import network_config
from fingpt_lightning.models.formats.weights import Weights, check_num_layers
from fingpt_lightning.models.low_rank_config import drop_guides, folded_tensors

_NETWORK = "network."  # where our modules keep the network
_CONFIG, _TOKENIZER, _BASE_REVISION = "network_config", "tokenizer", "base_revision"


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


def describe_adapters(checkpoint: dict[str, Any], base_revision: str) -> None:
    """Makes a checkpoint one of adapters alone, which `read_checkpoint` refuses as a network.

    Args:
        checkpoint: Contents that are about to be written; changed in place.
        base_revision: Revision of the base under the adapters.
    """
    checkpoint.pop(_CONFIG, None)
    checkpoint[_BASE_REVISION] = base_revision


def read_checkpoint(file: Path) -> Checkpoint:
    """The network of a checkpoint that one of our modules wrote.

    Raises:
        ValueError: It is none, is damaged, or cannot be read without unpickling.
    """
    try:
        contents = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{file} is no checkpoint that can be read safely") from error
    if isinstance(contents, dict) and _BASE_REVISION in contents:
        raise ValueError(
            f"{file} holds adapters alone; of a finetuning run take the folder, or adapter/ in it"
        )
    if not isinstance(contents, dict) or not {"state_dict", _CONFIG} <= contents.keys():
        raise ValueError(f"{file} is no checkpoint of a run of this project: no {_CONFIG}")
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
