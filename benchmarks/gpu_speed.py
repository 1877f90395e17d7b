"""How fast a device is at what this project does, and whether the host ever waits for it."""

import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import AdamW
from typing_extensions import override

from benchmarks.gpu_parity import Batches, Note, trainer_on
from benchmarks.pretraining import RANKS
from benchmarks.step_profile import memory_bytes_per_s, profiled
from benchmarks.training_step import TrainingStep, Workload
from fingpt_lightning.low_rank import LoRAMuon, RankRule, Spectron, low_rank_factors
from fingpt_lightning.low_rank.adapters import AdapterOptions
from fingpt_lightning.models import build_network, recompute_blocks, vocabulary_loss
from fingpt_lightning.models.adapting import adapt
from fingpt_lightning.models.decoding import decode
from fingpt_lightning.modules import LowRankPretraining
from fingpt_lightning.modules.base_model import RandomLlama, random_llama
from fingpt_lightning.profiling import measured_peak_flops_per_s
from fingpt_lightning.units import GB

_LLAMA_2_7B = RandomLlama(32, 4096, 32, 32, 11008, 4096)
"""Source: https://arxiv.org/abs/2307.09288, table 1, and the model's config."""
_TOY_LLAMA = RandomLlama(4, 64, 2, 2, 128, 64)
_REPEATS = 5


def ceilings(device: torch.device, is_toy: bool, note: Note) -> None:
    """The highest rate of products in each dtype, and of copies."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        rate = measured_peak_flops_per_s(device, dtype)
        found[f"{str(dtype).removeprefix('torch.')}_tflop_per_s"] = rate / 1e12
        note(found)
    found["memory_gb_per_s"] = memory_bytes_per_s(device.type, 2**22 if is_toy else 2**30) / 1e9
    on_host = torch.empty(2**20 if is_toy else 2**28, dtype=torch.uint8)
    on_host = on_host.pin_memory() if device.type == "cuda" else on_host
    seconds = _median_s(lambda: on_host.to(device, copy=True), device)
    found["from_host_gb_per_s"] = on_host.nbytes / seconds / 1e9
    note(found)


_WAITING: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Spectron": {"optimizer": "spectron"},
    "LoRA-Muon": {"optimizer": "lora_muon", "embedding_optimizer": "mixed"},
    "blocks recomputed": {"recompute": "block"},
}


def waits(device: torch.device, is_toy: bool, note: Note) -> None:
    """Waits of the host for the device that torch reports, in a step of each recipe."""
    if device.type != "cuda":
        note({"skipped": "only torch with CUDA reports them"})
        return
    found: dict[str, Any] = {}
    for name, recipe in _WAITING.items():
        counted = _Waits()
        module = LowRankPretraining(
            num_layers=2,
            width=64,
            num_heads=4,
            num_positions=32,
            rank=8,
            embedding_rank=8,
            **recipe,
        )
        trainer = trainer_on(device, max_steps=4, precision="bf16-mixed", callbacks=[counted])
        trainer.fit(module, datamodule=Batches(4))
        found[f"waits of {name}"] = {"error": float(len(counted.places)), "bound": 0.0}
        if counted.places:
            found[f"places of {name}"] = sorted(set(counted.places))[:5]
        note(found)


class _Waits(Callback):
    """Places of the last step in which torch reports that the host waited."""

    def __init__(self) -> None:
        self.places: list[str] = []
        self._caught: Any = None

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == trainer.max_steps - 1:  # the last one begins
            self._caught = warnings.catch_warnings(record=True)
            self._reported = self._caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        elif self._caught is not None:
            torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(None, None, None)
            self.places = [
                f"{Path(found.filename).name}:{found.lineno}"
                for found in self._reported
                if "synchroniz" in str(found.message)
            ]
            self._caught = None


def medium(device: torch.device, is_toy: bool, note: Note) -> None:
    """Steps of dense and low-rank networks in turn, eager, then with compiled blocks."""
    steps = _steps("toy" if is_toy else "gpt2-medium", device, is_toy)
    found: dict[str, Any] = {"tokens_per_step": steps["dense"].tokens.shape[0] * _length(is_toy)}
    for how in ("eager", "compiled"):
        if how == "compiled":
            for step in steps.values():
                step.compile()
        seconds = _in_turns({name: partial(step, "bf16") for name, step in steps.items()})
        found |= {f"{name}_{how}_s": value for name, value in seconds.items()}
        found[f"{how}_ratio"] = seconds["dense"] / seconds["low_rank"]
        note(found)


def xl(device: torch.device, is_toy: bool, note: Note) -> None:
    """Compiled steps of GPT-2 XL, dense and low-rank, one network in memory at a time."""
    found: dict[str, Any] = {}
    for name in ("low_rank", "dense"):
        (step,) = _steps("toy" if is_toy else "gpt2-xl", device, is_toy, [name]).values()
        if not is_toy:
            step.compile()
        found[f"{name}_compiled_s"] = _in_turns({name: partial(step, "bf16")})[name]
        if device.type == "cuda":
            found[f"{name}_peak_gb"] = torch.cuda.max_memory_allocated() / GB
            torch.cuda.reset_peak_memory_stats()
        note(found)
        del step
        if device.type == "cuda":
            torch.cuda.empty_cache()
    found["compiled_ratio"] = found["dense_compiled_s"] / found["low_rank_compiled_s"]
    note(found)


def optimizers(device: torch.device, is_toy: bool, note: Note) -> None:
    """A step of each optimizer on a low-rank network's gradients, without a network's pass."""
    preset = "toy" if is_toy else "gpt2-medium"
    work = _workload(preset, device, is_toy)
    network = TrainingStep("low_rank", work).network
    factors = low_rank_factors(network)
    known = {id(p) for p in factors}
    others = [p for p in network.parameters() if id(p) not in known]
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    groups: list[dict[str, Any]] = [{"params": others}, {"params": factors, "is_low_rank": True}]
    made: dict[str, Any] = {
        "AdamW": AdamW(network.parameters(), lr=1e-5, fused=True),
        "Spectron": Spectron([dict(g) for g in groups], lr=1e-5, fused=True),
        "LoRA-Muon": LoRAMuon([dict(g) for g in groups], lr=1e-5, fused=True),
    }
    found: dict[str, Any] = {}
    for name, optimizer in made.items():
        found[f"{name}_s"] = _median_s(optimizer.step, device)
        note(found)


def profile(device: torch.device, is_toy: bool, note: Note) -> None:
    """Seconds of each part of a step, in bf16."""
    found: dict[str, Any] = {}
    for name, step in _steps("toy" if is_toy else "gpt2-medium", device, is_toy).items():
        parts = profiled(step, "bf16", 3)
        found |= {f"{name}_{part}_s": statistics.median(s) for part, s in parts.items()}
        note(found)


def finetuning(device: torch.device, is_toy: bool, note: Note) -> None:
    """A step of some of Llama-2-7B's blocks with adapters; all blocks' memory follows from it."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        note({"skipped": "bitsandbytes is not installed"})
        return
    shape = _TOY_LLAMA if is_toy else _LLAMA_2_7B
    rows, length = (2, 16) if is_toy else (4, 512)
    peaks, found = [], dict[str, Any]()
    for num_blocks in (2, 3):
        sizes = RandomLlama(**(vars(shape) | {"num_layers": num_blocks}))
        network = random_llama(
            sizes, 211 if is_toy else 32000, 0, dtype=torch.bfloat16, device=device,
            quantize="nf4", seed=1,
        )  # fmt: skip
        network.train()
        adapt(network, AdapterOptions(8), seed=1)
        recompute_blocks(network, "offload")
        trained = [p for p in network.parameters() if p.requires_grad]
        optimizer = AdamW(trained, lr=1e-4, fused=True)
        ids = torch.randint(network.config.vocab_size, (rows, length), device=device)

        def step(network: Any = network, optimizer: Any = optimizer, ids: Any = ids) -> None:
            hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
            sums = vocabulary_loss(network.get_submodule("lm_head"), hidden, ids)
            (sums.loss_sum / sums.num_tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

        if device.type == "cuda":
            torch.cuda.empty_cache()
            step()
            torch.cuda.reset_peak_memory_stats()
        found[f"step_of_{num_blocks}_blocks_s"] = _median_s(step, device)
        if device.type == "cuda":
            peaks.append(torch.cuda.max_memory_allocated())
        del network, optimizer, trained, step
        note(found)
    few, more = (found[f"step_of_{n}_blocks_s"] for n in (2, 3))
    found["whole_step_s"] = few + (shape.num_layers - 2) * (more - few)
    if peaks:
        found["whole_step_gb"] = (peaks[0] + (shape.num_layers - 2) * (peaks[1] - peaks[0])) / GB
    note(found)


def decoding(device: torch.device, is_toy: bool, note: Note) -> None:
    """New tokens per second of dense and low-rank GPT-2 small in bf16, one row and eight."""
    preset = "toy" if is_toy else "gpt2-small"
    work = _workload(preset, device, is_toy)
    num_new = 4 if is_toy else 64
    found: dict[str, Any] = {}
    for name in ("dense", "low_rank"):
        rank, embedding_rank = RANKS[preset] if name == "low_rank" else (None, None)
        network = build_network(work.shape, work.vocab_size, RankRule(rank), embedding_rank, seed=1)
        torch.nn.Module.to(network, device, torch.bfloat16)
        network.requires_grad_(False).eval()
        for num_rows in (1, 8):
            prompts = [[1, 2, 3]] * num_rows
            seconds = _median_s(lambda: decode(network, prompts, num_new), device)  # noqa: B023
            found[f"{name}_{num_rows}_tokens_per_s"] = num_rows * num_new / seconds
            note(found)
    for num_rows in (1, 8):
        ours, theirs = (found[f"{n}_{num_rows}_tokens_per_s"] for n in ("low_rank", "dense"))
        found[f"rows_{num_rows}_ratio"] = ours / theirs
    note(found)


def _length(is_toy: bool) -> int:
    return 16 if is_toy else 1024


def _workload(preset: str, device: torch.device, is_toy: bool, num_rows: int = 16) -> Workload:
    rows = 2 if is_toy else num_rows
    return Workload(preset, *RANKS[preset], rows, _length(is_toy), device.type)


def _steps(
    preset: str, device: torch.device, is_toy: bool, names: Any = ("dense", "low_rank")
) -> dict[str, TrainingStep]:
    """Steps of 16 rows, or of fewer where memory does not suffice."""
    num_rows = 16
    while True:
        try:
            work = _workload(preset, device, is_toy, num_rows)
            steps = {name: TrainingStep(name, work) for name in names}
            for step in steps.values():
                step("bf16")
        except torch.cuda.OutOfMemoryError:
            if num_rows == 1:
                raise
            num_rows //= 2
            torch.cuda.empty_cache()
        else:
            return steps


def _in_turns(steps: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The median of each, in turns; the first turn, in which blocks are compiled, is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(_REPEATS + 1):
        for name, step in steps.items():
            taken_s = step()
            if turn > 0:
                seconds[name].append(taken_s)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def _median_s(run: Callable[[], object], device: torch.device) -> float:
    taken = []
    for _ in range(_REPEATS + 1):
        start_s = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start_s)
    return statistics.median(taken[1:])
