"""Hugging Face folders: safetensors, config and generation config, read and written."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from fingpt_lightning.files import read_json, to_json
from fingpt_lightning.low_rank.adapters import AdaptedLinear
from fingpt_lightning.models.families import family_named, head_of
from fingpt_lightning.models.formats.network_config import network_config
from fingpt_lightning.models.formats.quantized_folder import (
    find_quantized_layers,
    is_low_rank,
    quantization_config,
    quantized_state,
)
from fingpt_lightning.models.formats.safetensors_files import (
    refuse_pickled,
    stored_shapes,
    stored_tensors,
)
from fingpt_lightning.models.formats.weights import Weights, check_num_layers
from fingpt_lightning.models.input_moments import InputMoments
from fingpt_lightning.models.quantization.frozen_matrix import quantization_of
from fingpt_lightning.models.quantization.quantized_embedding import (
    QuantizedEmbedding,
    QuantizedHead,
)
from fingpt_lightning.own_format import unwrapped, wrapped

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"


def folder_config(folder: Path) -> PreTrainedConfig:
    """The config of a Hugging Face folder, whose weights need not be there.

    Raises:
        ValueError: It cannot be read, or requests a feature that is not supported.
    """
    contents = unwrapped(read_json(folder / CONFIG), folder / CONFIG)
    contents.pop("quantization_config", None)
    return network_config(contents, folder / CONFIG)


def folder_weights(folder: Path) -> Weights:
    """The weights of a Hugging Face folder.

    Raises:
        FileNotFoundError: A shard is missing.
        ValueError: Config or weights cannot be read, or are of a kind that is not supported.
    """
    contents = unwrapped(read_json(folder / CONFIG), folder / CONFIG)
    family_named(contents.get("model_type"), folder / CONFIG)
    files = _safetensors_files(folder)
    shapes_by_file = {file: stored_shapes(file) for file in files}
    quantized = find_quantized_layers(
        contents.pop("quantization_config", None) or {},
        {name: file for file, shapes in shapes_by_file.items() for name in shapes},
        folder / CONFIG,
    )
    config = network_config(contents, folder / CONFIG)
    num_tensors = sum(map(len, shapes_by_file.values()))
    check_num_layers(config, num_tensors, str(folder / CONFIG))
    tensors = (
        pair for pair in stored_tensors(files) if not (quantized and quantized.holds(pair[0]))
    )
    shapes = {
        name: shape
        for found in shapes_by_file.values()
        for name, shape in found.items()
        if not (quantized and quantized.holds(name))
    }
    return Weights(config, files, shapes, tensors, quantized)


def _safetensors_files(folder: Path) -> tuple[Path, ...]:
    if (folder / SAFETENSORS).is_file():
        return (folder / SAFETENSORS,)
    if not (index := folder / SAFETENSORS_INDEX).is_file():
        refuse_pickled(sorted(folder.iterdir()))
        found = ", ".join(sorted(file.name for file in folder.iterdir()))
        raise FileNotFoundError(f"{folder} has neither {SAFETENSORS} nor its index, only {found}")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index} has no weight_map")
    files = tuple(folder / Path(name).name for name in sorted(set(map(str, shards.values()))))
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}, one of {len(files)} files of weights, is missing")
    return files


def transformers_reads(network: PreTrainedModel) -> bool:
    """Whether transformers alone reads what is written of a network; `own_format` has the rest."""
    is_quantized = isinstance(network.get_input_embeddings(), QuantizedEmbedding)
    return not (is_quantized or is_low_rank(network))


def write_network(network: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Writes a network without adapters, dense or low-rank.

    Args:
        network: Network on any device.
        folder: Folder that is there already.
        dtype: Dtype of the stored weights.
    """
    # Each parameter once: tied parameters are tied again by loading.
    state = {name: p.detach().to("cpu", dtype) for name, p in network.named_parameters()}
    _write(network, state, folder, dtype, {})


def write_quantized(
    network: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    method: str,
    *,
    embeddings: bool = False,
    moments: Iterable[InputMoments] = (),
) -> None:
    """Writes a network whose layers are quantized, here where they are not yet, in place.

    Args:
        network: Network without adapters; its quantized layers are so by ``method``.
        folder: Folder that is there already.
        dtype: Dtype of the weights that stay unquantized.
        method: ``nf4`` or ``int8``.
        embeddings: Whether to quantize the token embedding too, with the head tied to it.
        moments: Moments as in `quantize_layers`.
    """
    state = quantized_state(network, method, dtype, embeddings=embeddings, moments=moments)
    _write(network, state, folder, dtype, quantization_config(method, dtype))


def make_savable(network: PreTrainedModel) -> None:
    """Has ``network.save_pretrained`` write what `transformers_reads` denies under our model type.

    That of transformers would write it under the family's, and read it as another network.
    """
    if not transformers_reads(network):
        network.save_pretrained = partial(_save, network)  # type: ignore[method-assign]


def _save(
    network: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: None = None,
    push_to_hub: bool = False,
    **_: Any,
) -> None:
    """What ``save_pretrained`` of transformers does; how files are cut is not heeded.

    Raises:
        ValueError: The network has adapters, or other weights or an upload are requested.
    """
    if state_dict is not None or push_to_hub:
        raise ValueError("a low-rank network is saved as it is, in a local folder")
    if any(isinstance(module, AdaptedLinear) for module in network.modules()):
        raise ValueError("the network has an adapter: fingpt export writes both")
    if not is_main_process:
        return
    folder, method = Path(save_directory), quantization_of(network)
    folder.mkdir(parents=True, exist_ok=True)
    if method is None:
        write_network(network, folder, network.dtype)
    else:
        write_quantized(network, folder, network.dtype, method)


def _write(
    network: PreTrainedModel,
    state: dict[str, Tensor],
    folder: Path,
    dtype: torch.dtype,
    quantization: dict[str, Any],
) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        folder / SAFETENSORS,
        {"format": "pt"},
    )
    write_config(network, folder, dtype, quantization)


def write_config(
    network: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    quantization: dict[str, Any] | None = None,
) -> None:
    """Writes the configs of network and generation.

    Args:
        network: Network, which may be on the meta device.
        folder: Folder that is there already.
        dtype: Dtype of the stored weights.
        quantization: Entry as transformers keeps it, where layers are quantized.
    """
    described = network.config.to_diff_dict()
    described.pop("quantization_config", None)
    head_is_codes = isinstance(head_of(network), QuantizedHead)
    described |= {
        "architectures": [type(network).__name__],
        "model_type": network.config.model_type,
        "tie_word_embeddings": head_is_codes or network.config.tie_word_embeddings,
        "dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }
    if quantization:
        described["quantization_config"] = quantization
    if not transformers_reads(network):
        described = wrapped(described)
    text = to_json(described, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    if network.generation_config is not None:
        network.generation_config.save_pretrained(folder)
