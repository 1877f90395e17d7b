"""Where does the time of a training step go, and how far is each part from its bound?

Profiles steps of the dense and the low-rank GPT-2 and sorts the time of torch's operators.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.pretraining import RANKS
from benchmarks.record import markdown_table, new_record, spread, write_record
from benchmarks.training_step import TrainingStep, Workload
from fingpt_lightning.low_rank.budget import LayerKind
from fingpt_lightning.profiling import keep_freed_memory, measured_peak_flops_per_s

QUESTION = "Where does the time of a training step go, and how far is each part from its bound?"

PARTS = ("products", "attention", "softmax", "optimiser", "elementwise")
_OPERATORS = {
    "products": ("aten::mm", "aten::addmm", "aten::addmm_"),
    "attention": (
        "aten::bmm", "aten::_softmax", "aten::_softmax_backward_data", "fingpt::causal_attention",
        "fingpt::causal_attention_backward", "aten::_scaled_dot_product",
        "aten::_flash_attention", "aten::_efficient_attention", "aten::_cudnn_attention",
    ),
    "softmax": ("aten::_log_softmax", "aten::exp_", "aten::gather", "aten::scatter_add_",
                "_ChunkedCrossEntropySum"),
    "optimiser": ("aten::_fused_adamw_", "aten::_foreach", "aten::linalg_vector_norm"),
}  # fmt: skip


def main() -> None:
    """Profiles both contenders in both precisions, writes record and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=RANKS, default="gpt2-small")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--block_length", type=int, default=512)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5, help="profiled steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside it")
    options = parser.parse_args()
    if options.device == "cpu":
        keep_freed_memory()
    work = Workload(
        options.preset, *RANKS[options.preset], options.batch_size, options.block_length,
        options.device, options.seed,
    )  # fmt: skip
    record = new_record(QUESTION, vars(work) | {"repeats": options.repeats})
    peaks = {
        "fp32": peak_flops_per_s(work, torch.float32),
        "bf16": peak_flops_per_s(work, torch.bfloat16),
    }
    bandwidth = memory_bytes_per_s(work.device)
    record["machine"] |= {
        **{f"peak_{name}_gflop_per_s": round(peak / 1e9) for name, peak in peaks.items()},
        "memory_gb_per_s": round(bandwidth / 1e9, 1),
    }
    rows: list[dict[str, Any]] = []
    for contender in ("dense", "low_rank"):
        step = TrainingStep(contender, work)
        for precision, peak in peaks.items():
            seconds = profiled(step, precision, options.repeats)
            bounds = bounds_s(contender, work, precision, peak, bandwidth)
            rows += [
                {
                    "contender": contender,
                    "precision": precision,
                    "part": part,
                    "repeats": len(times),
                    "time_s": {key: round(value, 6) for key, value in spread(times).items()},
                    "bound_s": float(f"{bounds[part]:.4g}") if part in bounds else None,
                }
                for part, times in seconds.items()
            ]
    median_s = {
        (row["contender"], row["precision"], row["part"]): row["time_s"]["median"] for row in rows
    }
    for (_, precision, part), row in zip(median_s, rows, strict=True):
        own_s = row["time_s"]["median"]
        # A part may take no time: a network without one of its operators.
        dense_s = median_s["dense", precision, part]
        row["ratio_to_dense"] = round(dense_s / own_s, 3) if own_s else None
    record["rows"] = rows
    record["summary"] = {
        f"{contender}_{precision}_{part}_share": round(
            own_s / median_s[contender, precision, "all"], 3
        )
        for (contender, precision, part), own_s in median_s.items()
        if part != "all"
    }
    write_record(options.json, record, table(rows))
    print(json.dumps(record["summary"], indent=1))


def profiled(step: TrainingStep, precision: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of each part, and of all together, of some steps after a first one.

    Args:
        step: Step to profile.
        precision: Precision: ``fp32`` or ``bf16``.
        repeats: Number of profiled steps.
    """
    step(precision)
    seconds: dict[str, list[float]] = {part: [] for part in (*PARTS, "all")}
    on_cuda = step.tokens.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    for _ in range(repeats):
        with profile(activities=activities) as profiler:
            step(precision)
        taken = time_by_part(profiler.key_averages(), on_cuda=on_cuda)
        for part, value in taken.items():
            seconds[part].append(value)
        seconds["all"].append(sum(taken.values()))
    return seconds


def time_by_part(events: Iterable[Any], *, on_cuda: bool) -> dict[str, float]:
    """Seconds of each part of a step.

    Args:
        events: Sums over a profile, of operators and, with CUDA, of kernels.
        on_cuda: Whether time is that of the kernels that an operator starts, not its own.

    Raises:
        RuntimeError: The profile has no time.
    """
    taken = dict.fromkeys(PARTS, 0.0)
    for event in events:
        # A kernel is an event too, under a name of its own; its time is in its operator's.
        if event.device_type == DeviceType.CPU:
            us = event.self_device_time_total if on_cuda else event.self_cpu_time_total
            taken[part_of(event.key)] += us / 1e6
    if not any(taken.values()):
        raise RuntimeError(
            "the profile has no time of operators: is there CUPTI, which profiles CUDA?"
        )
    return taken


def part_of(operator: str) -> str:
    """The part of a step to which one of torch's operators belongs.

    >>> part_of("aten::addmm"), part_of("aten::_foreach_mul_"), part_of("aten::gelu")
    ('products', 'optimiser', 'elementwise')
    """
    for part, operators in _OPERATORS.items():
        for name in operators:
            if operator == name or (name[-1] != "_" and operator.startswith(name + "_")):
                return part
    return "elementwise"


def bounds_s(
    contender: str, work: Workload, precision: str, flops_per_s: float, bytes_per_s: float
) -> dict[str, float]:
    """The least seconds that a part can take on this machine.

    Products and attention (over the full square) by their operations; the softmax by one read and
    one write of all logits in the precision; the optimizer by seven float32 per parameter (weight,
    gradient and two moments in, all but the gradient out).
    """
    budget = work.budget()
    is_low_rank = contender == "low_rank"
    flops = dict.fromkeys(LayerKind, 0)
    for layer in budget.layers:
        flops[layer.kind] += layer.flops_per_token if is_low_rank else layer.dense_flops_per_token
    attention = 3 * flops.pop(LayerKind.ATTENTION) * work.tokens_per_step
    parameters = budget.total_parameters if is_low_rank else budget.dense_total_parameters
    logit_bytes = 4 if precision == "fp32" else 2
    return {
        "products": 3 * sum(flops.values()) * work.tokens_per_step / flops_per_s,
        "attention": attention / flops_per_s,
        "softmax": 2 * work.tokens_per_step * work.vocab_size * logit_bytes / bytes_per_s,
        "optimiser": 7 * 4 * parameters / bytes_per_s,
    }


def memory_bytes_per_s(device: str, num_bytes: int = 2**28) -> float:
    """Bytes read and written per second by scaling a buffer larger than any cache in place."""
    buffer = torch.ones(num_bytes // 4, device=device)
    best_s = _best_s(lambda: buffer.mul_(1.0), device)
    return 2 * num_bytes / best_s


def peak_flops_per_s(work: Workload, dtype: torch.dtype) -> float:
    """The highest rate of products among some sizes, those of the dense network included."""
    width, tokens = work.shape.width, work.tokens_per_step
    rates = [measured_peak_flops_per_s(torch.device(work.device), dtype)]
    for rows, inner, columns in (
        (tokens, width, 4 * width),
        (tokens, 4 * width, width),
        (4 * width, tokens, width),
    ):
        left = torch.randn(rows, inner, device=work.device).to(dtype)
        right = torch.randn(inner, columns, device=work.device).to(dtype)
        best_s = _best_s(functools.partial(torch.matmul, left, right), work.device)
        rates.append(2 * rows * inner * columns / best_s)
    return max(rates)


def _best_s(run: Callable[[], object], device: str) -> float:
    best_s = float("inf")
    for _ in range(20):
        start_s = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - start_s)
    return best_s


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each part, its time beside its bound."""
    lines = []
    for row in rows:
        taken, bound = row["time_s"]["median"], row["bound_s"]
        lines.append(
            [
                f"{row['contender']}, {row['precision']}, {row['part']}",
                f"{taken:.2f}",
                "" if bound is None else f"{bound:.2f}",
                "" if not bound else f"{taken / bound:.1f}x",
                "" if row["ratio_to_dense"] is None else f"{row['ratio_to_dense']:.2f}x",
            ]
        )
    return markdown_table(["", "s a step", "bound (s)", "time / bound", "dense / this"], lines)


if __name__ == "__main__":
    main()
