import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fingpt_lightning.low_rank import LowRankEmbedding, LowRankHead
from fingpt_lightning.models import vocabulary_loss
from tests.support.numerics import assert_no_worse

VOCABULARY, WIDTH = 23, 7


def _heads(dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    torch.manual_seed(5)
    embedding = LowRankEmbedding(VOCABULARY, WIDTH, rank=3)
    return [
        LowRankHead(embedding).to(dtype),
        nn.Linear(WIDTH, VOCABULARY, bias=False).to(dtype),
    ]


def _labels() -> Tensor:
    labels = torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))
    labels[0, 3:6] = -100
    labels[1, 10] = -100
    return labels


def _plain(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")


@pytest.mark.parametrize("softmax_rows", [3, 1000])
@pytest.mark.parametrize("chunk_size", [1, 5, 11, 22, 500])
@pytest.mark.parametrize("which", [0, 1], ids=["low_rank", "dense"])
def test_loss_and_gradients_equal_the_plain_way(
    chunk_size: int, which: int, softmax_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[vocabulary_loss.__module__]
    monkeypatch.setattr(module, "_SOFTMAX_BYTES", softmax_rows * VOCABULARY * 8)
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
