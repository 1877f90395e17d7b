"""The network's description in ``config.json`` and checkpoints, read by an allow list.

A key that changes what a network computes, that transformers' class does not honor and that is
not at its neutral value is refused by name: other classes write such keys under our families'
``model_type``, and dropping them gives another function without a word.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from fingpt_lightning.models.attention import FULL, SLIDING
from fingpt_lightning.models.families import Family, family_named
from fingpt_lightning.models.low_rank_config import NOTED
from fingpt_lightning.terminal.messages import shortened

_NEUTRAL: tuple[Any, ...] = (None, False, "", [], {})
"""The values under which a key that is not known counts as switched off."""
_METADATA = {
    "_commit_hash", "_model_name_or_path", "_name_or_path", "feed_forward_length",
    "finetuning_task", "gradient_checkpointing", "is_decoder", "is_llama_config",
    "max_sequence_length", "model_max_length", "model_type", "n_ctx", "name_or_path",
    "num_labels", "output_past", "predict_special_tokens", "prefix", "task_specific_params",
    "tokenizer_class", "torch_dtype", "transformers.js_config", "unsloth_fixed",
    "unsloth_version", "use_bfloat16",
}  # fmt: skip
"""Keys beside those of transformers' classes that do not change what a network computes."""
_HOW_TO_RUN = {
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "_flash_attn_2_enabled", "attn_implementation", "output_attentions", "output_hidden_states",
    "return_dict", "torchscript", "use_return_dict",
}  # fmt: skip
"""Keys for how a network runs and what else it returns, which is ours to choose."""
_FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "partial_rotary_factor": (1, None),
    "per_layer_config": (None, {}),
}
"""Keys of transformers' classes, and the values that the whole of our code computes."""
_ROPE_KEYS = {
    "attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor", "long_factor",
    "low_freq_factor", "mscale", "mscale_all_dim", "original_max_position_embeddings",
    "partial_rotary_factor", "rope_theta", "rope_type", "short_factor", "truncate", "type",
}  # fmt: skip


def network_config(contents: Mapping[str, Any], where: Path) -> PreTrainedConfig:
    """The config of a network of a supported family.

    Args:
        contents: Keys and values, without ``quantization_config``.
        where: File that holds them, for messages.

    Raises:
        ValueError: The family is not supported, a value is wrong, or a key requests what is not
            computed here.
    """
    family = family_named(contents.get("model_type"), where)
    _check_architectures(family, contents.get("architectures"), where)
    config_class = family.config_class
    own = {*config_class().to_dict(), *config_class.attribute_map}
    if "rope_parameters" in own:
        own |= {"rope_scaling", "rope_theta"}  # as written by earlier versions of transformers
    fixed = {**_FIXED, **family.fixed}
    if family.partial_rotation:
        del fixed["partial_rotary_factor"]
        own.add("partial_rotary_factor")
    known = {*own, *_METADATA, *NOTED, *GenerationConfig().to_dict()}
    for key, value in contents.items():
        is_known = key in fixed or key in known or key in _HOW_TO_RUN
        if value not in fixed.get(key, (value,) if is_known else _NEUTRAL):
            if key == "auto_map":
                raise ValueError(f"{where}: auto_map names code of its own, which is never run")
            raise ValueError(f"{where}: {key} {shortened(value)} is not supported")
    for key in ("rope_scaling", "rope_parameters"):
        described = contents.get(key)
        parts = [described]
        if isinstance(described, dict) and {*described} <= {FULL, SLIDING}:  # by kind of layer
            parts = list(described.values())
        for part in parts:
            _check_rope(part, f"{where}: {key}", family)
    try:
        return config_class.from_dict({k: v for k, v in contents.items() if k not in _HOW_TO_RUN})
    except Exception as error:  # of many kinds, and all mean that a value is wrong
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}: the config is wrong ({reason})") from error


def _check_architectures(family: Family, named: Any, where: Path) -> None:
    """Raises where the weights are those of a class that computes something else."""
    whole = family.network_class.__name__
    stem = whole.removesuffix("LMHeadModel").removesuffix("ForCausalLM")
    bare = f"{stem}Model"
    allowed = {name.lower() for name in (whole, bare, f"{stem}TextModel")}
    if named and not (isinstance(named, list) and {str(n).lower() for n in named} <= allowed):
        raise ValueError(
            f"{where}: architectures {shortened(named)} is not supported; {whole} is, and {bare}"
        )


def _check_rope(described: Any, where: str, family: Family) -> None:
    if described is None:
        return
    if not isinstance(described, dict):
        raise ValueError(f"{where} {shortened(described)} is not an object")
    kind = described.get("rope_type", described.get("type", "default"))
    if kind not in family.rope_types:
        raise ValueError(
            f"{where}: rope_type {shortened(kind)} is not supported;"
            f" {', '.join(family.rope_types)} are"
        )
    for key, value in described.items():
        if key not in _ROPE_KEYS and value not in _NEUTRAL:
            raise ValueError(f"{where}: {key} {shortened(value)} is not supported")
    factor = described.get("partial_rotary_factor")
    if factor not in (1, None) and not family.partial_rotation:
        raise ValueError(f"{where}: partial_rotary_factor {shortened(factor)} is not supported")
