"""A step of each recipe, compiled and not: what they differ by, and where the graph breaks.

``python -m tests.models.compiled_recipes [RECIPE ...]``: in a process of its own, since what pytest
puts around our functions cannot be compiled.
"""

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor, nn
from transformers import PreTrainedModel

from fingpt_lightning.low_rank import RankRule
from fingpt_lightning.low_rank.adapters import AdapterOptions
from fingpt_lightning.models import (
    GPT2Shape,
    Recompute,
    build_network,
    compile_blocks,
    recompute_blocks,
)
from fingpt_lightning.models.adapting import adapt, adapted_layers, linear_names
from fingpt_lightning.models.attention import causal_marker
from fingpt_lightning.models.formats.quantized_folder import quantize_layers
from fingpt_lightning.models.packed_attention import (
    packed_group,
    run_packed,
    use_packed_attention,
)
from fingpt_lightning.models.residual_stream import keep_residual_in
from tests.models.tiny_models import VOCABULARY, tiny_gpt2, tiny_llama

NUM_TOKENS = 9


def pretraining(
    rank: int | None,
    recompute: Recompute = Recompute.NONE,
    residual: torch.dtype | None = None,
    dtype: torch.dtype = torch.float64,
) -> PreTrainedModel:
    """A GPT-2 to train from scratch; in bfloat16 attention is that of our operator."""
    shape = GPT2Shape(num_layers=2, width=24, num_heads=3, num_positions=NUM_TOKENS)
    rule = None if rank is None else RankRule(rank)
    network = build_network(shape, VOCABULARY, rule, seed=1)
    nn.Module.to(network, dtype)  # transformers' own is not typed
    if residual is not None:
        keep_residual_in(network, residual)
    recompute_blocks(network, recompute)
    network.train()
    return network


def finetuning(
    make: Callable[[], PreTrainedModel],
    quantize: str | None,
    dtype: torch.dtype = torch.float64,
    recompute: str = "none",
    **options: Any,
) -> PreTrainedModel:
    """Adapters that are no longer the identity over a frozen base."""
    network = make()
    nn.Module.to(network, dtype)  # transformers' own is not typed
    if quantize is not None:
        quantize_layers(network, quantize)
    network.requires_grad_(False)
    adapt(network, AdapterOptions(3, **options), linear_names(network), 3)
    for layer in adapted_layers(network).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    use_packed_attention(network)
    recompute_blocks(network, recompute)
    network.train()
    return network


class Recipe(NamedTuple):
    """How a network is made, and what else makes a step of it what it is."""

    make: Callable[[], PreTrainedModel]
    is_packed: bool = False
    autocast: bool = False
    backend: str = "eager"
    tolerance: float = 1e-12
    """Largest relative error of a gradient; adapters that share an input add up in one product."""


_JOINT = "aot_eager_decomp_partition"
"""Chooses what is kept for the backward pass, as the compiler of CPUs and GPUs does."""
RECIPES = {
    "dense": Recipe(lambda: pretraining(None)),
    "low rank": Recipe(lambda: pretraining(5)),
    "recompute block": Recipe(lambda: pretraining(5, Recompute.BLOCK)),
    "recompute low_rank": Recipe(lambda: pretraining(5, Recompute.LOW_RANK)),
    "residual_dtype": Recipe(
        lambda: pretraining(5, residual=torch.bfloat16, dtype=torch.float32), autocast=True
    ),
    "LoRA on GPT-2": Recipe(lambda: finetuning(tiny_gpt2, None)),
    "LoRA on Llama, float32": Recipe(
        lambda: finetuning(tiny_llama, None, torch.float32), tolerance=1e-5
    ),
    "DoRA": Recipe(lambda: finetuning(tiny_llama, None, dora=True)),
    "int8": Recipe(lambda: finetuning(tiny_llama, "int8"), backend=_JOINT),
    "NF4": Recipe(
        lambda: finetuning(tiny_llama, "nf4", torch.float32), backend=_JOINT, tolerance=1e-5
    ),
    "DoRA over int8": Recipe(
        lambda: finetuning(tiny_llama, "int8", dora=True, rslora=True), backend=_JOINT
    ),
    "DoRA over NF4, with biases": Recipe(
        lambda: finetuning(tiny_gpt2, "nf4", torch.float32, dora=True),
        backend=_JOINT,
        tolerance=1e-5,
    ),
    "NF4, recompute block": Recipe(
        lambda: finetuning(tiny_llama, "nf4", torch.bfloat16, Recompute.BLOCK), tolerance=0.03
    ),
    "packed rows": Recipe(lambda: finetuning(tiny_llama, None), is_packed=True),
}


def main(names: list[str]) -> None:
    """Prints what the two steps of each recipe come to, as JSON; of all where none is named."""
    torch.set_num_threads(1)
    print(json.dumps({name: compared(RECIPES[name]) for name in names or RECIPES}))


def compared(recipe: Recipe) -> dict[str, Any]:
    """What a compiled step of a recipe differs by, keeps, and breaks at."""
    plain, compiled = recipe.make(), recipe.make()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(compiled, backend=recipe.backend)
    kept: list[Tensor] = []
    truth = _gradients(plain, recipe, [])
    found = _gradients(compiled, recipe, kept)
    counters = torch._dynamo.utils.counters
    weights = {m.weight.shape for m in tiny_llama().modules() if isinstance(m, nn.Linear)}
    return {
        "breaks": {reason.splitlines()[0]: n for reason, n in counters["graph_break"].items()},
        "num_graphs": counters["stats"]["unique_graphs"],
        "num_gradients": len(found),
        "error": max(
            float((ours - theirs).norm() / theirs.norm())
            for ours, theirs in zip(found, truth, strict=True)
        ),
        "num_kept": len(kept),
        "kept_weights": sum(x.shape in weights or x.mT.shape in weights for x in kept),
    }


def _gradients(network: PreTrainedModel, recipe: Recipe, kept: list[Tensor]) -> list[Tensor]:
    """The loss and all gradients; what is kept for these of two axes is noted."""
    stream = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCABULARY, (2, NUM_TOKENS), generator=stream)
    frozen = {p.data_ptr() for p in network.parameters()}

    def note(x: Tensor) -> Tensor:
        if x.is_floating_point() and x.ndim == 2 and x.data_ptr() not in frozen:
            kept.append(x)
        return x

    embedding = network.get_input_embeddings()
    embedding.requires_grad_(True)  # so that one code serves all blocks
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast),
        torch.autograd.graph.saved_tensors_hooks(note, lambda x: x),
    ):
        if recipe.is_packed:
            positions = torch.tensor([[0, 1, 2, 3, 2, 3, 4, 5, 6]])
            group = packed_group(0, 2, [2, 5])
            hidden = run_packed(network, ids[:1], positions, [group])
        else:
            marker = causal_marker(network, ids)
            hidden = network.base_model(
                input_ids=ids, attention_mask=marker, use_cache=False
            ).last_hidden_state
        loss = hidden.square().mul(torch.linspace(-1, 1, hidden.shape[-1])).sum()
    loss.backward()
    trained = [p.grad for p in network.parameters() if p.grad is not None]
    return [loss.detach(), *trained]


if __name__ == "__main__":
    main(sys.argv[1:])
