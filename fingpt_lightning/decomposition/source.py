"""Which stored weights of a network may become factors, and how they are read one by one."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.decomposition.layer_files import LayerWeight, SafetensorsReader, TensorReader
from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.models.adapting import linear_names
from fingpt_lightning.models.formats.checkpoint import read_checkpoint
from fingpt_lightning.models.formats.gguf import GgufTensors
from fingpt_lightning.models.formats.safetensors_files import stored_shapes
from fingpt_lightning.models.formats.tokenizer import check_vocabulary
from fingpt_lightning.models.formats.weights import Weights
from fingpt_lightning.models.layout import features_of, full_name, lay_out
from fingpt_lightning.models.loading import open_stored
from fingpt_lightning.models.sources import ModelSource


@dataclass(frozen=True)
class Source:
    """A dense network, still on disk.

    Args:
        network: Network laid out without memory.
        weights: All weights, to be read in turn.
        tokenizer: Tokenizer of the network, where there is one that it has rows for: of a GGUF file
            transformers may add a token.
        layers: The linear ones of the blocks.
        embedding: Embedding that is tied to the head; None where the head is its own, or the
            embedding is factorized already.
        reader: Reader of the weights of both.
        model: Path or name under which the model was found.
        name: Name for people.
    """

    network: PreTrainedModel
    weights: Weights
    tokenizer: PreTrainedTokenizerFast | None
    layers: tuple[LayerWeight, ...]
    embedding: LayerWeight | None
    reader: TensorReader
    model: ModelSource
    name: str


@dataclass(frozen=True)
class CheckpointReader:
    """Tensors of a checkpoint of this project, mapped into memory as they are read.

    Args:
        file: The checkpoint.
    """

    file: Path

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return _state_of(self.file)[name].clone()


@dataclass(frozen=True)
class GgufReader:
    """Tensors of a GGUF file, dequantized as they are read.

    Args:
        file: The file.
    """

    file: Path

    def read(self, name: str) -> Tensor:
        """One tensor, laid out as transformers has it."""
        return _gguf_of(self.file).read(name)


# One of each: a process reads one source.
@functools.lru_cache(1)
def _state_of(file: Path) -> Mapping[str, Tensor]:
    return dict(read_checkpoint(file).weights.tensors)


@functools.lru_cache(1)
def _gguf_of(file: Path) -> GgufTensors:
    return GgufTensors(file)


def open_source(path: str | Path, tokenizer: str | Path | None = None) -> Source:
    """Opens a dense network without reading its weights.

    Args:
        path: A Hugging Face folder or hub name, a GGUF file or its folder, a checkpoint or a run
            folder.
        tokenizer: A folder to take the tokenizer from, in place of the model's own.

    Raises:
        FileNotFoundError: There is nothing by that name.
        ValueError: It is an adapter, is quantized, has low-rank layers in its blocks already, or
            cannot be read.
    """
    stored = open_stored(path, tokenizer)
    weights = stored.weights
    if weights.quantized is not None:
        raise ValueError(
            f"{path} is stored in {weights.quantized.method}; decompose the model it was made of"
        )
    network = lay_out(weights.config, weights.shapes)
    # A factorized embedding may stand before dense blocks, as in a dense baseline of ours.
    if any(isinstance(module, LowRankLinear) for module in network.modules()):
        raise ValueError(
            f"{path} has low-rank layers already; fingpt export --format hf makes it dense"
        )
    found = stored.tokenizer
    num_rows = network.config.vocab_size
    if found is not None and (tokenizer is not None or weights.files[0].suffix != ".gguf"):
        try:
            check_vocabulary(found, num_rows)
        except ValueError as error:
            raise ValueError(f"{tokenizer or path}: {error}") from None
    elif found is not None and max(found.get_vocab().values()) >= num_rows:
        found = None
    names = _stored_names(network, weights)
    layers = tuple(
        _layer_weight(network, name, names[f"{name}.weight"]) for name in linear_names(network)
    )
    if not layers:
        raise ValueError(f"{path} has no linear layer")
    return Source(
        network,
        weights,
        found,
        layers,
        _embedding(network, names),
        _reader(weights),
        stored.source,
        f"{path} ({network.config.model_type})",
    )


def with_moments(layer: LayerWeight, moments: Mapping[str, str]) -> LayerWeight:
    """The layer with the name of its inputs' second moments, where there are any."""
    return replace(layer, moments=moments.get(layer.name))


def _layer_weight(network: PreTrainedModel, name: str, stored: str) -> LayerWeight:
    layer = network.get_submodule(name)
    return LayerWeight(name, stored, *features_of(layer), isinstance(layer, Conv1D))


def _embedding(network: PreTrainedModel, names: Mapping[str, str]) -> LayerWeight | None:
    if not network.config.tie_word_embeddings:
        return None
    embedding = network.get_input_embeddings()
    name = next(name for name, module in network.named_modules() if module is embedding)
    assert isinstance(embedding, nn.Embedding)
    width, num_tokens = embedding.embedding_dim, embedding.num_embeddings
    return LayerWeight(name, names[f"{name}.weight"], width, num_tokens)


def _stored_names(network: PreTrainedModel, weights: Weights) -> dict[str, str]:
    """The name in the files of each parameter."""
    if not weights.shapes:  # GGUF: the reader gives transformers' names
        return {name: name for name, _ in network.named_parameters()}
    return {full_name(network, stored): stored for stored in weights.shapes}


def _reader(weights: Weights) -> TensorReader:
    file = weights.files[0]
    if file.suffix == ".ckpt":
        return CheckpointReader(file)
    if file.suffix == ".gguf":
        return GgufReader(file)
    return SafetensorsReader({name: f for f in weights.files for name in stored_shapes(f)})
