"""Self-guided training in float64: each layer one dense matrix, merged anew in every step."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def guided_run(
    logits: Callable[[dict[str, Tensor], Tensor], Tensor],
    start: dict[str, Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    guided_steps: int,
    peak_lr: float,
    final_ratio: float,
    betas: tuple[float, float],
    decay: float,
    clip: float,
) -> dict[str, Tensor]:
    """The weights after one step on each batch, guides left out.

    Args:
        logits: Of a dense network, from its weights (``LAYER.weight`` is out x in) and token ids.
        start: Weights of the low-rank network, ``LAYER.up`` and ``LAYER.down`` in place of pairs.
        batches: Token ids and labels.
        guided_steps: S.
        peak_lr: After the first step's, which is the only one of the warm-up.
        final_ratio: Last over highest learning rate.
        betas: AdamW's.
        decay: AdamW's, of matrices.
        clip: Largest norm of all gradients together, to 1e-6 as in torch.

    Source: https://arxiv.org/abs/2406.16450 (guide), https://arxiv.org/abs/1711.05101 (AdamW).
    """
    weights = {name: tensor.detach().clone().double() for name, tensor in start.items()}
    layers = [name.removesuffix(".up") for name in weights if name.endswith(".up")]
    for layer in layers:
        weights[f"{layer}.guide"] = weights[f"{layer}.up"] @ weights[f"{layer}.down"]
    means = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    squares = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    for step, (input_ids, labels) in enumerate(batches):
        if step == guided_steps:
            for layer in layers:
                del weights[f"{layer}.guide"]
        share = 0.5 * (1 + math.cos(math.pi * step / guided_steps)) if step < guided_steps else 0.0
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        merged = {
            name: leaf for name, leaf in leaves.items() if name.rpartition(".")[0] not in layers
        }
        for layer in layers:
            product = leaves[f"{layer}.up"] @ leaves[f"{layer}.down"]
            merged[f"{layer}.weight"] = (1 - share) * product
            if f"{layer}.guide" in leaves:
                merged[f"{layer}.weight"] = (
                    merged[f"{layer}.weight"] + share * leaves[f"{layer}.guide"]
                )
            merged[f"{layer}.bias"] = leaves[f"{layer}.bias"]
        loss = F.cross_entropy(logits(merged, input_ids).flatten(0, 1), labels.flatten())
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        progress = max(0, step - 1) / (len(batches) - 1)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        lr = peak_lr * (final_ratio + (1 - final_ratio) * cosine)
        for name, gradient in gradients.items():
            clipped = gradient * min(1.0, clip / (norm + 1e-6))
            means[name] = betas[0] * means[name] + (1 - betas[0]) * clipped
            squares[name] = betas[1] * squares[name] + (1 - betas[1]) * clipped**2
            mean = means[name] / (1 - betas[0] ** (step + 1))
            square = squares[name] / (1 - betas[1] ** (step + 1))
            if gradient.ndim > 1:
                weights[name] = weights[name] * (1 - lr * decay)
            weights[name] = weights[name] - lr * mean / (square.sqrt() + 1e-8)
    return weights
