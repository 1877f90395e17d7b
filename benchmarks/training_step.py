"""One training step, dense, low-rank or transformers' own, for benchmarks to time.

Axes: B batch, T tokens.
"""

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from fingpt_lightning.low_rank import ModelBudget, RankRule
from fingpt_lightning.low_rank.cpu_products import faster_products
from fingpt_lightning.models import (
    Recompute,
    build_network,
    compile_blocks,
    lay_out_network,
    model_budget,
    recompute_blocks,
    vocabulary_loss,
)
from fingpt_lightning.models.families import family_named, family_of, head_of
from fingpt_lightning.models.shapes import LLAMA_PRESETS, PRESETS, GPT2Shape, LlamaShape
from fingpt_lightning.profiling import (
    LiveTensorBytes,
    keep_freed_memory,
    module_memory,
    peak_rss_bytes,
    reset_peak_rss,
)

TOY = GPT2Shape(num_layers=2, width=32, num_heads=2, num_positions=32)
TOY_LLAMA = LlamaShape(num_layers=2, width=32, num_heads=2, mlp_width=80, num_positions=32)
SHAPES: dict[str, GPT2Shape | LlamaShape] = {**PRESETS, "toy": TOY, "toy-llama": TOY_LLAMA}
VOCABULARY = {"toy": 211, "toy-llama": 211} | dict.fromkeys(LLAMA_PRESETS, 32000)
GPT2_VOCABULARY = 50257


@dataclass(frozen=True)
class Workload:
    """The settings that every contender of a benchmark shares.

    Args:
        preset: Name of a preset of `fingpt_lightning.models.PRESETS`, ``toy`` or ``toy-llama``.
        rank: Rank of the low-rank contender's linear layers.
        embedding_rank: Rank of its embedding and head.
        batch_size: B.
        block_length: T.
        device: Device, ``cpu`` or ``cuda``.
        seed: Seed of weights and tokens.
    """

    preset: str
    rank: int
    embedding_rank: int | None
    batch_size: int = 4
    block_length: int = 512
    device: str = "cpu"
    seed: int = 1

    @property
    def shape(self) -> GPT2Shape | LlamaShape:
        """The sizes of the network."""
        return SHAPES[self.preset]

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary."""
        return VOCABULARY.get(self.preset, GPT2_VOCABULARY)

    @property
    def tokens_per_step(self) -> int:
        """B T."""
        return self.batch_size * self.block_length

    def budget(self) -> ModelBudget:
        """Parameters and operations of the low-rank contender and its dense baseline."""
        network = lay_out_network(
            self.shape, self.vocab_size, RankRule(self.rank), self.embedding_rank
        )
        return model_budget(network, self.block_length)


class TrainingStep:
    """A network, its fused AdamW and a step: forward, loss, backward, clipping, update.

    Args:
        contender: One of ``transformers``, its own network and loss, ``dense`` and ``low_rank``.
        workload: Sizes and data.
        recompute: Parts that blocks compute again in the backward pass.
    """

    def __init__(
        self, contender: str, workload: Workload, recompute: Recompute = Recompute.NONE
    ) -> None:
        self.contender = contender
        device = torch.device(workload.device)
        torch.manual_seed(workload.seed)
        with device:
            self.network = _build(contender, workload)
        self.network.train()
        recompute_blocks(self.network, recompute)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, fused=True)
        size = (workload.batch_size, workload.block_length + 1)
        self.tokens: Int64[Tensor, "B T+1"] = torch.randint(
            workload.vocab_size, size, generator=torch.Generator().manual_seed(workload.seed)
        ).to(device)
        self._compiled: list[tuple[Any, Any]] = []

    def compile(self) -> None:
        """Compiles the blocks; `uncompiled` can switch it off for a while."""
        compile_blocks(self.network)
        blocks = self.network.get_submodule(family_of(self.network).blocks)
        self._compiled = [(block, block._compiled_call_impl) for block in blocks.children()]

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Within it the blocks run as if they had not been compiled."""
        for block, _ in self._compiled:
            block._compiled_call_impl = None
        yield
        for block, compiled in self._compiled:
            block._compiled_call_impl = compiled

    def __call__(self, precision: str) -> float:
        """Runs a step and returns its seconds, by the wall clock, device synchronized around it.

        Args:
            precision: Precision: ``fp32``, or ``bf16`` for autocast over float32 weights.
        """
        device_type = self.tokens.device.type
        _synchronize(device_type)
        start_s = time.perf_counter()
        # transformers' own loop takes torch's products as they are.
        is_ours = self.contender != "transformers"
        with faster_products() if is_ours else nullcontext():
            with torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16"):
                loss = self._loss()
            loss.backward()
        clip_grad_norm_(self.network.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        _synchronize(device_type)
        return time.perf_counter() - start_s

    def _loss(self) -> Tensor:
        if self.contender == "transformers":
            # It shifts the labels itself.
            loss: Tensor = self.network(self.tokens[:, 1:], labels=self.tokens[:, 1:]).loss
            return loss
        hidden = self.network.base_model(self.tokens[:, :-1], use_cache=False).last_hidden_state
        sums = vocabulary_loss(head_of(self.network), hidden, self.tokens[:, 1:])
        return sums.loss_sum / sums.num_tokens


def _build(contender: str, workload: Workload) -> PreTrainedModel:
    shape = workload.shape
    if contender == "transformers" and isinstance(shape, LlamaShape):
        config = shape.config(workload.vocab_size)
        config.use_cache = False
        return family_named(config.model_type).network_class(config)
    if contender == "transformers":
        assert isinstance(shape, GPT2Shape)
        config = GPT2Config(
            vocab_size=workload.vocab_size,
            n_positions=shape.num_positions,
            n_embd=shape.width,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
        return GPT2LMHeadModel(config)
    is_low_rank = contender == "low_rank"
    return build_network(
        shape,
        workload.vocab_size,
        rank=RankRule(workload.rank if is_low_rank else None),
        embedding_rank=workload.embedding_rank if is_low_rank else None,
        seed=workload.seed,
    )


def _synchronize(device_type: str) -> None:
    if device_type == "cuda":
        torch.cuda.synchronize()


def step_memory(
    contender: str, workload: Workload, recompute: Recompute, precision: str
) -> dict[str, int]:
    """Peak memory of a step, in bytes, measured in a process of its own.

    Returns:
        Bytes ``state`` (weights, gradients, optimizer) and ``peak_accounted`` (that and the peak of
        other tensors beside it: the allocator's count on CUDA, the sum of live storages on the
        CPU); on the CPU also ``peak_rss``, the process's highest, imports included.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        arguments = (contender, asdict(workload), recompute.value, precision)
        return pool.apply(_measure_memory, arguments)


def _measure_memory(
    contender: str, workload: dict[str, Any], recompute: str, precision: str
) -> dict[str, int]:
    work = Workload(**workload)
    if work.device == "cpu":
        keep_freed_memory()  # as in the timed process
    step = TrainingStep(contender, work, Recompute(recompute))
    step(precision)  # makes the optimizer's state
    held = module_memory(step.network, step.optimizer)
    # Gradients have the weights' dtype and shapes.
    state = 2 * held.weights + held.optimizer
    if work.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step(precision)
        return {"state": state, "peak_accounted": torch.cuda.max_memory_allocated()}
    reset_peak_rss()
    step(precision)
    peak_rss = peak_rss_bytes()
    with LiveTensorBytes() as count:
        step(precision)
    accounted = held.weights + held.optimizer + count.peak_bytes
    return {"state": state, "peak_accounted": accounted, "peak_rss": peak_rss}


def interleaved(steps: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each contender, taken in turns so that drift hits all; the first turn is dropped.

    Args:
        steps: Functions to time, by contender.
        repeats: Number of timed turns.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            taken_s = step()
            if turn > 0:
                seconds[name].append(taken_s)
                print(json.dumps({"contender": name, "step_time_s": round(taken_s, 3)}), flush=True)
    return seconds
