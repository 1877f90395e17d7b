import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fingpt_lightning.planning.fake_step import (
    StepBytes,
    count_step,
    fake_batch,
    fake_parameters,
    with_more_blocks,
)
from fingpt_lightning.profiling.memory import LiveTensorBytes


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(11, 22), nn.GELU(), nn.Linear(22, 7))


def test_a_fake_step_counts_what_a_real_one_holds() -> None:
    network, x = _network(), torch.randn(13, 11)
    with LiveTensorBytes() as real:
        start = network(x).square().sum()
    live = real.live_bytes
    mode = FakeTensorMode()
    fake_parameters(network, mode, None)
    given = fake_batch({"x": x}, mode)["x"]
    step = count_step(
        lambda: network(given), lambda y: y.square().sum(), mode, contextlib.nullcontext()
    )
    assert start.ndim == 0
    assert step.activations == pytest.approx(live, rel=0.02)
    assert step.peak >= step.activations


def test_tied_parameters_stay_one_and_need_no_memory() -> None:
    with torch.device("meta"):
        embedding, head = nn.Embedding(10**9, 64), nn.Linear(64, 10**9, bias=False)
    head.weight = embedding.weight
    network = nn.ModuleList([embedding, head])
    mode = FakeTensorMode()
    fake_parameters(network, mode, torch.bfloat16)
    (parameter,) = network.parameters()
    assert parameter.shape == (10**9, 64)
    assert parameter.dtype == torch.bfloat16
    assert parameter.device.type == "cpu"
    assert isinstance(parameter, nn.Parameter)


def test_the_loss_is_told_apart_from_the_body() -> None:
    network = nn.Linear(11, 11)
    mode = FakeTensorMode()
    fake_parameters(network, mode, None)
    x = fake_batch(torch.randn(5, 11), mode)

    def loss(hidden: Tensor) -> Tensor:
        wide = hidden.detach()[..., None].expand(-1, -1, 1000).contiguous()
        return hidden.sum() + wide[0, 0, 0]

    step = count_step(lambda: network(x), loss, mode, contextlib.nullcontext())
    assert step.loss >= 5 * 11 * 1000 * 4
    assert step.activations < step.loss


def test_deeper_networks_are_counted_from_shallow_ones() -> None:
    def steps(num_blocks: int) -> StepBytes:
        blocks = [nn.Sequential(nn.Linear(11, 11), nn.GELU()) for _ in range(num_blocks)]
        network = nn.Sequential(*blocks)
        mode = FakeTensorMode()
        fake_parameters(network, mode, None)
        x = fake_batch(torch.randn(64, 11), mode)
        return count_step(lambda: network(x), torch.sum, mode, contextlib.nullcontext())

    assert with_more_blocks(steps(2), steps(3), 9) == steps(9)
