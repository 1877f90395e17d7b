"""Stored weights, read one tensor at a time: safetensors files, GGUF files, checkpoints.

Nothing here unpickles: checkpoints are read with ``weights_only=True``.
"""

import hashlib
import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from fingpt_lightning.models.families import Family, family_named, family_of_gguf
from fingpt_lightning.models.formats.quantized_folder import QuantizedLayers, find_quantized_layers
from fingpt_lightning.models.layout import lay_out
from fingpt_lightning.models.low_rank_config import drop_guides, folded_tensors

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth")
_NETWORK = "network."  # where our modules keep the network


class Weights(NamedTuple):
    """The weights of a network, still on disk.

    ``files`` hold them, ``shapes`` are their sizes by stored name (empty for GGUF, which knows no
    low-rank layers), and ``tensors`` reads them one by one. ``quantized`` are the layers that are
    stored quantised; neither ``shapes`` nor ``tensors`` have them.
    """

    config: PreTrainedConfig
    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    tensors: Iterator[tuple[str, Tensor]]
    quantized: QuantizedLayers | None = None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: It is none; the message names file and line.
    """
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{file} holds no JSON object")
    return contents


def files_sha256(files: tuple[Path, ...]) -> str:
    """The digest of one file, or of the digests of several in the order of their names.

    Cost: all bytes are read once, about 1 s a GB.
    """
    digests = []
    for file in sorted(files):
        with file.open("rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )


def folder_weights(folder: Path) -> Weights:
    """The weights of a Hugging Face folder.

    Raises:
        FileNotFoundError: A shard is missing.
        ValueError: Config or weights cannot be read, or are of a kind that is not supported.
    """
    contents = read_json(folder / "config.json")
    family = family_named(contents.get("model_type"), folder / "config.json")
    files = _safetensors_files(folder)
    shapes_by_file = {file: stored_shapes(file) for file in files}
    quantized = find_quantized_layers(
        contents.pop("quantization_config", None) or {},
        {name: file for file, shapes in shapes_by_file.items() for name in shapes},
        folder / "config.json",
    )
    config = _made_config(family, contents, folder / "config.json")
    tensors = (pair for pair in _safetensors(files) if not (quantized and quantized.holds(pair[0])))
    shapes = {
        name: shape
        for found in shapes_by_file.values()
        for name, shape in found.items()
        if not (quantized and quantized.holds(name))
    }
    return Weights(config, files, shapes, tensors, quantized)


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The sizes in a safetensors file, by name, from its header alone.

    Raises:
        ValueError: The file is damaged.
    """
    with _opened(file) as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def stored_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file tells beside its tensors.

    Raises:
        ValueError: The file is damaged.
    """
    with _opened(file) as opened:
        return dict(opened.metadata() or {})


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no whole safetensors file ({error})") from error


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


def refuse_pickled(files: list[Path]) -> None:
    """Raises if weights are among the files that only unpickling could read.

    Raises:
        ValueError: They are; the message names the first and how to convert it.
    """
    for file in files:
        if file.suffix in PICKLED_SUFFIXES:
            raise ValueError(
                f"{file} is pickled and could run code, so it is not read; where you trust it,"
                " AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) of"
                " transformers makes safetensors of it"
            )


def _safetensors(files: tuple[Path, ...]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        for name in stored_shapes(file):
            # Opened anew each time: the pages of a map count as memory until it is closed.
            with safe_open(file, "pt") as opened:
                yield name, opened.get_tensor(name)


def gguf_weights(file: Path) -> Weights:
    """The weights of a GGUF file, each dequantised when it is read.

    Raises:
        ImportError: The package gguf is not installed.
        ValueError: The file is damaged or its architecture not supported.
    """
    tensors = GgufTensors(file)
    return Weights(tensors.config, (file,), {}, iter(tensors))


class GgufTensors:
    """The tensors of a GGUF file under transformers' names, each dequantised when it is read.

    Args:
        file: Of a supported architecture.

    Raises:
        ImportError: The package gguf is not installed.
        ValueError: The file is damaged or its architecture not supported.

    Source: transformers' load_gguf_checkpoint, which holds all tensors at once.
    """

    def __init__(self, file: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise ImportError(f"{file}: GGUF needs the package gguf: pip install gguf") from error
        try:
            self._reader: Any = gguf.GGUFReader(file)
            architecture = str(self._reader.fields["general.architecture"].contents())
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            raise ValueError(f"{file} is no whole GGUF file ({error})") from error
        family_of_gguf(architecture, file)
        self.config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        family = family_named(self.config.model_type, file)  # transformers may tell it more finely
        if family.gguf is not None and family.gguf.repair is not None:
            family.gguf.repair(self.config)
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            get_gguf_hf_weights_map,
        )

        processors: dict[str, Any] = TENSOR_PROCESSORS
        self._processor = processors[self.config.model_type](config=self.config.to_dict())
        self._names: dict[str, str] = get_gguf_hf_weights_map(
            lay_out(self.config, {}), self._processor
        )
        self._stored = {self._names.get(x.name, x.name): x for x in self._reader.tensors}

    def read(self, name: str) -> Tensor:
        """The tensor of that name.

        Raises:
            KeyError: There is none.
        """
        ((_, tensor),) = self._dequantized(self._stored[name])
        return tensor

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for stored in self._reader.tensors:
            yield from self._dequantized(stored)

    def _dequantized(self, stored: Any) -> Iterator[tuple[str, Tensor]]:
        from gguf import dequantize

        aside: dict[str, Tensor] = {}  # where GPT-2's processor puts the head
        made = self._processor.process(
            weights=dequantize(stored.data, stored.tensor_type),
            name=stored.name,
            tensor_key_mapping=self._names,
            parsed_parameters={"tensors": aside},
        )
        if made.name is not None:
            # A name that is not known, such as a table of scaled rotary frequencies, must not pass.
            name = self._names.get(made.name, made.name)
            yield name, torch.from_numpy(made.weights.copy())
        yield from aside.items()


class Checkpoint(NamedTuple):
    """A checkpoint of a training run: its weights and what it says of its tokenizer."""

    weights: Weights
    tokenizer: dict[str, str | int] | None


def read_checkpoint(file: Path) -> Checkpoint:
    """The network of a checkpoint that one of our modules wrote.

    Raises:
        ValueError: It is none, is damaged, or cannot be read without unpickling.
    """
    try:
        contents = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{file} is no checkpoint that can be read safely") from error
    if isinstance(contents, dict) and "base_revision" in contents:
        raise ValueError(
            f"{file} holds adapters alone; of a finetuning run take the folder, or adapter/ in it"
        )
    if not isinstance(contents, dict) or not {"state_dict", "network_config"} <= contents.keys():
        raise ValueError(f"{file} is no checkpoint of a run of this project: no network_config")
    described = contents["network_config"]
    family = family_named(described.get("model_type"), file)
    state = {
        name.removeprefix(_NETWORK): tensor
        for name, tensor in contents["state_dict"].items()
        if name.startswith(_NETWORK)
    }
    drop_guides(state, str(file))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    config = _made_config(family, described, file)
    weights = Weights(config, (file,), shapes, folded_tensors(config, state))
    return Checkpoint(weights, contents.get("tokenizer"))


def _made_config(family: Family, contents: dict[str, Any], where: Path) -> PreTrainedConfig:
    try:
        return family.config_class.from_dict(contents)
    except Exception as error:  # of many kinds, and all say that a value is wrong
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}: the config is wrong ({reason})") from error
