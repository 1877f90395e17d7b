"""Networks as a module would train them, laid out without memory."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from fingpt_lightning.low_rank.adapters import FrozenBase
from fingpt_lightning.low_rank.budget import ModelBudget, SameSizeDense
from fingpt_lightning.models import Recompute, recompute_blocks
from fingpt_lightning.models.adapting import adapt, linear_names, matching_names
from fingpt_lightning.models.families import max_positions
from fingpt_lightning.models.formats.hf_folder import CONFIG
from fingpt_lightning.models.layout import features_of, lay_out
from fingpt_lightning.models.loading import DTYPES, open_stored, stored_config
from fingpt_lightning.models.low_rank_config import is_guide
from fingpt_lightning.models.packed_attention import use_packed_attention
from fingpt_lightning.models.quantization.layers import BYTES_PER_NUMBER
from fingpt_lightning.models.residual_stream import keep_residual_in
from fingpt_lightning.models.sources import GGUF, adapter_at, resolve_source
from fingpt_lightning.models.vocabulary_loss import tokens_per_chunk
from fingpt_lightning.modules import LowRankPretraining, QuantizedFinetuning
from fingpt_lightning.modules.base_model import RandomLlama
from fingpt_lightning.modules.language_modeling import LanguageModelingModule
from fingpt_lightning.pipeline import NetworkCosts, network_costs
from fingpt_lightning.planning.fake_step import fake_parameters
from fingpt_lightning.profiling.memory import storage_bytes

# Width, MLP, blocks, heads, heads of keys and values. Source: the config.json of each in
# https://huggingface.co/meta-llama, which is not there without a network and a license.
_LLAMA_2 = {
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "70b": (8192, 28672, 80, 64, 8),
}


_CPU = torch.device("cpu")


class Blueprint(NamedTuple):
    """A network on fake tensors, in the module that would train it.

    Attributes:
        mode: Fake mode of its tensors.
        network: Network whose parameters and buffers have shapes only.
        costs: Costs of its parts, for a cut into stages.
        parameters: Count of all numbers, quantized ones counted as what they stand for, without the
            guides of a self-guided run, which bytes and trained parameters have.
        trained: Count of the trained ones among them.
        dense_parameters: Parameters of the dense baseline; None where there is none.
        same_size: The dense network of as many parameters; None where it is not known.
        weights: Bytes of parameters and buffers as they are stored.
        trained_parameters: Numbers and bytes per number of each trained parameter.
    """

    mode: FakeTensorMode
    network: PreTrainedModel
    costs: NetworkCosts
    parameters: int
    trained: int
    dense_parameters: int | None
    same_size: SameSizeDense | None
    weights: int
    trained_parameters: list[tuple[int, int]]


def blueprint(
    module: LightningModule,
    vocabulary_size: int,
    block_length: int,
    precision: str,
    device: torch.device = _CPU,
) -> Blueprint:
    """Lays out the network of a module that was made and not yet configured.

    Args:
        module: Module that gets the network.
        vocabulary_size: Size of the vocabulary of the data's tokenizer.
        block_length: Most tokens per sequence.
        precision: Precision of the trainer.
        device: Device whose kernels are counted.

    Raises:
        TypeError: The module is none of ours.
        ValueError: The shapes of its base are not known.
    """
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}.get(
        precision
    )
    match module:
        case LowRankPretraining():
            return _pretraining(module, vocabulary_size, block_length, dtype, device)
        case QuantizedFinetuning():
            return _finetuning(module, vocabulary_size, block_length, device)
    raise TypeError(
        f"{type(module).__name__} cannot be planned: LowRankPretraining and QuantizedFinetuning can"
    )


class TeacherCosts(NamedTuple):
    """The costs of a frozen network beside the one that is trained.

    Attributes:
        weights: Bytes of its weights as the run holds them.
        loss: Bytes of its logits, of the positions whose logits are held at a time.
        flops_per_token: Operations of its forward pass, head included.
    """

    weights: int
    loss: int
    flops_per_token: float


def teacher_costs(
    module: LanguageModelingModule, block_length: int, num_tokens: int, device: torch.device = _CPU
) -> TeacherCosts | None:
    """What the teacher of a module adds to a step; None where it has none.

    Args:
        module: Module that was made and not yet configured.
        block_length: Most tokens per sequence.
        num_tokens: Tokens of a batch.
        device: Device of the run.

    Raises:
        OSError: There is no model at the path.
        ValueError: It cannot be read.
    """
    if module.teacher is None:
        return None
    teacher = module.teacher
    stored = open_stored(teacher.path).weights
    network = lay_out(stored.config, stored.shapes)
    itemsize, linear = DTYPES[teacher.dtype].itemsize, set(linear_names(network))
    in_matrix = BYTES_PER_NUMBER.get(teacher.quantize or "", itemsize)
    costs = network_costs(network, block_length)
    weights = sum(
        p.numel() * (in_matrix if name.removesuffix(".weight") in linear else itemsize)
        for name, p in network.named_parameters()
    )
    # Logits in the teacher's dtype, and in float32 as the softmax takes them.
    vocab_size = network.config.vocab_size
    held = tokens_per_chunk(
        module.loss_chunk_size, num_tokens, vocab_size, DTYPES[teacher.dtype], device.type
    )
    loss = min(num_tokens, held) * vocab_size * (itemsize + 4)
    flops = sum(cost.flops_per_token for cost in (*costs.blocks, costs.back))
    return TeacherCosts(round(weights), loss, flops)


def base_config(
    base: str | None, random_base: RandomLlama | None, vocabulary_size: int
) -> PreTrainedConfig:
    """The shapes of a base.

    Raises:
        FileNotFoundError: The base of an adapter, or a GGUF file, is not there.
        ValueError: It is not a Hugging Face folder, a GGUF file or an adapter of one, and not a
            known name.
    """
    if random_base is not None:
        return LlamaConfig(
            vocab_size=vocabulary_size,
            hidden_size=random_base.width,
            intermediate_size=random_base.mlp_width,
            num_hidden_layers=random_base.num_layers,
            num_attention_heads=random_base.num_heads,
            num_key_value_heads=random_base.num_key_value_heads,
            max_position_embeddings=random_base.num_positions,
        )
    assert base is not None
    path = Path(base).expanduser()
    if path.suffix == GGUF or (path / CONFIG).is_file() or adapter_at(path) is not None:
        try:
            return stored_config(resolve_source(base))
        except ValueError as error:
            raise ValueError(f"model.base {base}: {error}") from error
    size = re.search(r"llama-2-(7b|13b|70b)\b", base.lower())
    if size is None:
        known = ", ".join(f"Llama-2-{name}" for name in _LLAMA_2)
        raise ValueError(
            f"model.base {base} is not a folder with config.json; without one the shapes of {known}"
            " are known"
        )
    width, mlp, blocks, heads, kv_heads = _LLAMA_2[size[1]]
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
    )


def _pretraining(
    module: LowRankPretraining,
    vocabulary_size: int,
    block_length: int,
    dtype: torch.dtype | None,
    device: torch.device,
) -> Blueprint:
    hparams: Any = module.hparams
    if hparams["vocab_size"] is None and module.init_from is None:
        hparams["vocab_size"] = vocabulary_size
    module.check_block_length(block_length)
    network = module.laid_out()
    recompute = Recompute(hparams["recompute"])
    costs = network_costs(network, block_length, keeps_inputs_alone=recompute is Recompute.BLOCK)
    module.guiding.attach(network)
    mode = FakeTensorMode()
    fake_parameters(network, mode, dtype, device)
    if (residual := DTYPES[hparams["residual_dtype"]]) != torch.float32:
        keep_residual_in(network, residual)
    recompute_blocks(network, recompute)
    module.network = network
    budget = module.budget(block_length)
    return _blueprint(network, mode, costs, budget, {})


def _finetuning(
    module: QuantizedFinetuning, vocabulary_size: int, block_length: int, device: torch.device
) -> Blueprint:
    hparams: Any = module.hparams
    config = base_config(module.base, module.random_base, vocabulary_size)
    if block_length > max_positions(config):
        raise ValueError(
            f"data.max_length {block_length} is longer than the {max_positions(config)}"
            f" positions of {module.base or 'random_base'}"
        )
    dtype, quantize = DTYPES[hparams["dtype"]], hparams["quantize"]
    network = lay_out(config, {})
    linear = linear_names(network)
    adapted = matching_names(linear, hparams["target_modules"])
    beside = {n: module.options.rank * sum(features_of(network.get_submodule(n))) for n in adapted}
    in_matrix = BYTES_PER_NUMBER.get(quantize, dtype.itemsize)
    costs = network_costs(
        network,
        block_length,
        FrozenBase(dtype.itemsize, in_matrix, beside),
        hparams["recompute"] in ("block", "offload"),
    )
    nn.Module.to(network, dtype)
    # Lengths of rows need weights; their place is what counts here.
    adapt(network, replace(module.options, dora=False), adapted, seed=None)
    network.train()
    use_packed_attention(network)
    mode = FakeTensorMode()
    fake_parameters(network, mode, None, device)
    if hparams["recompute"] != "none":
        recompute_blocks(network, Recompute.BLOCK)
    module.network = network
    stored = {}
    if quantize is not None:
        for name in linear:
            own = f"{name}.base_layer.weight" if name in beside else f"{name}.weight"
            stored[own] = in_matrix
    return _blueprint(network, mode, costs, None, stored)


def _blueprint(
    network: PreTrainedModel,
    mode: FakeTensorMode,
    costs: NetworkCosts,
    budget: ModelBudget | None,
    bytes_of_quantized: dict[str, float],
) -> Blueprint:
    named = dict(network.named_parameters())
    whole = storage_bytes([*named.values(), *network.buffers()])
    saved = sum(
        named[name].numel() * (named[name].itemsize - width)
        for name, width in bytes_of_quantized.items()
    )
    trained = [p for p in named.values() if p.requires_grad]
    lasting = {name: p for name, p in named.items() if not is_guide(name)}
    return Blueprint(
        mode=mode,
        network=network,
        costs=costs,
        parameters=sum(p.numel() for p in lasting.values()),
        trained=sum(p.numel() for p in lasting.values() if p.requires_grad),
        dense_parameters=None if budget is None else budget.dense_total_parameters,
        same_size=None if budget is None else budget.same_size,
        weights=round(whole - saved),
        trained_parameters=[(p.numel(), p.itemsize) for p in trained],
    )
