"""How each network family is kept in GGUF files.

Source: llama.cpp's convert_hf_to_gguf.py and the defaults of its networks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ROPE_TABLE = "rope_freqs.weight"
"""Tensor of a file: what each rotary frequency is divided by."""


def _nothing(config: PreTrainedConfig, metadata: Mapping[str, Any]) -> None:
    pass


def _no_table(config: PreTrainedConfig) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class GgufFacts:
    """How a family is kept in GGUF files.

    Args:
        architecture: Name in llama.cpp.
        metadata: The values beside the common ones, by the name of the writer's ``add_`` method,
            from a config; raises ValueError where the format cannot express it.
        rotated: Layers whose rows are rotated features, which GGUF has in pairs of neighbors and
            transformers half a head apart; by the config's number of their heads.
        read: Keys of the architecture that ``repair`` reads, beside those that transformers does.
        repair: Corrects the config that transformers makes of a file, from the file's metadata
            without their prefix and `ROPE_TABLE` among them.
        rope_table: Map of a config to its `ROPE_TABLE`; None where it has none.
    """

    architecture: str
    metadata: Callable[[PreTrainedConfig], Mapping[str, int | float | bool]]
    rotated: Mapping[str, str] = field(default_factory=dict)
    read: frozenset[str] = frozenset()
    repair: Callable[[PreTrainedConfig, Mapping[str, Any]], None] = _nothing
    rope_table: Callable[[PreTrainedConfig], Tensor | None] = _no_table


def _gpt2_metadata(config: PreTrainedConfig) -> Mapping[str, int | float]:
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(f"format gguf has no activation {config.activation_function}")
    return {
        "feed_forward_length": config.n_inner or 4 * config.hidden_size,
        "layer_norm_eps": config.layer_norm_epsilon,
    }


def _take_sizes(config: PreTrainedConfig, metadata: Mapping[str, Any]) -> None:
    config.n_positions = config.n_ctx  # transformers leaves it at 1024
    config.n_inner = getattr(config, "feed_forward_length", None)  # and this at 4 widths


def _rotary_metadata(
    config: PreTrainedConfig,
    activations: tuple[str, ...] = ("silu",),
    rope_types: tuple[str, ...] = ("default",),
    rope: Mapping[str, Any] | None = None,
) -> dict[str, int | float]:
    """What all families with rotary embeddings have."""
    rope = config.rope_parameters if rope is None else rope
    if (kind := rope.get("rope_type", "default")) not in rope_types:
        known = f"{', '.join(rope_types)} {'is' if len(rope_types) == 1 else 'are'}"
        raise ValueError(f"rope_type {kind} is not written as gguf; {known}")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in activations:
        raise ValueError(f"format gguf has no activation {activation}")
    return {
        "feed_forward_length": config.intermediate_size,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "head_count_kv": config.num_key_value_heads,
        "rope_freq_base": float(rope["rope_theta"]),
    }


def _head_size(config: PreTrainedConfig) -> int:
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def _head_metadata(config: PreTrainedConfig) -> dict[str, int | float]:
    return {"key_length": _head_size(config), "value_length": _head_size(config)}


def _take_head_size(config: PreTrainedConfig, metadata: Mapping[str, Any]) -> None:
    default = config.hidden_size // config.num_attention_heads
    config.head_dim = metadata.get("attention.key_length", default)


def _llama_metadata(config: PreTrainedConfig) -> Mapping[str, int | float]:
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise ValueError("format gguf has no place for a Llama's biases")
    rope = config.rope_parameters
    scaled: dict[str, int | float] = {}
    if rope.get("rope_type") == "llama3":
        # llama.cpp reads the table alone; this lets a reader know what it was made of.
        scaled["rope_scaling_orig_ctx_len"] = rope["original_max_position_embeddings"]
    return _rotary_metadata(config, rope_types=("default", "llama3")) | {
        **scaled,
        "vocab_size": config.vocab_size,
        "rope_dimension_count": _head_size(config),
        **_head_metadata(config),
    }


_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Bounds of the scaled frequencies in all of Meta's models."""
_LLAMA3_CONTEXT = 8192


def _llama_rope_table(config: PreTrainedConfig) -> Tensor | None:
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    if any(rope[name] != value for name, value in _LLAMA3.items()):
        raise ValueError("format gguf: low_freq_factor and high_freq_factor are not 1 and 4")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = _head_size(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float) / size)
    table: Tensor = plain / scaled
    return table


def _take_llama_rope(config: PreTrainedConfig, metadata: Mapping[str, Any]) -> None:
    if (stored := metadata.get(ROPE_TABLE)) is None:
        return
    table = torch.tensor(stored)
    context = metadata.get("rope.scaling.original_context_length", _LLAMA3_CONTEXT)
    rope = {
        **config.rope_parameters,
        **_LLAMA3,
        "rope_type": "llama3",
        "factor": float(table.max()),
        "original_max_position_embeddings": context,
    }
    config.rope_parameters = rope
    made = _llama_rope_table(config)
    if made is None or made.shape != table.shape or not torch.allclose(made, table, rtol=1e-4):
        raise ValueError(f"{ROPE_TABLE} is not that of a Llama 3, which alone is supported")


def _mistral_metadata(config: PreTrainedConfig) -> Mapping[str, int | float]:
    _check_unwindowed(config)
    return _rotary_metadata(config) | {
        "vocab_size": config.vocab_size,
        "rope_dimension_count": _head_size(config),
        **_head_metadata(config),
    }


def _check_unwindowed(config: PreTrainedConfig) -> None:
    """Raises where a layer does not attend to all tokens, which llama.cpp would have it do."""
    window = config.sliding_window
    if window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f"format gguf: sliding_window {window} below the {config.max_position_embeddings}"
            " positions has no place in this architecture"
        )


def _drop_window(config: PreTrainedConfig, metadata: Mapping[str, Any]) -> None:
    if hasattr(config, "sliding_window"):  # its default in transformers, not in the file
        config.sliding_window = None


def _qwen2_metadata(config: PreTrainedConfig) -> Mapping[str, int | float]:
    _check_unwindowed(config)
    return _rotary_metadata(config)


def _qwen3_metadata(config: PreTrainedConfig) -> Mapping[str, int | float]:
    if config.attention_bias:
        raise ValueError("format gguf has no place for a Qwen 3's biases")
    return {**_qwen2_metadata(config), **_head_metadata(config)}


def _phi3_metadata(config: PreTrainedConfig) -> Mapping[str, int | float]:
    _check_unwindowed(config)
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    return _rotary_metadata(config) | {
        "rope_dimension_count": int(_head_size(config) * share),
        "rope_scaling_orig_ctx_len": config.original_max_position_embeddings,
    }


def _take_phi3(config: PreTrainedConfig, metadata: Mapping[str, Any]) -> None:
    _drop_window(config, metadata)  # llama.cpp has it switched off
    config.original_max_position_embeddings = metadata.get(
        "rope.scaling.original_context_length", config.max_position_embeddings
    )
    size = _head_size(config)
    share = metadata.get("rope.dimension_count", size) / size
    config.rope_parameters = config.rope_parameters | {"partial_rotary_factor": share}


_GELU = ("gelu_pytorch_tanh", "gelu_new")
_NUM_LAYERS_27B = {"gemma2": 46, "gemma3": 62}


def _gemma_scale(config: PreTrainedConfig, architecture: str) -> int:
    """The ``query_pre_attn_scalar`` that llama.cpp takes, which no key of the file names."""
    if config.num_hidden_layers == _NUM_LAYERS_27B[architecture]:
        return int(config.hidden_size // config.num_attention_heads)
    return _head_size(config)


def _check_gemma(config: PreTrainedConfig, architecture: str, pattern: int) -> None:
    scale = _gemma_scale(config, architecture)
    if config.query_pre_attn_scalar != scale:
        raise ValueError(
            f"format gguf: query_pre_attn_scalar {config.query_pre_attn_scalar} has no place;"
            f" llama.cpp takes {scale} at these sizes"
        )
    kinds = [
        "full" if (i + 1) % pattern == 0 else "sliding" for i in range(len(config.layer_types))
    ]
    if config.layer_types != [f"{kind}_attention" for kind in kinds]:
        raise ValueError(
            f"format gguf: layer_types are not the family's own, full attention in every layer"
            f" {pattern}"
        )


def _gemma2_metadata(config: PreTrainedConfig) -> Mapping[str, int | float]:
    _check_gemma(config, "gemma2", 2)
    if None in (config.attn_logit_softcapping, config.final_logit_softcapping):
        raise ValueError("format gguf: a Gemma 2 without caps on scores and logits has no place")
    return {
        **_rotary_metadata(config, _GELU),
        **_head_metadata(config),
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        "sliding_window": config.sliding_window,
    }


def _take_gemma2(config: PreTrainedConfig, metadata: Mapping[str, Any]) -> None:
    config.attn_logit_softcapping = metadata.get("attn_logit_softcapping", 50.0)
    config.final_logit_softcapping = metadata.get("final_logit_softcapping", 30.0)
    config.query_pre_attn_scalar = _gemma_scale(config, "gemma2")


def _gemma3_metadata(config: PreTrainedConfig) -> Mapping[str, int | float]:
    _check_gemma(config, "gemma3", 6)
    if config.final_logit_softcapping is not None:
        raise ValueError("format gguf: a Gemma 3 with a cap on its logits has no place")
    local, whole = (config.rope_parameters[f"{k}_attention"] for k in ("sliding", "full"))
    if (local["rope_type"], local["rope_theta"]) != ("default", 10000.0):
        raise ValueError("format gguf: layers with windows rotate with base 10000 in llama.cpp")
    return {
        **_rotary_metadata(config, _GELU, rope=whole),
        **_head_metadata(config),
        "sliding_window": config.sliding_window,
    }


def _take_gemma3(config: PreTrainedConfig, metadata: Mapping[str, Any]) -> None:
    config.query_pre_attn_scalar = _gemma_scale(config, "gemma3")
    if (base := metadata.get("rope.freq_base")) is not None:
        config.rope_parameters["full_attention"]["rope_theta"] = base


GPT2_GGUF = GgufFacts(architecture="gpt2", metadata=_gpt2_metadata, repair=_take_sizes)
LLAMA_GGUF = GgufFacts(
    architecture="llama",
    metadata=_llama_metadata,
    rotated={
        "self_attn.q_proj": "num_attention_heads",
        "self_attn.k_proj": "num_key_value_heads",
    },
    read=frozenset({"rope.scaling.original_context_length"}),
    repair=_take_llama_rope,
    rope_table=_llama_rope_table,
)
MISTRAL_GGUF = GgufFacts(
    architecture="llama",
    metadata=_mistral_metadata,
    rotated=LLAMA_GGUF.rotated,
    repair=_drop_window,
)
_HEAD_KEYS = frozenset({"attention.key_length", "attention.value_length"})
QWEN2_GGUF = GgufFacts(architecture="qwen2", metadata=_qwen2_metadata, repair=_drop_window)
QWEN3_GGUF = GgufFacts(
    architecture="qwen3",
    metadata=_qwen3_metadata,
    read=_HEAD_KEYS,
    repair=_take_head_size,
)
GEMMA2_GGUF = GgufFacts(
    architecture="gemma2",
    metadata=_gemma2_metadata,
    read=_HEAD_KEYS
    | {"attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"},
    repair=_take_gemma2,
)
GEMMA3_GGUF = GgufFacts(
    architecture="gemma3",
    metadata=_gemma3_metadata,
    read=_HEAD_KEYS | {"attention.sliding_window"},
    repair=_take_gemma3,
)
PHI3_GGUF = GgufFacts(
    architecture="phi3",
    metadata=_phi3_metadata,
    read=frozenset({"attention.sliding_window", "rope.scaling.original_context_length"}),
    repair=_take_phi3,
)
