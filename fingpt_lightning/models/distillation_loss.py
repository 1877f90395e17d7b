"""Divergence from a teacher's predictions, mixed with cross-entropy, without holding all logits.

Axes: N tokens, C tokens of one chunk, R rows of a softmax, K features of a head's last product,
V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fingpt_lightning.low_rank.embedding import head_factors
from fingpt_lightning.models.vocabulary_loss import (
    IGNORED_LABEL,
    LossSums,
    add_outer_,
    rows_per_softmax,
    saved_gradients,
    tokens_per_chunk,
)


class DistillationHead(NamedTuple):
    """One network's side of the loss.

    Args:
        head: Head as `head_factors` takes it, or of a teacher any other.
        hidden: Final hidden states.
        softcap: Bound c of the logits, which are ``c tanh(logits / c)``; None leaves them.
    """

    head: nn.Module
    hidden: Tensor
    softcap: float | None = None


class _Mix(NamedTuple):
    weight: float
    temperature: float


class _ChunkedDistillationSum(torch.autograd.Function):
    """The summed loss; the gradients are made chunk by chunk in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        teacher: DistillationHead,
        labels: Tensor,
        chunk_size: int,
        compute_dtype: torch.dtype,
        softcap: float | None,
        mix: _Mix,
    ) -> Tensor:
        with_features, with_weight = ctx.needs_input_grad[:2]
        wide_dtype = torch.promote_types(compute_dtype, torch.float32)
        weight_VK, features_NK = weight.to(compute_dtype), features.to(compute_dtype)
        loss_sum = features.new_zeros((), dtype=wide_dtype)
        grad_features = torch.empty_like(features_NK) if with_features else None
        grad_weight = torch.zeros_like(weight, dtype=wide_dtype) if with_weight else None
        logits = features_NK.new_empty(min(chunk_size, len(features_NK)), len(weight_VK))
        for first in range(0, len(features_NK), chunk_size):
            chunk = slice(first, first + chunk_size)
            features_CK = features_NK[chunk]
            logits_CV = logits[: len(features_CK)]
            torch.matmul(features_CK, weight_VK.T, out=logits_CV)
            teacher_CV = teacher.head(teacher.hidden[chunk])
            loss_sum += _loss_and_gradient_(
                logits_CV, teacher_CV, labels[chunk], wide_dtype, softcap, teacher.softcap, mix
            )
            del teacher_CV  # before those of the next chunk are made
            grad_CV = logits_CV
            if grad_features is not None:
                torch.matmul(grad_CV, weight_VK, out=grad_features[chunk])
            if grad_weight is not None:
                add_outer_(grad_weight, grad_CV, features_CK)
        ctx.save_for_backward(grad_features, grad_weight)
        ctx.dtypes = features.dtype, weight.dtype
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return *saved_gradients(ctx, grad_output), None, None, None, None, None, None


def _loss_and_gradient_(
    logits_CV: Tensor,
    teacher_CV: Tensor,
    labels_C: Tensor,
    wide_dtype: torch.dtype,
    softcap: float | None,
    teacher_softcap: float | None,
    mix: _Mix,
) -> Tensor:
    """The summed loss; the logits become its gradient with respect to them, in place."""
    num_rows = rows_per_softmax(logits_CV.shape[1], wide_dtype, logits_CV.device.type)
    loss_sum = logits_CV.new_zeros((), dtype=wide_dtype)
    parts = (tensor.split(num_rows) for tensor in (logits_CV, teacher_CV, labels_C))
    weight, temperature = mix
    for rows_RV, teacher_RV, labels_R in zip(*parts, strict=True):
        kept_R1 = (labels_R != IGNORED_LABEL).unsqueeze(1)
        wide_RV = rows_RV.to(wide_dtype)
        capped_RV = None
        if softcap is not None:
            capped_RV = torch.tanh(wide_RV / softcap)
            wide_RV = softcap * capped_RV
        teacher_RV = teacher_RV.to(wide_dtype)
        if teacher_softcap is not None:
            teacher_RV = teacher_softcap * torch.tanh(teacher_RV / teacher_softcap)
        log_t_RV = torch.log_softmax(teacher_RV / temperature, 1)
        log_q_RV = torch.log_softmax(wide_RV / temperature, 1)
        t_RV = log_t_RV.exp()
        # 0 log 0 is 0: a teacher without a token says nothing of it.
        divergence_R = (t_RV * (log_t_RV - log_q_RV)).where(t_RV > 0, 0).sum(1)
        loss_R = weight * temperature**2 * divergence_R
        grad_RV = (log_q_RV.exp() - t_RV).mul_(weight * temperature)
        if weight < 1:
            target_R1 = labels_R.unsqueeze(1).where(kept_R1, 0)
            log_p_RV = log_q_RV if temperature == 1 else torch.log_softmax(wide_RV, 1)
            loss_R -= (1 - weight) * log_p_RV.gather(1, target_R1).squeeze(1)
            grad_RV.add_(log_p_RV.exp(), alpha=1 - weight)
            grad_RV.scatter_add_(1, target_R1, grad_RV.new_full(target_R1.shape, weight - 1))
        loss_sum += loss_R.where(kept_R1.squeeze(1), 0).sum()
        if capped_RV is not None:
            grad_RV *= 1 - capped_RV**2
        torch.mul(grad_RV, kept_R1, out=rows_RV)
    return loss_sum


def distillation_loss(
    student: DistillationHead,
    teacher: DistillationHead,
    labels: Int[Tensor, "*batch"],
    weight: float = 1.0,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> LossSums:
    """Sum of w T^2 KL(teacher || student) + (1 - w) cross-entropy over the supervised positions.

    Both distributions of the divergence are softmaxes of logits over T; T^2 keeps its gradient as
    large as that of the cross-entropy. Equal to the plain way to rounding, gradients included;
    none reach the teacher. Under autocast the products run in the autocast dtype, softmaxes and
    sums in float32. Memory: ``chunk_size`` x V logits of each network in place of N x V.

    Args:
        student: Head as `vocabulary_loss` takes it, and final hidden states.
        teacher: Any head over the same vocabulary, and its own final hidden states.
        labels: Next tokens, aligned with both; -100 where nothing is supervised.
        weight: w, in [0, 1].
        temperature: T, above 0.
        chunk_size: Tokens whose logits are held at a time, at least 1; None takes as many as
            `CHUNK_BYTES` of the vocabulary loss hold.

    Raises:
        ValueError: A setting is outside its range.

    Source: https://arxiv.org/abs/1503.02531, section 2.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} is below 1")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight {weight} is outside [0, 1]")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature {temperature} is not above 0")
    features, head_weight = head_factors(student.head, student.hidden)
    device_type = features.device.type
    autocast = torch.is_autocast_enabled(device_type)
    compute_dtype = torch.get_autocast_dtype(device_type) if autocast else features.dtype
    labels_N = labels.reshape(-1)
    with torch.autocast(device_type, enabled=False):
        loss_sum: Float[Tensor, ""] = _ChunkedDistillationSum.apply(  # type: ignore[no-untyped-call]
            features.reshape(-1, features.shape[-1]),
            head_weight,
            teacher._replace(hidden=teacher.hidden.detach().flatten(0, -2)),
            labels_N,
            tokens_per_chunk(
                chunk_size, len(labels_N), len(head_weight), compute_dtype, device_type
            ),
            compute_dtype,
            student.softcap,
            _Mix(weight, temperature),
        )
    return LossSums(loss_sum, (labels_N != IGNORED_LABEL).sum())
