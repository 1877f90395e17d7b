"""A tokenizer of a few hundred tokens, networks for it, and rows of tasks."""

import json
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fingpt_lightning.low_rank import RankRule
from fingpt_lightning.models.from_scratch import build_network
from fingpt_lightning.models.shapes import GPT2Shape
from fingpt_lightning.tasks import Example, find_task, read_rows

VOCABULARY = 320
POSITIONS = 330
_WORDS = (
    "Instruction: What is the sentiment of this news? Please choose an answer from Input: Answer:"
    " negative neutral positive mildly moderately strong Shares of Foo Corp fell as profit rose"
    " and the dividend was kept Question: No Yes person location organization"
)

ROWS: dict[str, list[dict[str, Any]]] = {
    "fpb": [
        {"text": "Shares of Foo fell", "label": "negative"},
        {"text": "Profit rose", "label": "positive"},
        {"text": "The dividend of Foo Corp was kept as it was", "label": "neutral"},
        {"text": "Foo", "label": "neutral"},
        {"text": "Profit of Foo fell as the dividend rose", "label": "negative"},
    ],
    "nwgi": [
        {"text": "Shares of Foo fell", "label7": "strong negative"},
        {"text": "Profit rose and rose and rose", "label7": "mildly positive"},
        {"text": "Foo was kept", "label7": "neutral"},
    ],
    "piqa": [
        {"query": "Question: Fold Foo\n", "choices": ["fell and rose", "fell and was"], "gold": 1},
        {"query": "Question: Keep", "choices": ["Shares", "the profit of the Corp"], "gold": 0},
        {"query": "Question: Was it?", "choices": ["rose", "rose as profit fell"], "gold": 0},
    ],
    "winogrande": [
        {
            "context_options": ["Foo met Corp. Foo", "Foo met Corp. Corp"],
            "continuation": "rose.",
            "gold": 1,
        },
        {
            "context_options": ["The profit fell. It", "The profit fell. Dividend"],
            "continuation": "was kept and fell.",
            "gold": 0,
        },
    ],
    "lambada": [{"text": "Shares of Foo Corp fell"}, {"text": "the profit rose and rose"}],
    "headline": [
        {
            "text": "Gold rose",
            "price_up": 1,
            "price_constant": 0,
            "price_down": 0,
            "asset_comparison": 0,
            "past_info": 1,
            "future_info": 0,
        }
    ],
    "fiqa_sa": [
        {"text": "Foo fell", "kind": "post", "score": -0.4},
        {"text": "Profit rose", "kind": "headline", "score": 0.6},
    ],
}
"""Of each task, by its folder."""


def tiny_tokenizer(begin: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE, in which some labels are one token and others several.

    Args:
        begin: A token that every text begins with.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>", "<begin>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_WORDS, " negative neutral" * 9], trainer)
    if begin is not None:
        token = (begin, tokenizer.token_to_id(begin))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[token]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """BPE over whole texts, blanks as U+2581 and unknown characters as bytes, as Llama 2 has it."""
    space = "\u2581"
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(space), normalizers.Replace(" ", space)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=list(string.printable.replace("\n", "")),
        show_progress=False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(space, "merged_with_next")
    tokenizer.train_from_iterator([_WORDS, " negative neutral" * 9], trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_network(kind: str) -> PreTrainedModel:
    """Two blocks of a ``llama`` with grouped heads, a ``gpt2``, or a ``low_rank`` GPT-2."""
    torch.manual_seed(3)
    network: PreTrainedModel
    if kind == "llama":
        network = LlamaForCausalLM(
            LlamaConfig(
                num_hidden_layers=2, hidden_size=24, intermediate_size=39, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=POSITIONS, vocab_size=VOCABULARY,
                bos_token_id=1, eos_token_id=0,
            )
        )  # fmt: skip
    elif kind == "gpt2":
        network = GPT2LMHeadModel(
            GPT2Config(
                n_layer=2, n_embd=21, n_head=3, n_positions=POSITIONS, vocab_size=VOCABULARY,
                bos_token_id=0, eos_token_id=0,
            )
        )  # fmt: skip
    else:
        shape = GPT2Shape(num_layers=2, width=22, num_heads=2, num_positions=POSITIONS)
        network = build_network(shape, VOCABULARY, RankRule(5), embedding_rank=11, seed=3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    network.train(False)
    return network


def write_rows(folder: Path, task: str, split: str = "validation") -> Path:
    """Writes the rows of a task's folder as a split; gives the data directory."""
    (folder / task).mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in ROWS[task]]
    (folder / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def examples_of(folder: Path, name: str) -> list[Example]:
    """The examples of a shipped task."""
    task = find_task(name)
    return read_rows(task, write_rows(folder, task.folder), "validation").examples
