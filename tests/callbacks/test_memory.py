from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from typing_extensions import override

from callbacks.memory import MemoryMonitor
from fingpt_lightning.profiling import LiveTensorBytes, module_memory
from fingpt_lightning.units import MIB
from tests.callbacks.tiny_run import (
    BLOCK,
    VOCABULARY,
    WIDTH,
    Batch,
    TinyModule,
    fit,
    logged_rows,
    make_batch,
    tiny_trainer,
)

_KEYS = {
    "memory/peak_rss_mib",
    "memory/weights_mib",
    "memory/gradients_mib",
    "memory/optimizer_mib",
    "memory/activations_mib",
}


def _activation_bytes(module: TinyModule, batch: Batch) -> int:
    count = LiveTensorBytes()
    with count:
        loss = module.loss(batch)
    assert loss.numel() == 1
    return count.live_bytes


def test_each_part_is_accounted_in_the_row_of_its_step(tmp_path: Path) -> None:
    module, batch = TinyModule(), make_batch()
    fit(tiny_trainer(tmp_path, [MemoryMonitor()]), module, [batch] * 3)
    rows = logged_rows(tmp_path)
    assert len(rows) == 3
    for row in rows:
        assert row.keys() >= _KEYS | {"train/loss"}
    weights = 4 * sum(p.numel() for p in module.parameters())
    assert rows[0]["memory/weights_mib"] == pytest.approx(weights / MIB)
    assert rows[0]["memory/gradients_mib"] == pytest.approx(weights / MIB)
    num_tensors = len(list(module.parameters()))
    optimizer_bytes = 2 * weights + 4 * num_tensors
    assert rows[0]["memory/optimizer_mib"] == pytest.approx(optimizer_bytes / MIB)
    assert all(row["memory/peak_rss_mib"] > 10 for row in rows)


def test_activations_are_what_the_forward_pass_leaves_for_the_backward(tmp_path: Path) -> None:
    module, batch = TinyModule(), make_batch()
    expected = _activation_bytes(module, batch)
    fit(tiny_trainer(tmp_path, [MemoryMonitor()]), module, [batch] * 3)
    counted = [row["memory/activations_mib"] * MIB for row in logged_rows(tmp_path)]
    assert len(counted) == 3
    # Lightning adds a handful of scalars: the loss scaled, detached, logged.
    assert all(expected <= each <= expected + 64 for each in counted)
    tokens = batch["labels"].numel()
    assert expected > 4 * tokens * (2 * WIDTH + VOCABULARY)


def test_another_batch_shape_is_counted_anew_in_a_logged_step_only(tmp_path: Path) -> None:
    module = TinyModule()
    short, long = make_batch(), make_batch(block=3 * BLOCK)
    trainer = tiny_trainer(tmp_path, [MemoryMonitor()], log_every_n_steps=3)
    fit(trainer, module, [short, long, short, short, short, long])
    counted = [row["memory/activations_mib"] * MIB for row in logged_rows(tmp_path)]
    assert counted == [
        pytest.approx(_activation_bytes(module, short), abs=64),
        pytest.approx(_activation_bytes(module, long), abs=64),
    ]


@pytest.mark.parametrize("every_n_steps", [2, 4])
def test_logging_waits_for_the_end_of_an_accumulation(tmp_path: Path, every_n_steps: int) -> None:
    trainer = tiny_trainer(
        tmp_path, [MemoryMonitor()], accumulate_grad_batches=2, log_every_n_steps=every_n_steps
    )
    fit(trainer, TinyModule(), [make_batch()] * 8)
    rows = [row for row in logged_rows(tmp_path) if "memory/weights_mib" in row]
    assert [row["step"] for row in rows] == list(range(every_n_steps - 1, 4, every_n_steps))
    assert all(row["memory/gradients_mib"] == row["memory/weights_mib"] for row in rows)


def test_inside_an_accumulation_nothing_is_logged_again(tmp_path: Path) -> None:
    monitor = MemoryMonitor(every_n_steps=2)
    trainer = tiny_trainer(tmp_path, [monitor], accumulate_grad_batches=2)
    fit(trainer, TinyModule(), [make_batch()] * 8)
    rows = [row for row in logged_rows(tmp_path) if "memory/weights_mib" in row]
    assert [row["step"] for row in rows] == [1, 3]


class _DropGradients(TinyModule):
    """Frees its gradients right after the optimizer step."""

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.zero_grad()

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.zero_grad()


def test_gradients_are_measured_before_the_step_frees_them(tmp_path: Path) -> None:
    module = _DropGradients()
    fit(tiny_trainer(tmp_path, [MemoryMonitor()]), module, [make_batch()] * 2)
    weights = module_memory(module).weights
    assert [row["memory/gradients_mib"] for row in logged_rows(tmp_path)] == [
        pytest.approx(weights / MIB)
    ] * 2


def _fit(tmp_path: Path, callbacks: list[Callback]) -> tuple[list[float], list[Tensor]]:
    torch.manual_seed(0)
    module = TinyModule()
    fit(tiny_trainer(tmp_path, callbacks), module, [make_batch() for _ in range(5)])
    return module.losses, list(module.parameters())


def test_observing_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    plain_losses, plain_weights = _fit(tmp_path / "plain", [])
    losses, weights = _fit(tmp_path / "observed", [MemoryMonitor()])
    assert len(losses) == 5
    assert losses == plain_losses
    assert all(torch.equal(a, b) for a, b in zip(weights, plain_weights, strict=True))


class _CompiledModule(TinyModule):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.num_compiled = 0
        if in_place:
            self.network = _Chain(self.network)
            self.network.compile(backend=self._compile)
        else:
            self.network = torch.compile(self.network, backend=self._compile)

    def _compile(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        self.num_compiled += 1
        return graph.forward


class _Chain(nn.Module):
    # The frames of torch.nn's own classes are not compiled on their own.
    def __init__(self, parts: nn.Module) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.parts(input_ids)
        return logits


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_modules_stay_compiled_and_their_activations_uncounted(
    tmp_path: Path, in_place: bool
) -> None:
    module = _CompiledModule(in_place)
    fit(tiny_trainer(tmp_path, [MemoryMonitor()]), module, [make_batch()] * 2)
    assert module.num_compiled >= 1
    rows = logged_rows(tmp_path)
    assert len(rows) == 2
    assert all(row.keys() & _KEYS == _KEYS - {"memory/activations_mib"} for row in rows)


class _FailingModule(TinyModule):
    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        raise FloatingPointError("loss is nan")


class _SkippingModule(TinyModule):
    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        return None if batch_idx == 0 else super().training_step(batch, batch_idx)


def test_no_dispatch_mode_outlives_a_step_that_fails(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="nan"):
        fit(tiny_trainer(tmp_path, [MemoryMonitor()]), _FailingModule(), [make_batch()])
    assert _get_current_dispatch_mode() is None


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_skipped_step_is_no_trouble(tmp_path: Path) -> None:
    module = _SkippingModule()
    fit(tiny_trainer(tmp_path, [MemoryMonitor()]), module, [make_batch()] * 3)
    assert len(module.losses) == 2
    assert _get_current_dispatch_mode() is None


def test_the_peak_of_the_run_outlives_the_resets_at_each_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = iter([300 * MIB, 300 * MIB, 200 * MIB, 200 * MIB])
    monkeypatch.setattr("callbacks.memory.peak_rss_bytes", lambda: next(peaks, 100 * MIB))
    monitor = MemoryMonitor()
    fit(tiny_trainer(tmp_path, [monitor]), TinyModule(), [make_batch()] * 2)
    assert [row["memory/peak_rss_mib"] for row in logged_rows(tmp_path)] == [300, 200]
    assert monitor.run_peak_bytes() == 300 * MIB


def test_a_rhythm_of_its_own_gets_rows_of_its_own(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [MemoryMonitor(every_n_steps=3)], log_every_n_steps=2)
    fit(trainer, TinyModule(), [make_batch()] * 6)
    rows = logged_rows(tmp_path)
    assert [row["step"] for row in rows if "memory/weights_mib" in row] == [2, 5]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 3, 5]


@pytest.mark.parametrize("every_n_steps", [0, -1])
def test_a_rhythm_below_one_step_is_refused(every_n_steps: int) -> None:
    with pytest.raises(ValueError, match=f"every_n_steps={every_n_steps}"):
        MemoryMonitor(every_n_steps)


@pytest.mark.parametrize("log_every_n_steps", [0, 1])
def test_without_a_logger_or_a_rhythm_nothing_is_written(
    tmp_path: Path, log_every_n_steps: int
) -> None:
    trainer = tiny_trainer(
        tmp_path, [MemoryMonitor()], logger=False, log_every_n_steps=log_every_n_steps
    )
    fit(trainer, TinyModule(), [make_batch()] * 2)
    assert not list(tmp_path.iterdir())


class _Recompute(TinyModule):
    """Keeps only the input of its network, computing the rest again."""

    @override
    def loss(self, batch: Batch) -> Tensor:
        embedding, *rest = self.network
        hidden = embedding(batch["input_ids"])
        logits = torch.utils.checkpoint.checkpoint(
            nn.Sequential(*rest), hidden, use_reentrant=False
        )
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def test_recomputing_is_seen_as_fewer_activations(tmp_path: Path) -> None:
    activations = []
    for module in (TinyModule(), _Recompute()):
        folder = tmp_path / type(module).__name__
        fit(tiny_trainer(folder, [MemoryMonitor()]), module, [make_batch()])
        activations.append(logged_rows(folder)[0]["memory/activations_mib"])
    assert activations[1] < 0.7 * activations[0]


@pytest.mark.gpu
def test_on_cuda_the_allocator_is_asked(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [MemoryMonitor()], accelerator="cuda")
    module = TinyModule()
    batch = make_batch(num_rows=64)
    expected = _activation_bytes(module, batch)
    fit(trainer, module, [batch] * 3)
    last = logged_rows(tmp_path)[-1]
    assert last["memory/peak_reserved_mib"] >= last["memory/peak_allocated_mib"]
    assert last["memory/peak_allocated_mib"] >= sum(
        last[f"memory/{part}_mib"] for part in ("weights", "optimizer", "activations")
    )
    assert last["memory/activations_mib"] * MIB == pytest.approx(expected, rel=0.2, abs=512 * 16)


class _CountModes(Callback):
    """Notes in which steps a dispatch mode is active during the forward pass."""

    def __init__(self) -> None:
        self.counted: list[bool] = []

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.counted.append(_get_current_dispatch_mode() is not None)


def test_equal_batches_are_counted_once_a_run(tmp_path: Path) -> None:
    modes = _CountModes()
    trainer = tiny_trainer(tmp_path, [MemoryMonitor(), modes], max_epochs=2)
    fit(trainer, TinyModule(), [make_batch()] * 3)
    assert modes.counted == [True] + [False] * 5


def test_in_a_pipeline_no_activations_are_logged(tmp_path: Path) -> None:
    module = TinyModule()
    module.__dict__["partial_network"] = object()  # as a strategy makes it
    fit(tiny_trainer(tmp_path, [MemoryMonitor()]), module, [make_batch()])
    (row,) = logged_rows(tmp_path)
    assert row.keys() & _KEYS == _KEYS - {"memory/activations_mib"}
