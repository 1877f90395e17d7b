"""Does each network family compute here what transformers, PEFT and llama.cpp compute?

Tiny networks of odd sizes with random weights; windows are shorter than the texts, and caps are
reached. Each cell is the largest difference from its oracle, or the refusal by name.

Axes: B rows, T tokens, V vocabulary.
"""

import argparse
import contextlib
import copy
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

from benchmarks.llama_cpp import next_token_logprobs
from benchmarks.record import markdown_table, new_record, write_record
from fingpt_lightning.decomposition.command import decompose
from fingpt_lightning.deploy.adapter_bank import AdapterBank
from fingpt_lightning.deploy.exporting import GGUF, export
from fingpt_lightning.evaluation.scoring import score
from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.low_rank.adapters import AdapterOptions
from fingpt_lightning.models.adapting import (
    adapt,
    adapted_layers,
    linear_names,
    load_adapter,
    save_adapter,
)
from fingpt_lightning.models.budget import model_budget
from fingpt_lightning.models.decoding import decode
from fingpt_lightning.models.families import family_of, head_of, logit_cap, logits_of
from fingpt_lightning.models.input_moments import input_moments
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.models.packed_attention import (
    packed_group,
    run_packed,
    use_packed_attention,
)
from fingpt_lightning.models.quantization.rounding import NF4_BLOCK
from fingpt_lightning.models.recompute import recompute_blocks
from fingpt_lightning.models.vocabulary_loss import vocabulary_loss
from fingpt_lightning.pipeline.partition import spans_of
from fingpt_lightning.pipeline.stage import Stage, network_costs
from fingpt_lightning.tasks import Example

QUESTION = (
    "By how much do logits, gradients and everything built on them differ from transformers, PEFT"
    " and llama.cpp, for each network family?"
)
FLOAT32, FLOAT64 = 1e-4, 1e-9
_GELU_TABLE = 1e-2
"""Bound of llama.cpp's log-probabilities with GELU, of which it has a table in 16 bits."""
VOCABULARY, _POSITIONS, _WINDOW = 261, 96, 5
_SIZES: dict[str, Any] = {
    "num_hidden_layers": 3, "hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 3,
    "num_key_value_heads": 1, "max_position_embeddings": _POSITIONS, "vocab_size": VOCABULARY,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 48,
}  # fmt: skip
_PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": _POSITIONS // 2,
    "short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 3.0, 4.0],
}  # fmt: skip
_GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": _WINDOW}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(
        n_layer=3, n_embd=36, n_head=3, n_positions=_POSITIONS, vocab_size=VOCABULARY,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    ),
    "llama": lambda: LlamaConfig(**_SIZES),
    "llama, tied, rope of Llama 3": lambda: LlamaConfig(
        **_SIZES, tie_word_embeddings=True, rope_parameters=_LLAMA3
    ),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=None),
    "mistral, window": lambda: MistralConfig(**_SIZES, sliding_window=_WINDOW),
    "qwen2": lambda: Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen2, window": lambda: Qwen2Config(
        **_SIZES, use_sliding_window=True, sliding_window=_WINDOW, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=16, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(
        **_SIZES, **_GEMMA, attn_logit_softcapping=1.5, final_logit_softcapping=2.0
    ),
    "gemma3_text": lambda: Gemma3TextConfig(**(_SIZES | {"num_hidden_layers": 6}), **_GEMMA),
    "phi3": lambda: Phi3Config(**_SIZES, rope_parameters=_PARTIAL),
    "phi3, window": lambda: Phi3Config(**_SIZES, sliding_window=_WINDOW),
    "phi3, longrope": lambda: Phi3Config(**_SIZES, rope_parameters=_LONGROPE),
}  # fmt: skip
"""A config of each family, and of its variants, by the name of the row."""


class Case(NamedTuple):
    """A network of transformers, saved with its tokenizer, and an empty folder."""

    network: PreTrainedModel
    model: Path
    scratch: Path
    seed: int

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer beside the network."""
        return byte_tokenizer()

    def ids(self, *lengths: int) -> list[list[int]]:
        """Rows of random tokens, the same at each call."""
        stream = torch.Generator().manual_seed(self.seed)
        return [torch.randint(1, VOCABULARY, (n,), generator=stream).tolist() for n in lengths]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte and one merge, behind the end of text; three that no text has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", *alphabet, "\u0120t"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\u0120", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def made_case(name: str, folder: Path, seed: int = 1) -> Case:
    """The network of a row of the table.

    Args:
        name: Name of the row, of `CONFIGS`.
        folder: Folder for its files; empty.
        seed: Seed of its weights.
    """
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in network.parameters():  # norms and biases too, so that none is forgotten
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    network.eval()
    network.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "scratch").mkdir()
    return Case(network, folder / "model", folder / "scratch", seed)


def _oracle(case: Case, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    network = AutoModelForCausalLM.from_pretrained(case.model, dtype=dtype)
    assert isinstance(network, PreTrainedModel)
    return _exact(network.eval())


def _ours(case: Case, dtype: torch.dtype = torch.float64, **how: Any) -> PreTrainedModel:
    return _exact(load_model(case.model, dtype=dtype, **how).network)


class _ExactNorm(nn.Module):
    """A root-mean-square norm in the dtype of its weight."""

    def __init__(self, norm: nn.Module, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.get_parameter("weight"), epsilon
        self.shift = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0

    def forward(self, x: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()
        return x * scale * (self.weight + self.shift)


def _exact(network: PreTrainedModel) -> PreTrainedModel:
    """In float64 it replaces transformers' norms, which round to float32, in either network."""
    if network.dtype == torch.float64:
        for name, module in list(network.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                network.set_submodule(name, _ExactNorm(module, network.config.rms_norm_eps))
    return network


def _tensor(rows: Iterable[Iterable[int]]) -> Tensor:
    return torch.tensor([list(row) for row in rows])


def _difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).detach().abs().max().nan_to_num(torch.inf))


@torch.no_grad()
def logits(case: Case) -> float:
    """Loaded here and by transformers."""
    ids = _tensor(case.ids(31, 31))
    return _difference(_ours(case)(ids).logits, _oracle(case)(ids).logits)


def gradients(case: Case) -> float:
    """Loss over the vocabulary in chunks, blocks computed again; against the plain way."""
    ids = _tensor(case.ids(31, 31))
    ours, oracle = _ours(case).train(), _oracle(case).train()
    recompute_blocks(ours, "block")
    hidden = ours.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    sums = vocabulary_loss(head_of(ours), hidden, ids[:, 1:], 7, logit_cap(ours))
    (sums.loss_sum / sums.num_tokens).backward()
    logits_BTV = oracle(ids).logits[:, :-1]  # transformers' own loss is in float32
    nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return _differences(_gradients(ours), _gradients(oracle))


def _gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def _differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return max(_difference(found[name], tensor) for name, tensor in expected.items())


def nf4(case: Case) -> float:
    """Weights rounded as bitsandbytes rounds them."""
    return _rounded(case, "nf4")


def int8(case: Case) -> float:
    """Weights rounded row by row to 127 steps of the row's largest."""
    return _rounded(case, "int8")


@torch.no_grad()
def _rounded(case: Case, method: str) -> float:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    oracle = _oracle(case, torch.float32)
    for name in linear_names(oracle):
        layer: Any = oracle.get_submodule(name)
        weight = layer.weight.T.contiguous() if isinstance(layer, Conv1D) else layer.weight
        if method == "nf4":
            # On the CPU bitsandbytes 0.50.2 dequantizes rows of whole blocks alone rightly.
            flat = nn.functional.pad(weight.flatten(), (0, -weight.numel() % NF4_BLOCK))
            codes, state = quantize_4bit(
                flat.view(-1, NF4_BLOCK), compress_statistics=True, quant_type="nf4"
            )
            values = dequantize_4bit(codes, state).flatten()[: weight.numel()]
            weight = values.view(weight.shape)
        else:
            step = weight.abs().amax(1, keepdim=True) / 127
            weight = (weight / step).round() * step
        layer.weight.copy_(weight.T if isinstance(layer, Conv1D) else weight)
    ids = _tensor(case.ids(31, 31))
    found = _ours(case, torch.float32, quantize=method)
    return _difference(found(ids).logits, oracle(ids).logits)


def _peft_adapter(case: Case, folder: Path, seed: int, **kind: Any) -> Tensor:
    """Writes an adapter on all linear layers with PEFT; the logits of base and adapter by PEFT."""
    import peft

    torch.manual_seed(seed)
    is_turned = any(isinstance(module, Conv1D) for module in case.network.modules())
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", fan_in_fan_out=is_turned, **kind
    )
    with contextlib.redirect_stderr(io.StringIO()):
        adapted: Any = peft.get_peft_model(_oracle(case, torch.float32), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        adapted.save_pretrained(folder)
        found = adapted.eval()(_tensor(case.ids(31, 31))).logits
    assert isinstance(found, Tensor)
    return found


@torch.no_grad()
def lora(case: Case) -> float:
    """LoRA, rsLoRA and DoRA on all linear layers, written by PEFT; written here, read by PEFT."""
    import peft

    ids, worst = _tensor(case.ids(31, 31)), 0.0
    for number, kind in enumerate([{}, {"use_rslora": True}, {"use_dora": True}]):
        folder = case.scratch / f"peft{number}"
        expected = _peft_adapter(case, folder, case.seed + number, **kind)
        ours = _ours(case, torch.float32)
        names = load_adapter(folder, ours)
        assert names == linear_names(_ours(case, torch.float32)), names
        worst = max(worst, _difference(ours(ids).logits, expected))
        save_adapter(ours, case.scratch / f"ours{number}", str(case.model))
        again: Any = peft.PeftModel.from_pretrained(
            _oracle(case, torch.float32), case.scratch / f"ours{number}"
        )
        worst = max(worst, _difference(again(ids).logits, expected))
    return worst


@torch.no_grad()
def many_adapters(case: Case) -> float:
    """Rows of one batch with adapters of their own, against each adapter alone."""
    expected = [
        _peft_adapter(case, case.scratch / f"client{number}", number)[number] for number in range(2)
    ]
    network = _ours(case, torch.float32)
    bank = AdapterBank(network)
    for number in range(2):
        bank.load(str(number), case.scratch / f"client{number}")
    with bank.rows(["0", "1"]):
        found = network(_tensor(case.ids(31, 31))).logits
    return _difference(found, torch.stack(expected))


_SHARED, _ROWS = 9, (3, 8, 14)


def packed(case: Case) -> float:
    """Rows behind a shared beginning in one sequence, gradients included, against each alone."""
    shared, *rows = case.ids(_SHARED, *_ROWS)
    oracle, ours = _oracle(case), _ours(case)
    use_packed_attention(ours)
    expected = [_hidden(oracle, [*shared, *row])[_SHARED:] for row in rows]
    ids = [*shared, *(token for row in rows for token in row)]
    positions = [*range(_SHARED), *(_SHARED + t for row in rows for t in range(len(row)))]
    group = packed_group(0, _SHARED, _ROWS)
    hidden = run_packed(ours, _tensor([ids]), _tensor([positions]), [group])[0, _SHARED:]
    plain = torch.cat(expected)
    weights = torch.linspace(-1, 1, plain.numel(), dtype=plain.dtype).view_as(plain)
    (hidden * weights).sum().backward()
    (plain * weights).sum().backward()
    return max(_difference(hidden, plain), _differences(_gradients(ours), _gradients(oracle)))


def _hidden(network: PreTrainedModel, tokens: list[int]) -> Tensor:
    found: Tensor = network.base_model(_tensor([tokens]), use_cache=False).last_hidden_state[0]
    return found


@torch.no_grad()
def cached(case: Case) -> float:
    """Texts of a ragged batch written token by token, against each whole text run anew."""
    prompts, seen = case.ids(3, 11, 20), list[Tensor]()

    def choose(logits_BV: Tensor) -> Tensor:
        seen.append(logits_BV)
        return logits_BV.argmax(1)

    oracle = _oracle(case)
    written = decode(_ours(case), prompts, 12, choose=choose)
    worst = 0.0
    for row, (prompt, new) in enumerate(zip(prompts, written, strict=True)):
        expected = oracle(_tensor([[*prompt, *new[:-1]]])).logits[0, len(prompt) - 1 :]
        found = torch.stack([logits_BV[row] for logits_BV in seen])
        worst = max(worst, _difference(found, expected))
    return worst


_TEXTS = ("Shares of Foo fell sharply. ", "Profit rose. ", "The dividend was kept as before. ")
_LABELS = (" negative", " neutral", " positive and more")


@torch.no_grad()
def evaluation(case: Case) -> float:
    """Scores of answers in token trees behind a shared beginning, against one text at a time."""
    examples = [
        Example("What is the tone? ", (text,), _LABELS, 0, row, text)
        for row, text in enumerate(_TEXTS, 1)
    ]
    found = score(_ours(case), case.tokenizer, examples)
    oracle, worst = _oracle(case), 0.0
    for example, prediction in zip(examples, found, strict=True):
        for choice, got in zip(example.choices, prediction.scores, strict=True):
            prompt = case.tokenizer.encode(example.prefix + example.prompts[0])
            tokens = case.tokenizer.encode(example.prefix + example.prompts[0] + choice)
            log_p = oracle(_tensor([tokens])).logits[0].log_softmax(1)
            places = range(len(prompt), len(tokens))
            worst = max(worst, abs(got - sum(float(log_p[i - 1, tokens[i]]) for i in places)))
    return worst


@torch.no_grad()
def moments(case: Case) -> float:
    """What each linear layer reads, block by block, against hooks in a whole pass."""
    network, ids = _ours(case), _tensor(case.ids(31, 31))
    read: dict[str, Tensor] = {}
    hooks = []
    for name in linear_names(network):
        hooks.append(
            network.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: read.update({name: args[0].flatten(0, 1)})
            )
        )
    network.base_model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    worst, num_found = 0.0, 0
    for part in input_moments(network, ids, 1):
        for name, group in part.groups.items():
            if name in read:
                num_found += 1
                expected = read[name].T @ read[name] / ids.numel()
                worst = max(worst, _difference(part.moments[group], expected))
    assert num_found == len(read)
    return worst


@torch.no_grad()
def decomposed(case: Case) -> float:
    """Every linear layer as factors, against the network of its truncated SVDs."""
    output = case.scratch / "decomposed"
    decompose(case.model, output, rank_ratio=0.3, dtype="float64")
    network = _exact(load_model(output, dtype=torch.float64).network)
    oracle = _oracle(case)
    for name in linear_names(oracle):
        layer: Any = oracle.get_submodule(name)
        factors = network.get_submodule(name)
        assert isinstance(factors, LowRankLinear)
        left, values, right = torch.linalg.svd(layer.weight, full_matrices=False)
        values[factors.rank :] = 0
        layer.weight.copy_(left * values @ right)
    ids = _tensor(case.ids(31, 31))
    return _difference(network(ids).logits, oracle(ids).logits)


def pipeline(case: Case) -> float:
    """Two stages one after the other, gradients included, against the whole network."""
    ids = _tensor(case.ids(31, 31))
    whole, cut = _oracle(case), _ours(case)
    num_blocks = whole.config.num_hidden_layers
    first, last = (Stage(cut, span) for span in spans_of([1, num_blocks - 1]))
    found = logits_of(cut, last(first(ids)))
    expected = whole(ids).logits
    weights = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype).view_as(expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    errors = _differences(_gradients(cut), _gradients(whole))
    return max(_difference(found, expected), errors)


@torch.no_grad()
def exported(case: Case) -> float:
    """An adapter merged in and written; read by transformers."""
    ids = _tensor(case.ids(31, 31))
    adapted = _adapted_model(case)
    expected = adapted.network(ids).logits
    export(adapted, "merged", case.scratch / "merged")
    again = AutoModelForCausalLM.from_pretrained(case.scratch / "merged", dtype=torch.float32)
    return _difference(again.eval()(ids).logits, expected)


def _adapted_model(case: Case) -> Any:
    network = _ours(case, torch.float32)
    adapt(network, AdapterOptions(3), seed=case.seed)
    torch.manual_seed(case.seed)
    with torch.no_grad():
        for layer in adapted_layers(network).values():
            nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(network, case.scratch / "adapter", str(case.model))
    return load_model(case.scratch / "adapter", dtype=torch.float32)


@torch.no_grad()
def gguf(case: Case) -> float:
    """Written as GGUF and read again."""
    return _difference(_from_gguf(case), case.network(_tensor(case.ids(31, 31))).logits)


def _from_gguf(case: Case) -> Tensor:
    file = _gguf_file(case)
    found: Tensor = load_model(file).network(_tensor(case.ids(31, 31))).logits
    return found


def _gguf_file(case: Case) -> Path:
    output = case.scratch / "gguf"
    if not output.exists():
        export(load_model(case.model), "gguf", output)
    return output / GGUF


@torch.no_grad()
def llama_cpp(case: Case) -> float:
    """The GGUF file run by llama.cpp: log-probabilities of the token after each prompt."""
    file = _gguf_file(case)
    texts = [_TEXTS[0] * 2, _TEXTS[2]]
    found = next_token_logprobs(file, texts, VOCABULARY)
    worst = 0.0
    for text, row in zip(texts, found, strict=True):
        ids = _tensor([case.tokenizer.encode(text)])
        expected = case.network(ids).logits[0, -1].log_softmax(0)
        worst = max(worst, _difference(row, expected))
    return worst


def plan(case: Case) -> float:
    """Parameters that budget and pipeline costs count, against those there are."""
    network = _ours(case)
    stored = sum(p.numel() for p in network.parameters())
    budget, costs = model_budget(network, 31), network_costs(network, 31)
    counted = costs.front + costs.back
    for block in costs.blocks:
        counted += block
    table = sum(p.numel() for p in network.get_input_embeddings().parameters())
    tied = table * network.config.tie_word_embeddings
    return float(abs(budget.total_parameters - stored) + abs(counted.parameters - tied - stored))


CELLS: dict[str, Callable[[Case], float]] = {
    "logits": logits,
    "gradients": gradients,
    "NF4": nf4,
    "int8": int8,
    "LoRA, rsLoRA, DoRA": lora,
    "many adapters": many_adapters,
    "packed": packed,
    "cached decoding": cached,
    "evaluation": evaluation,
    "input moments": moments,
    "decomposition": decomposed,
    "two-stage pipeline": pipeline,
    "merged export": exported,
    "GGUF": gguf,
    "llama.cpp": llama_cpp,
    "plan": plan,
}
"""The columns of the table."""
_IN_FLOAT32 = {"NF4", "int8", "LoRA, rsLoRA, DoRA", "many adapters", "merged export", "GGUF"}
_ROUNDED = {"packed", "cached decoding", "evaluation"}
"""Columns in which transformers' capped attention, which rounds to float32, is the oracle."""


def bound(name: str, column: str) -> float:
    """The largest difference that counts as equal.

    Args:
        name: Row of the table, of `CONFIGS`.
        column: Column, of `CELLS`.
    """
    if column == "plan":
        return 0.0
    if column == "llama.cpp":
        has_gelu = name.startswith(("gpt2", "gemma"))
        return _GELU_TABLE if has_gelu else FLOAT32
    is_rounded = name == "gemma2" and column in _ROUNDED
    return FLOAT32 if column in _IN_FLOAT32 or is_rounded else FLOAT64


def cell(case: Case, column: str) -> float | str:
    """The largest difference of a cell, or the one line that refuses it."""
    try:
        return CELLS[column](copy.copy(case))
    except ValueError as error:
        return str(error)
    finally:
        torch.set_grad_enabled(True)


def main() -> None:
    """Fills the table and writes record and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument("--families", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--seed", type=int, default=1, help="of weights, adapters and tokens")
    options = parser.parse_args()
    record = new_record(QUESTION, {"families": options.families, "seed": options.seed})
    record["rows"] = []
    for name in options.families:
        with tempfile.TemporaryDirectory() as folder:
            case = made_case(name, Path(folder), options.seed)
            row: dict[str, Any] = {
                "contender": name, "family": family_of(case.network).title, "cells": {}
            }  # fmt: skip
            for column in CELLS:
                if column == "llama.cpp" and not find_spec("xllamacpp"):
                    continue
                started = time.monotonic()
                found = cell(case, column)
                seconds = time.monotonic() - started
                is_equal = isinstance(found, float) and found <= bound(name, column)
                row["cells"][column] = {
                    "difference": found if isinstance(found, float) else None,
                    "bound": bound(name, column),
                    "refused": found if isinstance(found, str) else None,
                    "is_equal": is_equal,
                }
                print(f"{name}, {column}: {found} ({seconds:.1f} s)", flush=True)
        record["rows"].append(row)
    cells = [found for row in record["rows"] for found in row["cells"].values()]
    record["summary"] = {
        "num_cells": len(cells),
        "num_equal": sum(found["is_equal"] for found in cells),
        "num_refused": sum(found["refused"] is not None for found in cells),
        "num_wrong": sum(not found["is_equal"] and found["refused"] is None for found in cells),
    }
    write_record(options.json, record, _table(record["rows"]))
    print(json.dumps(record["summary"], indent=1))


def _table(rows: list[dict[str, Any]]) -> str:
    columns = list(rows[0]["cells"])
    lines = [
        [row["contender"], *(_shown(row["cells"][column]) for column in columns)] for row in rows
    ]
    return markdown_table(["family", *columns], lines)


def _shown(found: Mapping[str, Any]) -> str:
    if found["refused"] is not None:
        return "refused"
    difference = "0" if not found["difference"] else f"{found['difference']:.0e}"
    return difference if found["is_equal"] else f"**{difference}**"


if __name__ == "__main__":
    main()
