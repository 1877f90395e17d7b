"""One record per network family: names, layers, formats, decode step.

Everything in the package that depends on a family reads its record. A new family is one record in
`FAMILIES`, one tiny network in ``tests/models/tiny_models.py``, which the tests hold the record
against, and one config in ``benchmarks/families.py``, whose table says what it computes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import (
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.models.family_gguf import (
    GEMMA2_GGUF,
    GEMMA3_GGUF,
    GPT2_GGUF,
    LLAMA_GGUF,
    MISTRAL_GGUF,
    PHI3_GGUF,
    QWEN2_GGUF,
    QWEN3_GGUF,
    GgufFacts,
)
from fingpt_lightning.models.family_steps import gpt2_step, llama_step
from fingpt_lightning.terminal.messages import nearest

DecodeStep: TypeAlias = Callable[[Any, Tensor, Tensor, Cache, Tensor | None], Tensor]
"""Map of body, token, position, cache and allowed tokens to each row's final hidden state."""


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
        fused: Linear layers of a block that can be split, with the names of their equal parts.
        head: The head over the vocabulary.
        positions: Table of learned positions, added before the blocks; None where there is none.
        front: Other modules before the blocks.
        attention_dropout: Name of the config's setting.
        dropouts: Names of the config's settings of the dropouts that are modules.
        computed: Ends of the names of buffers that old files store and today's networks compute.
        masks_by_kind: Whether the body takes masks by the kind of layer, where windows alternate.
        scaled_embedding: Whether what the embedding gives is scaled by a constant, which the head
            tied to it is not.
        shifted_norms: Whether norms multiply by 1 plus their weights.
        rope_types: Kinds of scaled rotary embeddings that the network computes.
        partial_rotation: Whether the rotary embedding may leave some features as they are.
        fixed: Values of settings that alone are computed here, beside those of every family.
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
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    head: str = "lm_head"
    positions: str | None = None
    front: tuple[str, ...] = ()
    attention_dropout: str = "attention_dropout"
    dropouts: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()
    masks_by_kind: bool = False
    scaled_embedding: bool = False
    shifted_norms: bool = False
    rope_types: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn")
    partial_rotation: bool = False
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
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
    fused={"attn.c_attn": ("q", "k", "v")},
    positions="transformer.wpe",
    front=("transformer.drop",),
    attention_dropout="attn_pdrop",
    dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    computed=(".attn.bias", ".attn.masked_bias"),
    decode_step=gpt2_step,
    is_plain=lambda config: not (config.reorder_and_upcast_attn or config.add_cross_attention),
    gguf=GPT2_GGUF,
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
    gguf=LLAMA_GGUF,
)
MISTRAL = replace(
    LLAMA,
    title="Mistral",
    network_class=MistralForCausalLM,
    is_plain=lambda config: config.sliding_window is None,
    gguf=MISTRAL_GGUF,
)
QWEN2 = replace(
    LLAMA,
    title="Qwen 2",
    network_class=Qwen2ForCausalLM,
    masks_by_kind=True,
    is_plain=lambda config: config.sliding_window is None,
    gguf=QWEN2_GGUF,
)
QWEN3 = replace(QWEN2, title="Qwen 3", network_class=Qwen3ForCausalLM, gguf=QWEN3_GGUF)
GEMMA2 = replace(
    LLAMA,
    title="Gemma 2",
    network_class=Gemma2ForCausalLM,
    masks_by_kind=True,
    scaled_embedding=True,
    shifted_norms=True,
    fixed={"use_bidirectional_attention": (False, None)},
    decode_step=None,
    gguf=GEMMA2_GGUF,
)
GEMMA3 = replace(
    GEMMA2,
    title="Gemma 3",
    network_class=Gemma3ForCausalLM,
    fixed={"use_bidirectional_attention": (False, None), "attn_logit_softcapping": (None,)},
    computed=("_inv_freq",),
    gguf=GEMMA3_GGUF,
)
PHI3 = replace(
    LLAMA,
    title="Phi-3",
    network_class=Phi3ForCausalLM,
    attention=("self_attn.qkv_proj", "self_attn.o_proj"),
    mlp=("mlp.gate_up_proj", "mlp.down_proj"),
    shared_inputs=(),
    dropouts=("resid_pdrop",),
    rope_types=("default", "longrope", "su", "yarn"),  # the last two are its old names of it
    partial_rotation=True,
    decode_step=None,
    gguf=PHI3_GGUF,
)
FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3)
}
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
    known: dict[str, Family] = {}
    for family in FAMILIES.values():
        if family.gguf is not None:  # several are written as one architecture, the first is it
            known.setdefault(family.gguf.architecture, family)
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


def logit_cap(network: PreTrainedModel) -> float | None:
    """Bound of the network's logits, which `capped` keeps; None where there is none."""
    found = getattr(network.config, "final_logit_softcapping", None)
    return None if found is None else float(found)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """``cap tanh(logits / cap)``; the logits themselves where ``cap`` is None.

    Source: https://arxiv.org/abs/2408.00118, section 2.
    """
    return logits if cap is None else cap * torch.tanh(logits / cap)


def logits_of(network: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The logits of final hidden states, one row each."""
    return capped(cast("Tensor", head_of(network)(hidden)), logit_cap(network))


def max_positions(config: PreTrainedConfig) -> int:
    """The longest text that a network takes, in tokens.

    Where the rotation depends on the longest text of a batch beyond some length, it is that length:
    the rows beside a text must not change it.
    """
    longest = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if "rope_type" not in rope else [rope]
    for kind in kinds:
        if isinstance(kind, dict) and kind.get("rope_type") == "longrope":
            longest = min(longest, int(kind.get("original_max_position_embeddings", longest)))
    return longest


def check_plain_embedding(family: Family) -> None:
    """Raises where the token embedding is not a table alone.

    Raises:
        ValueError: What it gives is scaled, which neither factors nor codes of it are.
    """
    if family.scaled_embedding:
        raise ValueError(
            f"the embedding of a {family.title} is scaled; it is neither factorized nor quantized"
        )
