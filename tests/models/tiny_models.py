"""Networks small enough to be made in each test, and their files."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
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
