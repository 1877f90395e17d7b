"""Only the layer: low-rank linear layers in a plain torch training loop.

Run: python examples/only_the_layer.py
"""

import torch
from torch import nn
from torch.nn import functional as F

from fingpt_lightning import LowRankLinear, make_low_rank


def main() -> None:
    """Trains a dense network, and then the same with low-rank layers."""
    torch.manual_seed(0)
    x, y = torch.randn(256, 64), torch.randint(4, (256,))
    dense = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    network = nn.Sequential(dense, nn.Linear(64, 4))
    report = make_low_rank(network, rank=8)  # in place; the optimizer is made afterwards
    print(f"{report.parameters_before:,} parameters became {report.parameters_after:,}")
    print("kept dense:", report.kept)
    # One layer by hand is an nn.Module like any other.
    network.append(nn.Sequential(nn.ReLU(), LowRankLinear(4, 4, rank=2)))

    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    for step in range(101):
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
