"""Networks small enough to be made in each test, and their files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 23


def tiny_gpt2() -> PreTrainedModel:
    """Two blocks, tied head."""
    torch.manual_seed(1)
    config = GPT2Config(
        n_layer=2, n_embd=12, n_head=3, n_positions=11, vocab_size=VOCABULARY,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return _spread(GPT2LMHeadModel(config))


def tiny_llama(mlp_width: int = 96) -> PreTrainedModel:
    """Two blocks, grouped heads, a head of its own; widths that blocks of 32 divide."""
    torch.manual_seed(1)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=mlp_width, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, vocab_size=VOCABULARY,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return _spread(LlamaForCausalLM(config))


_SIZES: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "vocab_size": VOCABULARY,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
_WINDOW = 4
"""Tokens of a window; every text of the tests is longer."""


def tiny_mistral() -> PreTrainedModel:
    """Windows in both blocks."""
    torch.manual_seed(1)
    return _spread(MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=_WINDOW)))


def tiny_qwen2() -> PreTrainedModel:
    """Biases of queries, keys and values; a window in the second block; a tied head."""
    torch.manual_seed(1)
    config = Qwen2Config(
        **_SIZES, use_sliding_window=True, sliding_window=_WINDOW, max_window_layers=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    return _spread(Qwen2ForCausalLM(config))


def tiny_qwen3() -> PreTrainedModel:
    """Norms of queries and keys, heads wider than their share."""
    torch.manual_seed(1)
    return _spread(Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=24)))


def tiny_gemma2() -> PreTrainedModel:
    """Caps that scores and logits reach, windows in every other block, norms around both halves."""
    torch.manual_seed(1)
    config = Gemma2Config(
        **_SIZES, head_dim=24, query_pre_attn_scalar=24, sliding_window=_WINDOW,
        attn_logit_softcapping=1.5, final_logit_softcapping=2.0,
    )  # fmt: skip
    return _spread(Gemma2ForCausalLM(config))


def tiny_gemma3() -> PreTrainedModel:
    """Windows and their own rotation in the first of two blocks, norms of queries and keys."""
    torch.manual_seed(1)
    config = Gemma3TextConfig(
        **_SIZES, head_dim=24, query_pre_attn_scalar=24, sliding_window=_WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return _spread(Gemma3ForCausalLM(config))


def tiny_phi3() -> PreTrainedModel:
    """Fused layers, a rotation of three quarters of the features, a window."""
    torch.manual_seed(1)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    config = Phi3Config(**_SIZES, sliding_window=_WINDOW, rope_parameters=rope)
    return _spread(Phi3ForCausalLM(config))


TINY: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "mistral": tiny_mistral,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "gemma2": tiny_gemma2,
    "gemma3_text": tiny_gemma3,
    "phi3": tiny_phi3,
}
"""A tiny network of each family, by its ``model_type``."""


def _spread(network: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in network.parameters():  # norms and biases too, so that none is forgotten
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    network.eval()
    return network


def tiny_tokenizer(num_tokens: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """One token a word: w0, w1, ..."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(num_tokens)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", unk_token="w1")


def save(network: PreTrainedModel, folder: Path, shard_size: str = "5GB") -> Path:
    """A Hugging Face folder with weights and tokenizer."""
    network.save_pretrained(folder, max_shard_size=shard_size)
    tiny_tokenizer(network.config.vocab_size).save_pretrained(folder)
    return folder


def save_low_rank(network: PreTrainedModel, folder: Path) -> Path:
    """A Hugging Face folder of a network whose head is tied to a factorised embedding."""
    state = network.state_dict()
    body = {name: tensor for name, tensor in state.items() if not name.startswith("lm_head.")}
    network.save_pretrained(folder, state_dict=body)
    return folder


def ids() -> torch.Tensor:
    """A batch of tokens."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(VOCABULARY, (2, 7), generator=generator)
