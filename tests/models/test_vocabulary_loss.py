from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fingpt_lightning.low_rank import LowRankEmbedding, LowRankHead
from fingpt_lightning.low_rank.embedding import HeadFactors
from fingpt_lightning.models import vocabulary_loss
from fingpt_lightning.models.vocabulary_loss import (
    _SOFTMAX_BYTES,
    CHUNK_BYTES,
    _multiplied,
    add_outer_,
    rows_per_softmax,
    tokens_per_chunk,
)
from tests.support.numerics import assert_no_worse

VOCABULARY, WIDTH = 23, 7


def _heads(dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    torch.manual_seed(5)
    embedding = LowRankEmbedding(VOCABULARY, WIDTH, rank=3)
    return [
        LowRankHead(embedding).to(dtype),
        nn.Linear(WIDTH, VOCABULARY, bias=False).to(dtype),
    ]


class _Given(nn.Module):
    """A head that is given the operands of its last product."""

    def __init__(self, features: Tensor, weight: nn.Parameter) -> None:
        super().__init__()
        self._factors = HeadFactors(features, weight)

    def factors(self, hidden: Tensor) -> HeadFactors:
        return self._factors


def _labels() -> Tensor:
    labels = torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))
    labels[0, 3:6] = -100
    labels[1, 10] = -100
    return labels


def _plain(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")


@pytest.mark.parametrize("softmax_rows", [3, 1000])
@pytest.mark.parametrize("chunk_size", [1, 5, 11, 22, 500, None])
@pytest.mark.parametrize("which", [0, 1], ids=["low_rank", "dense"])
def test_loss_and_gradients_equal_the_plain_way(
    chunk_size: int | None, which: int, softmax_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_SOFTMAX_BYTES, "cpu", softmax_rows * VOCABULARY * 8)
    head, labels = _heads()[which], _labels()
    results = []
    for chunked in (False, True):
        hidden = torch.randn(
            2, 11, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
        ).requires_grad_()
        head.zero_grad()
        if chunked:
            loss, num_tokens = vocabulary_loss(head, hidden, labels, chunk_size)
            assert num_tokens == 18
        else:
            loss = _plain(head, hidden, labels)
        (loss / 3).backward()
        results.append([loss.detach(), hidden.grad, *(p.grad for p in head.parameters())])
    for ours, plain in zip(*reversed(results), strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_no_supervised_token_gives_zero_loss_and_gradient() -> None:
    head = _heads()[0]
    hidden = torch.randn(1, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    loss, num_tokens = vocabulary_loss(head, hidden, torch.full((1, 4), -100))
    loss.backward()
    assert loss == 0
    assert num_tokens == 0
    assert hidden.grad is not None
    assert hidden.grad.count_nonzero() == 0


def test_bfloat16_autocast_is_as_near_the_truth_as_the_plain_way() -> None:
    head, labels = _heads(torch.float32)[1], _labels()
    gradients: list[list[Tensor]] = []
    for way in ("truth", "plain", "ours"):
        dtype = torch.float64 if way == "truth" else torch.float32
        hidden = torch.randn(2, 11, WIDTH, generator=torch.Generator().manual_seed(2))
        hidden = hidden.to(dtype).requires_grad_()
        head.to(dtype).zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=way != "truth"):
            if way == "ours":
                loss = vocabulary_loss(head, hidden, labels, 5).loss_sum
            else:
                loss = _plain(head, hidden, labels)
        loss.backward()
        found = [hidden.grad, *(p.grad for p in head.parameters())]
        gradients.append([loss.detach(), *(g for g in found if g is not None)])
    compared = list(zip(*gradients, strict=True))
    assert len(compared) == 3
    for truth, plain, ours in compared:
        assert_no_worse(ours, plain=plain, truth=truth.double())


@pytest.mark.parametrize("which", [0, 1], ids=["low_rank", "dense"])
def test_a_weight_that_is_cast_is_padded_and_changes_neither_loss_nor_gradients(which: int) -> None:
    # Float64 products of a float32 weight: exact, so that rows of zeros can be seen to add nothing.
    head, labels = _heads(torch.float32)[which], _labels()
    drawn = torch.randn(2, 11, WIDTH, generator=torch.Generator().manual_seed(2))
    results = []
    for chunk_size in (0, 5, None):
        hidden = drawn.double().requires_grad_()
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            if chunk_size == 0:
                wide = [p.detach().double().requires_grad_() for p in head.parameters()]
                logits = hidden @ wide[0].T if which else hidden @ wide[1] @ wide[0].T
                loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
                loss.backward()
                gradients = [p.grad for p in wide]
            else:
                weight = next(head.parameters())
                features = hidden if which else hidden @ head.get_parameter("up").double()
                loss = vocabulary_loss(_Given(features, weight), hidden, labels, chunk_size)[0]
                loss.backward()
                gradients = [p.grad for p in head.parameters()]
        results.append([loss.detach(), hidden.grad, *gradients])
    plain = results.pop(0)
    for found in results:
        for ours, theirs in zip(found, plain, strict=True):
            assert ours is not None
            assert theirs is not None
            is_float32 = ours.dtype == torch.float32  # of a float32 parameter, rounded once
            tolerance = 1e-6 if is_float32 else 1e-12
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_the_sides_of_products_in_16_bits_are_round() -> None:
    weight = torch.randn(VOCABULARY, WIDTH)
    padded = _multiplied(weight, torch.bfloat16)
    assert padded.shape == (64, WIDTH)
    assert torch.equal(padded[:VOCABULARY], weight.bfloat16())
    assert padded[VOCABULARY:].count_nonzero() == 0
    assert _multiplied(weight, torch.float32) is weight


@given(
    vocab_size=st.integers(1, 300_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    device_type=st.sampled_from(["cpu", "cuda", "mps"]),
)
def test_a_chunk_holds_as_many_tokens_as_its_bytes_allow(
    vocab_size: int, dtype: torch.dtype, device_type: str
) -> None:
    allowed = CHUNK_BYTES["cpu" if device_type == "cpu" else "cuda"]
    largest = allowed // (vocab_size * dtype.itemsize)
    chunks = (largest, vocab_size, dtype, device_type)
    assert tokens_per_chunk(None, *chunks) == largest
    assert tokens_per_chunk(None, largest + 1, *chunks[1:]) == -(-(largest + 1) // 2), "even"
    assert tokens_per_chunk(None, 0, *chunks[1:]) == 1
    assert tokens_per_chunk(7, *chunks) == 7


def test_temporaries_of_a_softmax_are_bounded_on_a_gpu() -> None:
    num_rows = rows_per_softmax(50257, torch.float32, "cuda")
    assert 132 < num_rows < 400


def test_the_weights_gradient_is_summed_in_float32_on_a_gpu() -> None:
    products = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ == "mm":
                products.append(result.dtype)
            return result

    with FakeTensorMode(), Watch():  # type: ignore[no-untyped-call]
        for device in ("cuda", "cpu"):
            grad, features = (
                torch.empty(4, size, dtype=torch.bfloat16, device=device) for size in (9, 5)
            )
            add_outer_(torch.empty(9, 5, device=device), grad, features)
    assert products == [torch.float32, torch.bfloat16]


def test_without_gradients_none_is_made() -> None:
    head, labels = _heads()[0], _labels()
    hidden = torch.randn(2, 11, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        loss, _ = vocabulary_loss(head, hidden, labels, 4)
        torch.testing.assert_close(loss, _plain(head, hidden, labels))


def test_a_chunk_of_no_token_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk_size 0 is below 1"):
        vocabulary_loss(
            _heads()[0], torch.zeros(1, 1, WIDTH), torch.zeros(1, 1, dtype=torch.long), 0
        )
