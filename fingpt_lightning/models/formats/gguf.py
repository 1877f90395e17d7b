"""A dense network with its tokenizer as one GGUF file, as llama.cpp wants them.

Source: llama.cpp's convert_hf_to_gguf.py for keys and the order of the rotary features.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.models.families import GgufFacts, family_of
from fingpt_lightning.models.formats.tokenizer import begin_tokens

_FILE_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}


def write_gguf(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    file: Path,
    dtype: torch.dtype,
) -> None:
    """Writes network and tokenizer.

    Args:
        network: Every layer one of transformers' own.
        tokenizer: Byte-level BPE, split as GPT-2 or SmolLM split.
        file: Is written at once; rename it when it is whole.
        dtype: Of the matrices; vectors stay in float32, which llama.cpp expects.

    Raises:
        ImportError: The package gguf is not installed.
        ValueError: Something of network or tokenizer cannot be said in the format.
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
    writer.add_name(config.name_or_path or family.model_type)
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


def _add_tokenizer(
    writer: Any, gguf: Any, tokenizer: PreTrainedTokenizerFast, vocab_size: int
) -> None:
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    split = _split_of(described)
    if model["type"] != "BPE" or model.get("byte_fallback") or split is None:
        raise ValueError(
            "format gguf: the tokenizer is no byte-level BPE that splits as GPT-2 or SmolLM do, the"
            " only ones that are written"
        )
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
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_token_merges(merges)
    begin = begin_tokens(tokenizer)
    if len(begin) > 1:
        raise ValueError("format gguf: the tokenizer begins a text with several tokens")
    bos = begin[0] if begin else tokenizer.bos_token_id
    if bos is not None:
        writer.add_bos_token_id(int(bos))
    writer.add_add_bos_token(bool(begin))
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(int(tokenizer.eos_token_id))
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(int(tokenizer.pad_token_id))


def _split_of(described: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a text is split before the merges; None if it has none."""
    splitter = described["pre_tokenizer"] or {}
    parts = splitter.get("pretokenizers", [splitter])
    kinds = [part.get("type") for part in parts]
    *before, last = parts
    if kinds[-1:] != ["ByteLevel"] or last["add_prefix_space"] or described["normalizer"]:
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
        yield name, weight


def _interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Rotated features in pairs of neighbours, where transformers has them half a head apart."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
