import mmap
import sys

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from fingpt_lightning.models.quantization.layers import quantized_layer
from fingpt_lightning.profiling import (
    LiveTensorBytes,
    module_memory,
    peak_rss_bytes,
    reset_peak_rss,
    storage_bytes,
)

_BATCH, _IN, _HIDDEN, _OUT, _FLOAT = 7, 11, 13, 5, 4


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(_IN, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _OUT))


def test_before_backward_an_mlp_keeps_what_its_derivatives_need() -> None:
    mlp, x = _mlp(), torch.randn(_BATCH, _IN)
    with LiveTensorBytes() as count:
        loss = mlp(x).square().sum()
    relu_output = _BATCH * _HIDDEN
    square_input = _BATCH * _OUT
    assert count.live_bytes == _FLOAT * (relu_output + square_input + loss.numel())
    # Before it is freed, the output of the first layer stands beside that of ReLU.
    assert count.peak_bytes == _FLOAT * (2 * relu_output)


def test_after_backward_gradients_alone_live() -> None:
    mlp, x = _mlp(), torch.randn(_BATCH, _IN)
    with LiveTensorBytes() as count:
        loss = mlp(x).square().sum()
        loss.backward()
        del loss
    assert count.live_bytes == module_memory(mlp).gradients
    assert count.live_bytes == _FLOAT * sum(p.numel() for p in mlp.parameters())


def test_activation_checkpointing_keeps_the_inputs_of_its_parts_only() -> None:
    mlp, x = _mlp(), torch.randn(_BATCH, _IN)
    with LiveTensorBytes() as plain:
        whole = mlp(x)
    with LiveTensorBytes() as recomputed:
        again = checkpoint(mlp, x, use_reentrant=False, preserve_rng_state=False)
    assert plain.live_bytes == _FLOAT * _BATCH * (_HIDDEN + _OUT)
    assert recomputed.live_bytes == _FLOAT * _BATCH * _OUT
    assert torch.equal(whole, again)


def test_deaths_after_the_mode_are_counted_and_later_births_are_not() -> None:
    with LiveTensorBytes() as count:
        x = torch.zeros(_BATCH)
    y = x + 1
    assert count.live_bytes == _FLOAT * _BATCH
    del x
    assert count.live_bytes == 0
    assert y.numel() == _BATCH


def test_views_of_older_tensors_and_in_place_operations_add_nothing() -> None:
    x = torch.zeros(_BATCH, _IN)
    with LiveTensorBytes() as count:
        y = x.T[2:].add_(1).detach()
    assert count.live_bytes == 0
    assert y.sum() == _BATCH * (_IN - 2)


def test_a_resized_storage_counts_with_its_new_size() -> None:
    with LiveTensorBytes() as count:
        x = torch.empty(_BATCH)
        x.resize_(100 * _BATCH)
    assert count.live_bytes == storage_bytes([x]) == 100 * _FLOAT * _BATCH


def test_tensors_made_from_python_numbers_count() -> None:
    with LiveTensorBytes() as count:
        x = torch.tensor([1.0, 2.0, 3.0])
    assert count.live_bytes == storage_bytes([x])


def test_the_mode_leaves_the_numbers_alone() -> None:
    mlp, x = _mlp(), torch.randn(_BATCH, _IN)
    plain = torch.autograd.grad(mlp(x).square().sum(), list(mlp.parameters()))
    with LiveTensorBytes():
        counted = torch.autograd.grad(mlp(x).square().sum(), list(mlp.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, counted, strict=True))


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    dropped=st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_live_bytes_are_those_of_the_tensors_at_hand(sizes: list[int], dropped: list[bool]) -> None:
    with LiveTensorBytes() as count:
        tensors = [torch.zeros(size) for size in sizes]
        kept = [t for t, drop in zip(tensors, dropped, strict=False) if not drop]
        views = [t.view(1, -1) for t in kept]
        del tensors
        assert count.live_bytes == storage_bytes([*kept, *views])
    assert count.peak_bytes == _FLOAT * sum(sizes)


@pytest.mark.gpu
def test_live_bytes_agree_with_the_allocator_of_cuda() -> None:
    mlp = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128)).cuda()
    x = torch.randn(1024, 256, device="cuda")
    mlp(x).sum().backward()  # the library's workspaces are allocated by now
    before = torch.cuda.memory_allocated()
    with LiveTensorBytes() as count:
        loss = mlp(x).square().sum()
    allocated = torch.cuda.memory_allocated() - before
    assert 0 <= allocated - count.live_bytes <= 512 * 4  # blocks are rounded up to 512 bytes
    assert loss.numel() == 1


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_IN, _HIDDEN)
        self.head = nn.Linear(_HIDDEN, _IN, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.ones(_IN, _IN, dtype=torch.bool))

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(ids))
        return logits


def test_tied_weights_count_once_in_every_part() -> None:
    module = _Tied()
    optimizer = torch.optim.AdamW(module.parameters())
    table = _FLOAT * _IN * _HIDDEN
    assert module_memory(module, optimizer) == (table + _IN * _IN, 0, 0)
    module(torch.arange(_IN)).sum().backward()
    optimizer.step()
    step_counter = _FLOAT
    assert module_memory(module, optimizer) == (
        table + _IN * _IN,
        table,
        2 * table + step_counter,
    )
    assert module_memory(module).optimizer == 0


def test_of_a_sharded_tensor_the_local_shard_counts() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        sharded = distribute_tensor(torch.zeros(6, _IN), mesh, [Shard(0)])
        assert storage_bytes([sharded]) == _FLOAT * 3 * _IN
    finally:
        dist.destroy_process_group()


def test_state_in_nested_containers_counts() -> None:
    parameter = nn.Parameter(torch.zeros(_BATCH))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter] = {"history": [torch.zeros(3), (torch.zeros(2), 1)]}
    assert module_memory(nn.Module(), optimizer).optimizer == _FLOAT * 5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
def test_the_peak_of_the_process_follows_an_allocation_and_can_begin_anew() -> None:
    if not reset_peak_rss():
        pytest.skip("this container forbids to reset the peak")
    before = peak_rss_bytes()
    # Mapped for itself: the allocator may keep what a tensor frees, or have it from another test.
    mapping = mmap.mmap(-1, _FLOAT * 2**24)
    held = torch.frombuffer(mapping, dtype=torch.float32).fill_(1)
    with_it = peak_rss_bytes()
    assert with_it - before >= 0.9 * storage_bytes([held])
    del held
    mapping.close()
    assert peak_rss_bytes() >= 0.99 * with_it  # the kernel's counters lag by some pages
    assert reset_peak_rss()
    assert peak_rss_bytes() <= with_it - 0.9 * _FLOAT * 2**24


def test_without_a_proc_file_system_the_peak_is_that_of_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(
        "fingpt_lightning.profiling.memory._PROCESS", tmp_path_factory.getbasetemp() / "missing"
    )
    assert not reset_peak_rss()
    assert peak_rss_bytes() > 10 * 2**20


@pytest.mark.parametrize(("quantize", "bytes_each"), [("nf4", 0.5 + 1 / 64), ("int8", 1.0)])
def test_scales_of_a_quantised_weight_count_as_weights(quantize: str, bytes_each: float) -> None:
    dense = nn.Linear(512, 256, bias=False)
    layer = quantized_layer(dense, quantize, torch.device("cpu"))
    codes = storage_bytes(layer.parameters())
    weights = module_memory(layer).weights
    assert codes < weights
    # The scales of NF4's scales, and its table of 256 values, come on top; int8 has one a row.
    assert bytes_each <= weights / dense.weight.numel() < bytes_each + 0.03
