"""Cross-entropy over the vocabulary without ever holding all logits.

Axes: N tokens, C tokens of one chunk, K features of the head's last product, V vocabulary, P rows
of the head's weight as it is multiplied, V or some more.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fingpt_lightning.low_rank.embedding import head_factors

IGNORED_LABEL = -100
"""The label of a position without supervision, as ``torch.nn.functional.cross_entropy`` has it."""


CHUNK_BYTES = {"cpu": 100 * 2**20, "cuda": 2**29}
"""Bytes of the logits that are held at a time, by type of device; those of CUDA not measured."""
_SOFTMAX_BYTES = {"cpu": 2**22, "cuda": 2**26}
"""Bytes of the rows of one softmax: on the CPU as many as a core's share of cache holds, on CUDA a
bound on its float32 temporaries."""

_ROW_ALIGNMENT = 64
"""Elements; rows of logits begin at multiples of it."""


class LossSums(NamedTuple):
    """What a step adds up; dividing happens once, over all microbatches and ranks.

    ``loss_sum`` is in nats and carries the gradient; ``num_tokens`` counts supervised positions.
    """

    loss_sum: Float[Tensor, ""]
    num_tokens: Int[Tensor, ""]


def row_sums(
    loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    hidden: Float[Tensor, "B T D"],
    labels: Int[Tensor, "B T"],
) -> Float64[Tensor, "B 2"]:
    """Summed loss and number of supervised tokens of each row.

    Args:
        loss: Function from hidden states and labels of some rows to what they add up to.
        hidden: Final hidden states.
        labels: Labels of the rows.
    """
    rows = [loss(hidden[row : row + 1], labels[row : row + 1]) for row in range(len(hidden))]
    return torch.stack([torch.stack([part.double() for part in sums]) for sums in rows])


def tokens_per_chunk(
    chunk_size: int | None, num_tokens: int, vocab_size: int, dtype: torch.dtype, device_type: str
) -> int:
    """The tokens whose logits are held at a time.

    Args:
        chunk_size: Number as requested; None takes chunks of one size, as few as `CHUNK_BYTES` of
            logits allow: a short last chunk costs more per token.
        num_tokens: Number of all tokens.
        vocab_size: Size of the vocabulary.
        dtype: Dtype of the logits.
        device_type: Type of the device, such as ``cpu``.

    >>> tuple(tokens_per_chunk(None, n, 50257, torch.float32, "cpu") for n in (100, 521, 522))
    (100, 521, 261)
    """
    if chunk_size is not None:
        return chunk_size
    num_bytes = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"])
    largest = max(1, num_bytes // (vocab_size * dtype.itemsize))
    num_chunks = max(1, -(-num_tokens // largest))
    return max(1, -(-num_tokens // num_chunks))


def rows_per_softmax(vocab_size: int, wide_dtype: torch.dtype, device_type: str) -> int:
    """The rows of logits that go through softmax, loss and gradient at a time.

    Args:
        vocab_size: Size of the vocabulary.
        wide_dtype: Dtype of the softmax.
        device_type: Type of the device, such as ``cpu``.
    """
    num_bytes = _SOFTMAX_BYTES.get(device_type, _SOFTMAX_BYTES["cuda"])
    return max(1, num_bytes // (vocab_size * wide_dtype.itemsize))


class _ChunkedCrossEntropySum(torch.autograd.Function):
    """Sum of the cross-entropies; the gradients are made chunk by chunk in the forward pass.

    The softmax that gives the loss also gives the gradient, so three products suffice
    (logits, gradient of features, gradient of weight), as in the plain way, and no logits are
    kept or computed again. Source: the fused linear cross-entropy of
    https://arxiv.org/abs/2410.10989, section 3.2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_size: int,
        compute_dtype: torch.dtype,
        softcap: float | None,
    ) -> Tensor:
        with_features, with_weight = ctx.needs_input_grad[:2]
        wide_dtype = torch.promote_types(compute_dtype, torch.float32)
        vocab_size = len(weight)
        weight_PK = _multiplied(weight, compute_dtype)
        features_NK = features.to(compute_dtype)
        loss_sum = features.new_zeros((), dtype=wide_dtype)
        grad_features = torch.empty_like(features_NK) if with_features else None
        grad_weight = torch.zeros_like(weight_PK, dtype=wide_dtype) if with_weight else None
        logits = _aligned_rows(min(chunk_size, len(features_NK)), len(weight_PK), features_NK)
        for first in range(0, len(features_NK), chunk_size):
            features_CK = features_NK[first : first + chunk_size]
            logits_CP = logits[: len(features_CK)]
            torch.matmul(features_CK, weight_PK.T, out=logits_CP)
            labels_C = labels[first : first + chunk_size]
            logits_CV = logits_CP[:, :vocab_size]
            loss_sum += _loss_and_gradient_(logits_CV, labels_C, wide_dtype, softcap)
            grad_CP = logits_CP  # beyond V the logits of rows of zeros are 0, and the gradient is
            if grad_features is not None:
                torch.matmul(grad_CP, weight_PK, out=grad_features[first : first + chunk_size])
            if grad_weight is not None:
                add_outer_(grad_weight, grad_CP, features_CK)
        if grad_weight is not None:
            grad_weight = grad_weight[:vocab_size]
        ctx.save_for_backward(grad_features, grad_weight)
        ctx.dtypes = features.dtype, weight.dtype
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return *saved_gradients(ctx, grad_output), None, None, None, None


def _multiplied(weight: Float[Tensor, "V K"], dtype: torch.dtype) -> Float[Tensor, "P K"]:
    """The weight in a dtype; where that takes a copy, with rows of zeros up to a round number.

    So all sides of the products are round, which kernels for 16 bits on GPUs are made for.
    """
    if weight.dtype == dtype:
        return weight
    num_rows = -(-len(weight) // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
    copied = weight.new_empty(num_rows, weight.shape[1], dtype=dtype)
    copied[: len(weight)].copy_(weight)
    copied[len(weight) :].zero_()
    return copied


def _aligned_rows(num_rows: int, num_columns: int, like: Tensor) -> Tensor:
    # GPT-2's 50257 columns without a gap: float32 products on the CPU lose a third of their speed.
    stride = -(-num_columns // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
    rows = like.new_empty(num_rows, stride)
    # On processors with AMX, oneDNN 3.12 (of torch 2.13) reads bfloat16 rows into the gap and
    # multiplies what lies there by 0: it must not be NaN. Mended for 3.14 by
    # https://github.com/uxlfoundation/oneDNN/pull/5603
    rows[:, num_columns:].zero_()
    return rows[:, :num_columns]


def add_outer_(
    grad_weight: Float[Tensor, "V K"], grad: Float[Tensor, "C V"], features: Float[Tensor, "C K"]
) -> None:
    """Adds one chunk's part of the weight's gradient, which may be wider than its factors."""
    if grad_weight.dtype == features.dtype:
        grad_weight.addmm_(grad.T, features)
    elif features.device.type == "cuda":
        # The product of a chunk is not rounded to 16 bits; torch 2.13 cannot do so on the CPU.
        grad_weight += torch.mm(grad.T, features, out_dtype=grad_weight.dtype)
    else:
        grad_weight += grad.T @ features


def saved_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients that the forward pass of a loss has made, times that of the loss."""
    # In place, for the weight's gradient is large; a second backward pass is then refused.
    return tuple(
        None if grad is None else grad.mul_(grad_output).to(dtype)
        for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    )


def _loss_and_gradient_(
    logits_CV: Tensor, labels_C: Tensor, wide_dtype: torch.dtype, softcap: float | None
) -> Tensor:
    """The summed loss; the logits become its gradient with respect to them, in place."""
    # A few rows at a time, so that on the CPU every pass but the first finds them in cache.
    num_rows = rows_per_softmax(logits_CV.shape[1], wide_dtype, logits_CV.device.type)
    loss_sum = logits_CV.new_zeros((), dtype=wide_dtype)
    for rows_RV, labels_R in zip(logits_CV.split(num_rows), labels_C.split(num_rows), strict=True):
        kept_R = labels_R != IGNORED_LABEL
        target_R1 = labels_R.where(kept_R, 0).unsqueeze(1)
        if softcap is not None:
            capped_RV = torch.tanh(rows_RV.to(wide_dtype) / softcap)
            rows_RV.copy_(softcap * capped_RV)
        log_p_RV = torch.log_softmax(rows_RV, 1, dtype=wide_dtype)
        loss_sum -= log_p_RV.gather(1, target_R1).squeeze(1).where(kept_R, 0).sum()
        grad_RV = log_p_RV.exp_()
        grad_RV.scatter_add_(1, target_R1, grad_RV.new_full(target_R1.shape, -1.0))
        if softcap is not None:
            grad_RV *= 1 - capped_RV**2
        torch.mul(grad_RV, kept_R.unsqueeze(1), out=rows_RV)
    return loss_sum


def vocabulary_loss(
    head: nn.Module,
    hidden: Float[Tensor, "*batch D"],
    labels: Int[Tensor, "*batch"],
    chunk_size: int | None = None,
    softcap: float | None = None,
) -> LossSums:
    """Sum of the cross-entropies of ``labels`` under ``head(hidden)``, and how many there are.

    Equal to the plain way to rounding, gradients included. Under autocast the products run in
    the autocast dtype, softmax and sums in float32, and the weight's gradient is summed over
    the chunks in float32. Memory: ``chunk_size`` x V logits in place of N x V.

    Args:
        head: A `LowRankHead` or a ``torch.nn.Linear`` without bias.
        hidden: Final hidden states.
        labels: Next tokens, aligned with ``hidden``; -100 where nothing is supervised.
        chunk_size: Tokens whose logits are held at a time, at least 1; None takes as many as
            `CHUNK_BYTES` hold.
        softcap: Bound c of the logits, which are ``c tanh(logits / c)``; None leaves them.

    Raises:
        ValueError: ``chunk_size`` is below 1.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} is below 1")
    features, weight = head_factors(head, hidden)
    device_type = hidden.device.type
    autocast = torch.is_autocast_enabled(device_type)
    compute_dtype = torch.get_autocast_dtype(device_type) if autocast else features.dtype
    labels_N = labels.reshape(-1)
    with torch.autocast(device_type, enabled=False):
        loss_sum = _ChunkedCrossEntropySum.apply(  # type: ignore[no-untyped-call]
            features.reshape(-1, features.shape[-1]),
            weight,
            labels_N,
            tokens_per_chunk(chunk_size, len(labels_N), len(weight), compute_dtype, device_type),
            compute_dtype,
            softcap,
        )
    return LossSums(loss_sum, (labels_N != IGNORED_LABEL).sum())
