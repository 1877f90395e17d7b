import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fingpt_lightning.low_rank import LowRankEmbedding, LowRankHead
from fingpt_lightning.models.distillation_loss import DistillationHead, distillation_loss
from fingpt_lightning.models.vocabulary_loss import _SOFTMAX_BYTES
from fingpt_lightning.profiling.memory import LiveTensorBytes
from tests.support.numerics import assert_no_worse

VOCABULARY, WIDTH, TEACHER_WIDTH = 23, 7, 5


def _heads(dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    torch.manual_seed(5)
    embedding = LowRankEmbedding(VOCABULARY, WIDTH, rank=3)
    return [
        LowRankHead(embedding).to(dtype),
        nn.Linear(WIDTH, VOCABULARY, bias=False).to(dtype),
    ]


def _teacher_head(dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(6)
    return nn.Linear(TEACHER_WIDTH, VOCABULARY).to(dtype)


def _drawn(width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return 3 * torch.randn(2, 11, width, dtype=torch.float64, generator=generator).to(dtype)


def _labels() -> Tensor:
    labels = torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))
    labels[0, 3:6] = -100
    labels[1, 10] = -100
    return labels


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _plain(
    student: DistillationHead,
    teacher: DistillationHead,
    labels: Tensor,
    weight: float,
    temperature: float,
) -> Tensor:
    kept = labels != -100
    logits = _capped(student.head(student.hidden), student.softcap)[kept]
    teacher_logits = _capped(teacher.head(teacher.hidden), teacher.softcap)[kept].detach()
    p = F.softmax(teacher_logits / temperature, -1)
    log_q = F.log_softmax(logits / temperature, -1)
    divergence = (p * (p.log() - log_q)).sum()
    cross_entropy = F.cross_entropy(logits, labels[kept], reduction="sum")
    return weight * temperature**2 * divergence + (1 - weight) * cross_entropy


@pytest.mark.parametrize("which", [0, 1], ids=["low_rank", "dense"])
@pytest.mark.parametrize(
    ("weight", "temperature", "cap", "teacher_cap"),
    [(1.0, 1.0, None, None), (0.3, 1.0, 2.0, None), (0.7, 2.5, None, 1.5), (0.0, 1.0, None, None)],
)
@pytest.mark.parametrize(("chunk_size", "softmax_rows"), [(1, 3), (5, 3), (11, 1000), (None, 4)])
def test_loss_and_gradients_equal_the_plain_way(
    chunk_size: int | None,
    softmax_rows: int,
    weight: float,
    temperature: float,
    cap: float | None,
    teacher_cap: float | None,
    which: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(_SOFTMAX_BYTES, "cpu", softmax_rows * VOCABULARY * 8)
    head, labels = _heads()[which], _labels()
    teacher = DistillationHead(_teacher_head(), _drawn(TEACHER_WIDTH), teacher_cap)
    results = []
    for chunked in (False, True):
        hidden = _drawn(WIDTH).requires_grad_()
        student = DistillationHead(head, hidden, cap)
        head.zero_grad()
        if chunked:
            loss, num_tokens = distillation_loss(
                student, teacher, labels, weight, temperature, chunk_size
            )
            assert num_tokens == 18
        else:
            loss = _plain(student, teacher, labels, weight, temperature)
        (loss / 3).backward()
        results.append([loss.detach(), hidden.grad, *(p.grad for p in head.parameters())])
    assert teacher.head.weight.grad is None
    for ours, plain in zip(*reversed(results), strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_a_teacher_that_rules_tokens_out_gives_finite_numbers() -> None:
    head, labels = _heads()[1], _labels()
    teacher_head = _teacher_head()
    nn.init.constant_(teacher_head.bias[:3], -torch.inf)
    hidden = _drawn(WIDTH).requires_grad_()
    loss, _ = distillation_loss(
        DistillationHead(head, hidden),
        DistillationHead(teacher_head, _drawn(TEACHER_WIDTH)),
        labels,
    )
    loss.backward()
    assert hidden.grad is not None
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()


def test_in_lower_precision_it_is_no_worse_than_the_plain_way() -> None:
    truth_head, truth_teacher, labels = _heads()[1], _teacher_head(), _labels()
    truth_hidden = _drawn(WIDTH).requires_grad_()
    truth = _plain(
        DistillationHead(truth_head, truth_hidden),
        DistillationHead(truth_teacher, _drawn(TEACHER_WIDTH)),
        labels, 0.6, 2.0,
    )  # fmt: skip
    truth.backward()
    found = []
    for chunked in (True, False):
        head, teacher_head = _heads(torch.float32)[1], _teacher_head(torch.float32)
        hidden = _drawn(WIDTH, torch.float32).requires_grad_()
        student = DistillationHead(head, hidden)
        teacher = DistillationHead(teacher_head, _drawn(TEACHER_WIDTH, torch.float32))
        if chunked:
            loss = distillation_loss(student, teacher, labels, 0.6, 2.0, 5).loss_sum
        else:
            loss = _plain(student, teacher, labels, 0.6, 2.0)
        loss.backward()
        assert hidden.grad is not None
        found.append((loss.detach()[None], hidden.grad))
    assert truth_hidden.grad is not None
    for ours, plain, exact in zip(*found, (truth.detach()[None], truth_hidden.grad), strict=True):
        assert_no_worse(ours, plain=plain, truth=exact, slack=1.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_size": 0}, "chunk_size 0 is below 1"),
        ({"weight": 1.5}, r"weight 1\.5 is outside \[0, 1\]"),
        ({"temperature": 0.0}, r"temperature 0\.0 is not above 0"),
    ],
)
def test_a_setting_outside_its_range_is_refused(settings: dict[str, float], message: str) -> None:
    side = DistillationHead(_heads()[1], _drawn(WIDTH))
    with pytest.raises(ValueError, match=message):
        distillation_loss(side, side, _labels(), **settings)  # type: ignore[arg-type]


def test_logits_of_one_chunk_of_each_network_are_held() -> None:
    vocab_size, chunk_size = 40_000, 8
    student = nn.Linear(WIDTH, vocab_size, bias=False)
    teacher = nn.Linear(TEACHER_WIDTH, vocab_size)
    hidden = [_drawn(width, torch.float32).requires_grad_() for width in (WIDTH, TEACHER_WIDTH)]
    with LiveTensorBytes() as count:
        distillation_loss(
            DistillationHead(student, hidden[0]),
            DistillationHead(teacher, hidden[1]),
            _labels(),
            chunk_size=chunk_size,
        ).loss_sum.backward()
    logits, gradient = 4 * chunk_size * vocab_size, 4 * WIDTH * vocab_size
    # A softmax's temporaries are five more here, where it takes all rows of a chunk at once.
    assert 7 * logits < count.peak_bytes - gradient < 8 * logits
