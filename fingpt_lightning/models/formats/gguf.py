"""A dense network with its tokenizer as one GGUF file, read and written.

Source: llama.cpp's convert_hf_to_gguf.py for keys and the order of the rotary features.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.models.families import family_named, family_of, family_of_gguf
from fingpt_lightning.models.family_gguf import ROPE_TABLE, GgufFacts
from fingpt_lightning.models.formats.tokenizer import begin_tokens
from fingpt_lightning.models.formats.weights import Weights, check_num_layers
from fingpt_lightning.models.layout import lay_out
from fingpt_lightning.terminal.messages import shortened

_FILE_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
_READ_METADATA = {
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon", "block_count", "context_length", "embedding_length",
    "feed_forward_length", "rope.dimension_count", "rope.freq_base", "tensor_data_layout",
    "vocab_size",
}  # fmt: skip
"""Keys of an architecture that transformers reads, and where the tensors came from."""
_SWITCHED_OFF: tuple[Any, ...] = (0, "", "none", [])
_NEUTRAL_METADATA: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "logit_scale": (1.0,),
    "rope.scale_linear": (1.0,),
    "rope.scaling.factor": (1.0,),
}
"""Values beside 0 under which a key of an architecture that is not read changes nothing."""
_FIXED_METADATA: dict[str, tuple[Any, ...]] = {
    "general.type": ("model",),
    "split.count": (0, 1),
}


_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_WORDS % "{1,3}": "llama-bpe", _WORDS % "": "qwen2"}
"""llama.cpp's names of the patterns by which a text is split before the merges."""
_CUTS = {("Isolated", False), ("Removed", True)}
"""How a pattern's matches become the parts, and what is between them too."""
_NORMALIZERS = {"qwen2": {"type": "NFC"}}
"""Normalization that llama.cpp leaves out, as its own converter does."""


def gguf_weights(file: Path) -> Weights:
    """The weights of a GGUF file, each dequantized when it is read.

    Raises:
        ImportError: The package gguf is not installed.
        ValueError: The file is damaged or its architecture not supported.
    """
    tensors = GgufTensors(file)
    return Weights(tensors.config, (file,), {}, iter(tensors))


class GgufTensors:
    """The tensors of a GGUF file under transformers' names, each dequantized when it is read.

    Args:
        file: GGUF file of a supported architecture.

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
            metadata = {key: field.contents() for key, field in self._reader.fields.items()}
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            raise ValueError(f"{file} is not a whole GGUF file ({error})") from error
        facts = family_of_gguf(architecture, file).gguf
        assert facts is not None
        check_metadata(metadata, file, facts.read)
        try:
            self.config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        except Exception as error:  # of many kinds, and all mean that a value is wrong
            reason = " ".join(str(error).split())
            raise ValueError(f"{file}: the metadata is wrong ({reason})") from error
        family = family_named(self.config.model_type, file)  # transformers may name it more exactly
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):  # defaults, not the file's
            if isinstance(token := getattr(self.config, key), int):
                setattr(self.config, key, token if token < self.config.vocab_size else None)
        if family.gguf is not None:
            own = {k.removeprefix(f"{architecture}."): v for k, v in metadata.items()}
            for stored in self._reader.tensors:
                if stored.name == ROPE_TABLE:
                    own[ROPE_TABLE] = gguf.dequantize(stored.data, stored.tensor_type)
            try:
                family.gguf.repair(self.config, own)
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from None
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        processors: dict[str, Any] = TENSOR_PROCESSORS
        check_num_layers(self.config, len(self._reader.tensors), str(file))
        make_processor = processors.get(architecture, TensorProcessor)
        self._processor = make_processor(config=self.config.to_dict())
        self._names: dict[str, str] = get_gguf_hf_weights_map(
            lay_out(self.config, {}), self._processor, architecture
        )
        self._weights = [x for x in self._reader.tensors if x.name != ROPE_TABLE]
        self._stored = {self._names.get(x.name, x.name): x for x in self._weights}

    def read(self, name: str) -> Tensor:
        """The tensor of that name.

        Raises:
            KeyError: There is none.
        """
        ((_, tensor),) = self._dequantized(self._stored[name])
        return tensor

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for stored in self._weights:
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


def check_metadata(metadata: Mapping[str, Any], file: Path, read: Collection[str] = ()) -> None:
    """Raises where the metadata of a GGUF file request what the network would not compute.

    Args:
        metadata: Keys and values, ``general.architecture`` among them.
        file: File that holds them, for messages.
        read: Keys of the architecture that are read beside those that transformers reads.

    Raises:
        ValueError: A key is neither read nor at its neutral value; the message names both.
    """
    family = metadata["general.architecture"]
    for key, allowed in _FIXED_METADATA.items():
        _check_value(metadata, key, allowed, file)
    head_dim = metadata.get(f"{family}.rope.dimension_count")
    if head_dim is None:
        own_keys = (f"{family}.embedding_length", f"{family}.attention.head_count")
        width, num_heads = (metadata.get(key) for key in own_keys)
        if isinstance(width, int) and isinstance(num_heads, int) and num_heads:
            head_dim = width // num_heads
    for key in metadata:
        prefix, _, own = key.partition(".")
        if prefix != family or own in _READ_METADATA or own in read:
            continue
        sizes = (head_dim,) if own in ("attention.key_length", "attention.value_length") else ()
        _check_value(metadata, key, _NEUTRAL_METADATA.get(own, ()) + sizes + _SWITCHED_OFF, file)


def _check_value(
    metadata: Mapping[str, Any], key: str, allowed: tuple[Any, ...], file: Path
) -> None:
    if key in metadata and metadata[key] not in allowed:
        raise ValueError(f"{file}: {key} {shortened(metadata[key])} is not supported")


def write_gguf(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    file: Path,
    dtype: torch.dtype,
) -> None:
    """Writes network and tokenizer.

    Args:
        network: Network in which every layer is one of transformers' own.
        tokenizer: Byte-level BPE, split as GPT-2, SmolLM, Llama 3 or Qwen 2 split.
        file: File that is written at once; rename it when it is whole.
        dtype: Dtype of the matrices; vectors stay in float32, which llama.cpp expects.

    Raises:
        ImportError: The package gguf is not installed.
        ValueError: Something of network or tokenizer cannot be expressed in the format.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError("format gguf needs the package gguf: pip install gguf") from error
    if dtype not in _FILE_TYPES:
        raise ValueError("format gguf takes the dtypes float32, float16 and bfloat16")
    config, family = network.config, family_of(network)
    if (facts := family.gguf) is None:
        raise ValueError(f"format gguf: a {family.title} is not written")
    writer = gguf.GGUFWriter(file, facts.architecture)
    # By some names, those of families among them, readers apply what they know of a model.
    writer.add_name(config.name_or_path or "fingpt_lightning model")
    writer.add_file_type(int(getattr(gguf.LlamaFileType, _FILE_TYPES[dtype])))
    _add_shape(writer, config, facts)
    _add_tokenizer(writer, gguf, tokenizer, config.vocab_size)
    types = {name: getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "F16", "BF16")}
    matrix_type = types[_FILE_TYPES[dtype].rpartition("_")[2]]
    by_name = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    architecture = by_name[facts.architecture]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for stored, tensor in _tensors(network, facts):
        name = names.get_name(stored, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"format gguf has no place for {stored}")
        kind = matrix_type if tensor.ndim > 1 else types["F32"]
        data = tensor.contiguous().float().numpy()
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    if (table := facts.rope_table(config)) is not None:
        writer.add_tensor(ROPE_TABLE, table.numpy(), raw_dtype=types["F32"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: Any, config: PreTrainedConfig, facts: GgufFacts) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    for name, value in facts.metadata(config).items():
        getattr(writer, f"add_{name}")(value)


def tokenizer_misfit(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Why a tokenizer cannot be written into a GGUF file; None where it can."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or _split_of(described) is None:
        return (
            "the tokenizer is not a byte-level BPE that splits as GPT-2, SmolLM, Llama 3 or Qwen 2"
            " do, the only ones that are written"
        )
    if len(begin_tokens(tokenizer)) > 1:
        return "the tokenizer begins a text with several tokens"
    return None


def _add_tokenizer(
    writer: Any, gguf: Any, tokenizer: PreTrainedTokenizerFast, vocab_size: int
) -> None:
    if (reason := tokenizer_misfit(tokenizer)) is not None:
        raise ValueError(f"format gguf: {reason}")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    special = {added["id"]: added["special"] for added in described["added_tokens"]}
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for index in range(vocab_size):
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        kind = gguf.TokenType.NORMAL if index in by_id else gguf.TokenType.UNUSED
        if index in special:
            kind = gguf.TokenType.CONTROL if special[index] else gguf.TokenType.USER_DEFINED
        types.append(int(kind))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_of(described))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_token_merges(merges)
    begin = begin_tokens(tokenizer)
    bos = begin[0] if begin else tokenizer.bos_token_id
    if bos is not None:
        writer.add_bos_token_id(int(bos))
    writer.add_add_bos_token(bool(begin))
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(int(tokenizer.eos_token_id))
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id < vocab_size:
        writer.add_pad_token_id(int(tokenizer.pad_token_id))


def _split_of(described: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a text is split before the merges; None if it has none."""
    splitter = described["pre_tokenizer"] or {}
    parts = splitter.get("pretokenizers", [splitter])
    kinds = [part.get("type") for part in parts]
    *before, last = parts
    if kinds[-1:] != ["ByteLevel"] or last["add_prefix_space"]:
        return None
    if kinds == ["Split", "ByteLevel"] and not last["use_regex"]:
        (splitter,) = before
        is_cut = (splitter["behavior"], splitter["invert"]) in _CUTS
        name = _SPLITS.get(splitter["pattern"].get("Regex")) if is_cut else None
        is_known = described["normalizer"] in (None, _NORMALIZERS.get(name or ""))
        return name if is_known else None
    if described["normalizer"]:
        return None
    if kinds == ["ByteLevel"]:
        return "gpt-2" if last["use_regex"] else None
    if kinds == ["Digits", "ByteLevel"] and before[0]["individual_digits"] and last["use_regex"]:
        return "smollm"
    return None


def _tensors(network: PreTrainedModel, facts: GgufFacts) -> Iterator[tuple[str, Tensor]]:
    """Weights by transformers' names, each ``out_features x in_features``."""
    config = network.config
    for name, parameter in network.named_parameters():
        weight = parameter.detach().cpu()
        layer_name = name.rpartition(".")[0]
        layer = network.get_submodule(layer_name)
        if isinstance(layer, Conv1D) and name.endswith(".weight"):
            weight = weight.T
        for rotated, num_heads in facts.rotated.items():
            if layer_name.endswith(f".{rotated}"):
                weight = _interleaved(weight, getattr(config, num_heads))
        if family_of(network).shifted_norms and name.endswith("norm.weight"):
            weight = weight + 1
        yield name, weight


def _interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Rotated features in pairs of neighbors, where transformers has them half a head apart."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
