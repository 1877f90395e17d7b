"""What does a finetuning step of Llama-2-7B hold, full, with adapters, and on a base in 4 bits?

Built from measured parts: two and three blocks of the real sizes take a step on the CPU, in which
every tensor is counted; what the third block added counts for each of the others. (One block
alone is both the first and the last: its step peaks elsewhere.) What is offloaded to the host is
copied there and not counted.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from typing_extensions import override

from benchmarks.record import markdown_table, new_record, write_record
from fingpt_lightning.low_rank.adapters import AdapterOptions
from fingpt_lightning.models import Recompute, recompute_blocks, vocabulary_loss
from fingpt_lightning.models.adapting import adapt
from fingpt_lightning.modules.base_model import RandomLlama, random_llama
from fingpt_lightning.profiling import LiveTensorBytes, module_memory
from fingpt_lightning.units import GB

QUESTION = (
    "How much memory does a finetuning step of Llama-2-7B take: full, with adapters on a base in 16"
    " bits, and with adapters on a base in 4 bits whose block inputs wait on the host?"
)
LLAMA_2_7B = RandomLlama(32, 4096, 32, 32, 11008, 4096)
"""Source: https://arxiv.org/abs/2307.09288, table 1, and the model's config."""
MEASURED = (2, 3)
"""Blocks of the networks that take a step."""
_TOY = RandomLlama(4, 64, 2, 2, 128, 64)


class Way(NamedTuple):
    """A way to finetune: what is trained, on which base, what of a block is kept."""

    name: str
    has_adapters: bool
    quantize: str | None
    recompute: str


WAYS = (
    Way("full, bf16", False, None, "none"),
    Way("full, bf16, blocks recomputed", False, None, "block"),
    Way("adapters, bf16", True, None, "none"),
    Way("adapters, bf16, blocks recomputed", True, None, "block"),
    Way("adapters, NF4, blocks recomputed", True, "nf4", "block"),
    Way("adapters, NF4, block inputs on the host", True, "nf4", "offload"),
)
FULL, ADAPTERS_16, OURS = WAYS[1].name, WAYS[3].name, WAYS[5].name


class DeviceBytes(LiveTensorBytes):
    """Counts all tensors but those that were `exclude`d."""

    def exclude(self, tensor: Tensor) -> None:
        """Takes a tensor out of the count: it stands for one in another memory."""
        self.live_bytes -= self._sizes.pop(tensor.untyped_storage()._cdata, 0)

    @override
    def _forget(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key, 0)


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, count: DeviceBytes | None) -> Tensor:
        on_host = hidden.clone()
        if count is not None:
            count.exclude(on_host)
        return on_host

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def main() -> None:
    """Measures all ways and writes record and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument("--rank", type=int, default=8, help="of adapters on all linear layers")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--block_length", type=int, default=512)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--toy", action="store_true", help="a tiny model")
    options = parser.parse_args()
    shape = _TOY if options.toy else LLAMA_2_7B
    settings = {k: v for k, v in vars(options).items() if k != "json"} | {"shape": vars(shape)}
    record = new_record(QUESTION, {**settings, "measured_blocks": MEASURED})
    rows = [_row(way, shape, options) for way in WAYS]
    whole = {row["contender"]: row["total_gb"] for row in rows}
    for row in rows:
        row["ratio_to_ours"] = row["total_gb"] / whole[OURS]
    record["rows"] = rows
    record["summary"] = {
        "memory_ratio_full_over_ours": whole[FULL] / whole[OURS],
        "memory_ratio_16_bit_adapters_over_ours": whole[ADAPTERS_16] / whole[OURS],
        "peak_gb": whole[OURS],
    }
    write_record(options.json, record, table(rows))
    print(json.dumps(record["summary"], indent=1))


def _row(way: Way, shape: RandomLlama, options: argparse.Namespace) -> dict[str, Any]:
    few, more = (measure(way, shape, blocks, options) for blocks in MEASURED)
    others = shape.num_layers - MEASURED[0]
    whole = {key: few[key] + others * (more[key] - few[key]) for key in few}
    return {
        "contender": way.name,
        **{f"{key}_gb": value / GB for key, value in whole.items()},
        "total_gb": sum(whole.values()) / GB,
        "total_gb_of_measured_blocks": [sum(found.values()) / GB for found in (few, more)],
    }


def measure(
    way: Way, shape: RandomLlama, num_blocks: int, options: argparse.Namespace
) -> dict[str, int]:
    """Bytes of weights, of optimizer state, and of the most that a step has beside them.

    Args:
        way: Way to finetune.
        shape: Shape of the network, except its number of blocks.
        num_blocks: Number of blocks in its place.
        options: Options of the command line.
    """
    sizes = RandomLlama(**(vars(shape) | {"num_layers": num_blocks}))
    network = random_llama(
        sizes, options.vocab_size, 0, dtype=torch.bfloat16, device=torch.device("cpu"),
        quantize=way.quantize, seed=1,
    )  # fmt: skip
    network.train()
    if way.has_adapters:
        adapt(network, AdapterOptions(options.rank), seed=1)
    else:
        network.requires_grad_(True)
    count = DeviceBytes()
    _set_recompute(network, way.recompute, lambda: count)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = AdamW(trained, lr=1e-4, fused=True)
    for parameter in trained:  # makes the state without a step's time
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    held = module_memory(network, optimizer)
    stream = torch.Generator().manual_seed(1)
    shape_BT = (options.batch_size, options.block_length)
    ids = torch.randint(options.vocab_size, shape_BT, generator=stream)
    with count:
        hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
        sums = vocabulary_loss(network.get_submodule("lm_head"), hidden, ids)
        del hidden
        (sums.loss_sum / sums.num_tokens).backward()
        optimizer.step()
    return {"weights": held.weights, "optimizer": held.optimizer, "step": count.peak_bytes}


def _set_recompute(
    network: PreTrainedModel, recompute: str, count: Callable[[], DeviceBytes]
) -> None:
    if recompute != "offload":
        recompute_blocks(network, Recompute(recompute))
        return

    # As models/offload.py does between devices.
    def run(block: Callable[..., Any], hidden: Tensor, *args: Any) -> Any:
        def from_host(on_host: Tensor) -> Any:
            return block(on_host.clone(), *args)

        on_host = _ToHost.apply(hidden, count())  # type: ignore[no-untyped-call]
        return checkpoint(from_host, on_host, use_reentrant=False)

    for block in network.modules():
        if isinstance(block, GradientCheckpointingLayer):
            block.gradient_checkpointing = True
            block.__dict__["_gradient_checkpointing_func"] = run


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The Markdown table."""
    lines = [
        [
            row["contender"],
            *(f"{row[f'{key}_gb']:.2f}" for key in ("weights", "optimizer", "step", "total")),
            f"{row['ratio_to_ours']:.2f}",
        ]
        for row in rows
    ]
    header = ["GB of 10^9 bytes", "weights", "optimiser", "step", "total", "over the last"]
    return markdown_table(header, lines)


if __name__ == "__main__":
    main()
