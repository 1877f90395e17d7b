import shutil
import subprocess
import sys

import pytest

_PROGRAM = """
import torch
from fingpt_lightning.low_rank import RankRule
from fingpt_lightning.models import (
    GPT2Shape, Recompute, build_network, compile_blocks, recompute_blocks,
)

shape = GPT2Shape(num_layers=3, width=24, num_heads=3, num_positions=13)
ids = torch.randint(23, (2, 13), generator=torch.Generator().manual_seed(1))
for recompute in (Recompute.NONE, Recompute.LOW_RANK):
    gradients = []
    for compiles in (False, True):
        network = build_network(shape, 23, RankRule(5), seed=1).train()
        recompute_blocks(network, recompute)
        if compiles:
            compile_blocks(network)
        network(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in network.parameters()])
    assert len(gradients[0]) == len(gradients[1])
    for plain, compiled in zip(*gradients):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
def test_compiled_blocks_give_the_gradients_of_plain_ones() -> None:
    # A process of its own: what pytest puts around our functions cannot be compiled.
    command = [sys.executable, "-W", "ignore", "-c", _PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
