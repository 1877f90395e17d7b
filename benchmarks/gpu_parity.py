"""What a device computes beside float64 on the CPU, from the same numbers.

Axes: B batch, T tokens, D width.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from typing_extensions import override

from fingpt_lightning.data.batch import TokenBatch
from fingpt_lightning.low_rank import LoRAMuon, RankRule, Spectron, factorize
from fingpt_lightning.models import (
    GPT2Shape,
    LlamaShape,
    Recompute,
    build_network,
    recompute_blocks,
    vocabulary_loss,
)
from fingpt_lightning.models.decoding import decode
from fingpt_lightning.models.families import head_of
from fingpt_lightning.models.packed_attention import use_packed_attention
from fingpt_lightning.models.packed_prompts import run_packed_prompts
from fingpt_lightning.models.quantization.layers import quantized_layer
from fingpt_lightning.models.recompute import OFFLOAD
from fingpt_lightning.modules import LowRankPretraining, QuantizedFinetuning
from fingpt_lightning.modules.base_model import RandomLlama, random_llama

SEED = 1
_VOCABULARY = 211
_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}
"""Unit roundoff: half the distance of 1 to the next number."""
_IN_A_ROW = 256
"""Bound of a relative error, in units of roundoff, of what goes through a whole network.

Some 30 roundings in a row and sums of up to 211 terms, in float32 at least, add up as their root at
best and linearly at worst; a wrong kernel is wrong by far more.
"""
_ALONE = 32
"""The same of one operation."""
Note = Callable[[dict[str, Any]], None]


def relative_error(found: Tensor, truth: Tensor) -> float:
    """The norm of the difference over that of the truth, in float64 on the CPU."""
    found, truth = found.detach().cpu().double(), truth.detach().cpu().double()
    return float((found - truth).norm() / truth.norm().clamp_min(1e-300))


class Checks:
    """Errors and their bounds, by name; each is noted as soon as it is found."""

    def __init__(self, note: Note) -> None:
        self.found: dict[str, Any] = {}
        self._note = note

    def add(self, name: str, found: Tensor, truth: Tensor, bound: float) -> None:
        """Compares a tensor with what it should be."""
        self.found[name] = {"error": relative_error(found, truth), "bound": bound}
        self._note(self.found)


def parity(device: torch.device, is_toy: bool, note: Note) -> None:
    """Layers, loss, gradients, optimizers, recomputation, quantized products, packed attention."""
    checks = Checks(note)
    width = 64 if is_toy else 256
    _networks(checks, device, width)
    _recomputation(checks, device, width)
    _optimizers(checks, device, width)
    weight = torch.randn(width, 3 * width)
    ours, truth = (
        factorize(one, width // 3, torch.float64) for one in (weight.to(device), weight.double())
    )
    checks.add("factorize", ours.up @ ours.down, truth.up @ truth.down, 1e-4)
    _packed(checks, device)
    _quantized(checks, device, width)


def _shapes(width: int) -> dict[str, GPT2Shape | LlamaShape]:
    return {
        "gpt2": GPT2Shape(num_layers=2, width=width, num_heads=4, num_positions=64),
        "llama": LlamaShape(
            num_layers=2, width=width, num_heads=4, mlp_width=2 * width, num_positions=64
        ),
    }


def _built(shape: GPT2Shape | LlamaShape, rank: int | None, dropout: float = 0.0) -> Any:
    return build_network(
        shape, _VOCABULARY, RankRule(rank), None if rank is None else rank, dropout, seed=SEED
    )


def _ids() -> Tensor:
    stream = torch.Generator().manual_seed(SEED)
    return torch.randint(_VOCABULARY, (3, 33), generator=stream)


def _loss(network: PreTrainedModel, ids: Tensor) -> Tensor:
    hidden = network.base_model(ids[:, :-1], use_cache=False).last_hidden_state
    return vocabulary_loss(head_of(network), hidden, ids[:, 1:], 17).loss_sum


def _gradient(network: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the gradients of all parameters in one row."""
    network.zero_grad()
    loss = _loss(network, ids)
    loss.backward()
    every = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(every)


def _networks(checks: Checks, device: torch.device, width: int) -> None:
    ids = _ids()
    for family, shape in _shapes(width).items():
        for kind, rank in (("dense", None), ("low-rank", width // 3)):
            network = _built(shape, rank)
            truth = _gradient(copy.deepcopy(network).double(), ids)
            network.to(device)
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
                is_bf16 = dtype == torch.bfloat16
                with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
                    found = _gradient(network, ids.to(device))
                bound = _ROUNDOFF[dtype] * _IN_A_ROW / (8 if is_bf16 else 1)
                for what, ours, theirs in zip(("loss", "gradient"), found, truth, strict=True):
                    checks.add(f"{family}, {kind}, {name}, {what}", ours, theirs, bound)


def _recomputation(checks: Checks, device: torch.device, width: int) -> None:
    """Recomputed gradients are equal to the bit, with dropout too."""
    ids = _ids().to(device)
    for dropout in (0.0, 0.1):
        network = _built(_shapes(width)["gpt2"], width // 3, dropout).to(device).train()
        ways = [*Recompute, OFFLOAD]
        found = {}
        with _deterministic():
            for way in ways:
                recompute_blocks(network, way)
                torch.manual_seed(SEED)
                found[str(way)] = _gradient(network, ids)[1]
        for way in ways[1:]:
            checks.add(
                f"recompute {way}, dropout {dropout:g}", found[str(way)], found[str(ways[0])], 0.0
            )


@contextmanager
def _deterministic() -> Iterator[None]:
    """Within it sums on the device are made in one order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _optimizers(checks: Checks, device: torch.device, width: int) -> None:
    """Three steps of equal gradients."""
    stream = torch.Generator().manual_seed(SEED)
    shapes = [(width // 3, width), (2 * width, width // 3)]
    start = [torch.randn(shape, generator=stream) for shape in shapes]
    gradients = [[torch.randn(shape, generator=stream) for shape in shapes] for _ in range(3)]
    kinds: dict[str, Callable[[list[nn.Parameter]], Any]] = {
        "Spectron": lambda factors: Spectron([{"params": factors, "is_low_rank": True}], lr=0.05),
        "LoRA-Muon": lambda factors: LoRAMuon([{"params": factors, "is_low_rank": True}], lr=0.05),
        "AdamW, fused": partial(torch.optim.AdamW, lr=0.05, fused=True),
    }
    for name, make in kinds.items():
        moved = []
        for dtype, place in ((torch.float32, device), (torch.float64, torch.device("cpu"))):
            factors = [nn.Parameter(x.to(place, dtype, copy=True)) for x in start]
            optimizer = make(factors)
            for step in gradients:
                for parameter, gradient in zip(factors, step, strict=True):
                    parameter.grad = gradient.to(place, dtype)
                optimizer.step()
            moved.append(
                [p.detach().cpu().double() - x for p, x in zip(factors, start, strict=True)]
            )
        for part, ours, truth in zip(("down", "up"), *moved, strict=True):
            # Five orthogonalizing steps on Gram matrices multiply an error up to 20,000 times.
            bound = 2e-3 if name != "AdamW, fused" else 1e-4
            checks.add(f"{name}, {part}", ours, truth, bound)


def _packed(checks: Checks, device: torch.device) -> None:
    """Prompts one behind the other beside each alone."""
    sizes = RandomLlama(num_layers=2, num_positions=64)
    network = random_llama(
        sizes, _VOCABULARY, 0, dtype=torch.float32, device=device, quantize=None, seed=SEED
    )
    network.requires_grad_(False).eval()
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5], list(range(20))]
    alone = [
        network.base_model(torch.tensor([p], device=device), use_cache=False).last_hidden_state[
            0, -1
        ]
        for p in prompts
    ]
    use_packed_attention(network)
    packed = run_packed_prompts(network, prompts).hidden
    bound = _ROUNDOFF[torch.float32] * _IN_A_ROW
    checks.add("packed prompts", packed, torch.stack(alone), bound)


def _quantized(checks: Checks, device: torch.device, width: int) -> None:
    """Quantized products beside those of the numbers that the codes stand for, odd rows too."""
    methods = ["int8", "nf4"]
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        methods.remove("nf4")
        checks.found["nf4"] = "not checked: bitsandbytes is not installed"
    for method in methods:
        for out_features in (width, width + 5):
            for dtype in (torch.float32, torch.bfloat16):
                stream = torch.Generator().manual_seed(SEED)
                dense = nn.Linear(width, out_features)
                with torch.no_grad():
                    dense.weight.normal_(generator=stream)
                layer = quantized_layer(dense.to(dtype), method, device)
                x = torch.randn(7, width, generator=stream).to(dtype)
                values = layer.values(torch.float64).cpu()
                truth = x.double() @ values.T + dense.bias.double().cpu()
                name = f"{method}, {out_features} rows, {str(dtype).removeprefix('torch.')}"
                checks.add(name, layer(x.to(device)), truth, _ALONE * _ROUNDOFF[dtype])


class Batches(LightningDataModule):
    """The same rows in every step.

    Args:
        num_steps: Number of batches.
        num_rows: Rows per batch.
        num_tokens: Tokens per row.
    """

    def __init__(self, num_steps: int, num_rows: int = 2, num_tokens: int = 32) -> None:
        super().__init__()
        stream = torch.Generator().manual_seed(SEED)
        self.vocabulary_size, self.eos_token_id = _VOCABULARY, 0
        self.block_length, self._num_steps = num_tokens, num_steps
        ids = torch.randint(_VOCABULARY, (num_rows, num_tokens + 1), generator=stream)
        self._batch = TokenBatch(input_ids=ids[:, :-1], labels=ids[:, 1:].clone())

    def tokenizer_reference(self) -> dict[str, str | int]:
        """A reference that is always the same."""
        return {"name_or_path": "none", "sha256": "0", "vocabulary_size": _VOCABULARY}

    @override
    def on_before_batch_transfer(self, batch: TokenBatch, dataloader_idx: int) -> TokenBatch:
        module: Any = None if self.trainer is None else self.trainer.lightning_module
        return module.prepared(batch) if hasattr(module, "prepared") else batch

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        batches: Any = [self._batch] * self._num_steps
        return DataLoader(batches, batch_size=None)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        batches: Any = [self._batch]
        return DataLoader(batches, batch_size=None)


def trainer_on(device: torch.device, **options: Any) -> Trainer:
    """A trainer of one device that writes nothing but what ``options`` have it write."""
    settings: dict[str, Any] = {
        "accelerator": device.type, "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0,
        "limit_val_batches": 0, "gradient_clip_val": 1.0, "max_epochs": -1,
    }  # fmt: skip
    return Trainer(**(settings | options))


_RECIPES: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Spectron": {"optimizer": "spectron", "initialization": "orthogonal"},
    "LoRA-Muon, mixed embedding": {"optimizer": "lora_muon", "embedding_optimizer": "mixed"},
    "dense, Spectron": {"rank": None, "optimizer": "spectron", "spectron_dense": True},
}


def training(device: torch.device, is_toy: bool, note: Note) -> None:
    """Fit beside float64 on the CPU, resume beside no stop, finetuning, scoring, generation."""
    checks = Checks(note)
    width = 64 if is_toy else 128
    sizes: dict[str, Any] = {
        "preset": "gpt2-nano", "num_layers": 2, "width": width, "num_heads": 4,
        "num_positions": 32, "rank": width // 4, "embedding_rank": width // 4,
        "learning_rate": 0.002, "warmup": 1, "vocab_size": _VOCABULARY,
    }  # fmt: skip

    def fitted(on: torch.device, recipe: dict[str, Any], **options: Any) -> Tensor:
        lightning.seed_everything(SEED, verbose=False)
        module = LowRankPretraining(**(sizes | recipe))
        module.configure_model()  # in float32 everywhere: float64 would be drawn otherwise
        ckpt_path = options.pop("ckpt_path", None)
        trainer_on(on, max_steps=4, **options).fit(
            module, datamodule=Batches(4), ckpt_path=ckpt_path, weights_only=True
        )
        return torch.cat([p.detach().cpu().flatten() for p in module.parameters()])

    for name, recipe in _RECIPES.items():
        truth = fitted(torch.device("cpu"), recipe, precision="64-true")
        for precision, bound in (("32-true", 2e-3), ("bf16-mixed", 0.1)):
            found = fitted(device, recipe, precision=precision)
            checks.add(f"{name}, {precision}, weights after 4 steps", found, truth, bound)
    with tempfile.TemporaryDirectory() as folder, _deterministic():
        path = Path(folder)
        saving = ModelCheckpoint(path, "{step}", every_n_train_steps=2, save_top_k=-1)
        options: dict[str, Any] = {
            "enable_checkpointing": True, "callbacks": [saving], "default_root_dir": path,
        }  # fmt: skip
        whole = fitted(device, _RECIPES["Spectron"], **options)
        resumed = fitted(device, _RECIPES["Spectron"], ckpt_path=path / "step=2.ckpt")
        checks.add("resumed beside not stopped", resumed, whole, 0.0)
    _finetuning(checks, device)
    network = _built(_shapes(64)["llama"], None).to(device).eval().requires_grad_(False)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]
    written = decode(network, prompts, 8, end_tokens=[])
    plain = [_greedy(network, prompt, 8) for prompt in prompts]
    checks.add("generated tokens", _flat(written), _flat(plain), 0.0)


def _finetuning(checks: Checks, device: torch.device) -> None:
    """The adapters' loss falls on one batch; on a base in NF4 where bitsandbytes is installed."""
    quantize: Literal["nf4"] | None = "nf4"
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        quantize = None
    lightning.seed_everything(SEED, verbose=False)
    module = QuantizedFinetuning(
        random_base=RandomLlama(num_layers=2, num_positions=64),
        rank=4,
        quantize=quantize,
        learning_rate=0.01,
        warmup=1,
    )
    losses: list[float] = []

    class Losses(lightning.Callback):
        @override
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_on(device, max_steps=6, default_root_dir=folder, callbacks=[Losses()])
        trainer.fit(module, datamodule=Batches(6))
    name = f"finetuning on {quantize or 'an unquantized base'}, last loss over the first"
    checks.found[name] = {"error": losses[-1] / losses[0], "bound": 0.99}


def _greedy(network: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        logits = network(torch.tensor([tokens], device=network.device), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def _flat(rows: Any) -> Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=torch.float64)
