"""One record per network family: names, layers, formats, decode step.

Everything in the package that depends on a family reads its record. A new family is one record in
`FAMILIES` and one row in ``tests/models/test_families.py``, which holds every record against a
network of transformers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn
from transformers import (
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.models.family_steps import gpt2_step, llama_step
from fingpt_lightning.terminal.messages import nearest

DecodeStep: TypeAlias = Callable[[Any, Tensor, Tensor, Cache, Tensor | None], Tensor]
"""Map of body, token, position, cache and allowed tokens to each row's final hidden state."""


@dataclass(frozen=True, kw_only=True)
class GgufFacts:
    """How a family is kept in GGUF files.

    Args:
        architecture: Name in llama.cpp.
        metadata: The values beside the common ones, by the name of the writer's ``add_`` method,
            from a config; raises ValueError where the format cannot express it.
        rotated: Layers whose rows are rotated features, which GGUF has in pairs of neighbors and
            transformers half a head apart; by the config's number of their heads.
        repair: Corrects the config that transformers makes of a file.

    Source: llama.cpp's convert_hf_to_gguf.py.
    """

    architecture: str
    metadata: Callable[[PreTrainedConfig], Mapping[str, int | float]]
    rotated: Mapping[str, str] = field(default_factory=dict)
    repair: Callable[[PreTrainedConfig], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of decoder networks, as transformers builds it.

    Layers of a block are named within it, all else from the network on.

    Args:
        title: Name in texts.
        network_class: The causal language model; its config class and ``model_type`` follow.
        blocks: The list of decoder blocks.
        embedding: Table of the tokens.
        norm: Last norm, after the blocks.
        block_norm: A norm of each block, whose weights have the dtype of the hidden states.
        attention: Linear layers of a block's attention, in the order in which they run.
        mlp: Linear layers of a block's MLP, in the order in which they run.
        shared_inputs: Groups of linear layers of a block that read the same tensor.
        into_residual: Linear layers whose result is added to the residual stream.
        dense_layer: Class of the blocks' linear layers.
        head: The head over the vocabulary.
        positions: Table of learned positions, added before the blocks; None where there is none.
        front: Other modules before the blocks.
        attention_dropout: Name of the config's setting.
        dropouts: Names of the config's settings of the dropouts that are modules.
        computed: Ends of the names of buffers that old files store and today's networks compute.
        decode_step: The family's layers alone, for one token; None takes transformers' own pass.
        is_plain: Whether ``decode_step`` computes what a network of this config does.
        gguf: Form of the family in GGUF files; None where that is not supported.
    """

    title: str
    network_class: type[PreTrainedModel]
    blocks: str
    embedding: str
    norm: str
    block_norm: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    shared_inputs: tuple[tuple[str, ...], ...] = ()
    into_residual: tuple[str, ...]
    dense_layer: type[nn.Linear] | type[Conv1D] = nn.Linear
    head: str = "lm_head"
    positions: str | None = None
    front: tuple[str, ...] = ()
    attention_dropout: str = "attention_dropout"
    dropouts: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()
    decode_step: DecodeStep | None = None
    is_plain: Callable[[PreTrainedConfig], bool] = lambda _: True
    gguf: GgufFacts | None = None

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        """Config class of the network class."""
        found = self.network_class.config_class
        assert found is not None
        return found

    @property
    def model_type(self) -> str:
        """The family's name in ``config.json``."""
        return str(self.config_class.model_type)

    @property
    def body(self) -> str:
        """The network without its head."""
        return str(self.network_class.base_model_prefix)

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """All linear layers of a block, in the order in which they run."""
        return (*self.attention, *self.mlp)

    def layer_name(self, block: int, layer: str) -> str:
        """The full name of a layer of a block.

        >>> GPT2.layer_name(3, "mlp.c_fc")
        'transformer.h.3.mlp.c_fc'
        """
        return f"{self.blocks}.{block}.{layer}"

    def is_in_block(self, name: str) -> bool:
        """Whether a full name is that of a block, or of something in one.

        >>> GPT2.is_in_block("transformer.h.3.ln_1.weight"), GPT2.is_in_block("transformer.wte")
        (True, False)
        """
        return name.startswith(f"{self.blocks}.")

    def is_head(self, name: str) -> bool:
        """Whether a full name is that of the head, or of something in it."""
        return name == self.head or name.startswith(f"{self.head}.")


def _gpt2_metadata(config: PreTrainedConfig) -> Mapping[str, int | float]:
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(f"format gguf has no activation {config.activation_function}")
    return {
        "feed_forward_length": config.n_inner or 4 * config.hidden_size,
        "layer_norm_eps": config.layer_norm_epsilon,
    }


def _take_sizes(config: PreTrainedConfig) -> None:
    config.n_positions = config.n_ctx  # transformers leaves it at 1024
    config.n_inner = getattr(config, "feed_forward_length", None)  # and this at 4 widths


def _llama_metadata(config: PreTrainedConfig) -> Mapping[str, int | float]:
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type {rope['rope_type']} is not written as gguf; default is")
    if config.hidden_act != "silu":
        raise ValueError(f"format gguf has no activation {config.hidden_act}")
    return {
        "vocab_size": config.vocab_size,
        "feed_forward_length": config.intermediate_size,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "head_count_kv": config.num_key_value_heads,
        "rope_dimension_count": config.head_dim,
        "rope_freq_base": float(rope["rope_theta"]),
        "key_length": config.head_dim,
        "value_length": config.head_dim,
    }


GPT2 = Family(
    title="GPT-2",
    network_class=GPT2LMHeadModel,
    blocks="transformer.h",
    embedding="transformer.wte",
    norm="transformer.ln_f",
    block_norm="ln_1",
    attention=("attn.c_attn", "attn.c_proj"),
    mlp=("mlp.c_fc", "mlp.c_proj"),
    into_residual=("attn.c_proj", "mlp.c_proj"),
    dense_layer=Conv1D,
    positions="transformer.wpe",
    front=("transformer.drop",),
    attention_dropout="attn_pdrop",
    dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    computed=(".attn.bias", ".attn.masked_bias"),
    decode_step=gpt2_step,
    is_plain=lambda config: not (config.reorder_and_upcast_attn or config.add_cross_attention),
    gguf=GgufFacts(architecture="gpt2", metadata=_gpt2_metadata, repair=_take_sizes),
)
LLAMA = Family(
    title="Llama",
    network_class=LlamaForCausalLM,
    blocks="model.layers",
    embedding="model.embed_tokens",
    norm="model.norm",
    block_norm="input_layernorm",
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    shared_inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ),
    into_residual=("self_attn.o_proj", "mlp.down_proj"),
    computed=(".rotary_emb.inv_freq",),
    decode_step=llama_step,
    gguf=GgufFacts(
        architecture="llama",
        metadata=_llama_metadata,
        rotated={
            "self_attn.q_proj": "num_attention_heads",
            "self_attn.k_proj": "num_key_value_heads",
        },
    ),
)
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (GPT2, LLAMA)}
"""The families that are supported, by the ``model_type`` of their config."""


def family_named(model_type: object, where: object = None) -> Family:
    """The record of a ``model_type``.

    Args:
        model_type: Type as in a ``config.json``.
        where: File or setting that names it, for the message.

    Raises:
        ValueError: There is none; the message lists those there are, the nearest name first.

    >>> family_named("gpt2").title
    'GPT-2'
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    place = "" if where is None else f"{where}: "
    raise ValueError(
        f"{place}architecture {model_type!r} is not supported; {', '.join(FAMILIES)} are"
        f"{nearest(str(model_type), FAMILIES)}"
    )


def family_of_gguf(architecture: str, where: object) -> Family:
    """The record of the architecture that a GGUF file names.

    Args:
        architecture: Name in llama.cpp.
        where: File that names it, for the message.

    Raises:
        ValueError: There is none; the message lists those there are.
    """
    known = {f.gguf.architecture: f for f in FAMILIES.values() if f.gguf is not None}
    if architecture in known:
        return known[architecture]
    raise ValueError(
        f"{where}: architecture {architecture!r} is not supported; {', '.join(known)} are"
        f"{nearest(architecture, known)}"
    )


def family_of(network: PreTrainedModel) -> Family:
    """The record of a network.

    Raises:
        ValueError: Its family is not supported.
    """
    return family_named(network.config.model_type)


def head_of(network: PreTrainedModel) -> nn.Module:
    """The network's head; what stands for it where another process has it."""
    return network.get_submodule(family_of(network).head)
