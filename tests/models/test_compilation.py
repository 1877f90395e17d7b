import json
import shutil
import subprocess
import sys
from typing import Any

import pytest

from tests.models.compiled_recipes import RECIPES
from tests.support.warm_python import run_warm

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


@pytest.fixture(scope="module")
def steps() -> dict[str, Any]:
    """What the compiled step of each recipe came to; all are run in one process."""
    done = run_warm(["-m", "tests.models.compiled_recipes"], timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("recipe", RECIPES)
def test_blocks_of_every_recipe_are_compiled_as_one_graph_with_equal_gradients(
    steps: dict[str, Any], recipe: str
) -> None:
    step = steps[recipe]
    if RECIPES[recipe].is_packed:
        (reason,) = step["breaks"]
        assert "disable" in reason
        assert step["num_graphs"] == 4  # up to attention, in three functions, and after it
    else:
        assert step["breaks"] == {}
        # Under autocast the first block reads another dtype than those after it.
        assert step["num_graphs"] == (3 if RECIPES[recipe].autocast else 1)
    assert step["num_gradients"] > 15
    assert step["error"] < RECIPES[recipe].tolerance


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("recipe", ["int8", "NF4"])
def test_compiled_code_keeps_no_dequantized_weight(steps: dict[str, Any], recipe: str) -> None:
    assert steps[recipe]["num_kept"] > 0
    assert steps[recipe]["kept_weights"] == 0
