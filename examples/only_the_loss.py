"""Only the loss: cross-entropy over a large vocabulary without ever holding all logits.

Run: python examples/only_the_loss.py
"""

import torch
from torch import nn
from torch.nn import functional as F

from fingpt_lightning import vocabulary_loss


def main() -> None:
    """Compares loss and gradient with those of the plain way."""
    torch.manual_seed(0)
    hidden = torch.randn(2, 128, 64, requires_grad=True)  # rows, tokens, width
    head = nn.Linear(64, 8192, bias=False)
    labels = torch.randint(8192, (2, 128))
    labels[:, :32] = -100  # a prompt: not supervised

    sums = vocabulary_loss(head, hidden, labels, chunk_size=64)
    loss = sums.loss_sum / sums.num_tokens  # divide once, over all microbatches and ranks
    (gradient,) = torch.autograd.grad(loss, hidden)

    plain = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten())
    (expected,) = torch.autograd.grad(plain, hidden)
    print(f"loss {loss.item():.6f}, the plain way {plain.item():.6f}")
    print(f"largest difference of the gradients: {(gradient - expected).abs().max().item():.1e}")
    print(f"logits held at a time: 64 x 8192 in place of {labels.numel()} x 8192")


if __name__ == "__main__":
    main()
