"""What each stage of a compression will take, by the operations it makes."""

from typing import NamedTuple

import torch

from fingpt_lightning.compression.depth import TRIAL_TOKENS
from fingpt_lightning.compression.settings import Settings
from fingpt_lightning.decomposition.source import Source
from fingpt_lightning.models.depth import num_trials
from fingpt_lightning.models.loading import DTYPES
from fingpt_lightning.models.vocabulary_loss import rows_per_softmax, tokens_per_chunk
from fingpt_lightning.profiling import measured_peak_flops_per_s
from fingpt_lightning.units import format_bytes, format_count

_SEQUENTIAL_PASSES = 7
_BACKWARD_PASSES = 3
"""Forward passes that gradients at all layers' outputs take, without those of the weights."""
_BEHIND_BLOCKS, _RECOMPUTED, _SOFTMAX_COPIES = 6, 2, 7
"""Numbers that healing holds: per token and feature behind the blocks; per output of a layer that
is computed again, with its gradient; per logit in a softmax."""
_SHARE_OF_PEAK = 0.4
"""Share of the rate of large products that whole networks reach on a CPU."""
_FACTOR_OPERATIONS = 60
"""Operations per cube of a layer's smaller side, in float64, about: eigenvectors twice."""


class StagePlan(NamedTuple):
    """One stage: what it does, and about what it takes; ``seconds`` is None where not known.

    ``num_bytes`` are those of the device.
    """

    name: str
    what: str
    seconds: float | None
    num_bytes: int


def plan_stages(
    source: Source,
    settings: Settings,
    calibration_tokens: int,
    device: torch.device | None = None,
) -> list[StagePlan]:
    """The stages with memory and, on a CPU, times at the rate of products timed just now.

    What a GPU reaches of such a rate was not measured, so that its times are not known.

    Args:
        source: Opened model.
        settings: Settings of the compression.
        calibration_tokens: Number of tokens of the calibration.
        device: Device of the stages; None is the CPU.
    """
    device = torch.device("cpu") if device is None else device
    network = source.network
    dense = sum(parameter.numel() for parameter in network.parameters())
    in_blocks = sum(layer.in_features * layer.out_features for layer in source.layers)
    small = settings.size * dense
    num_blocks = int(network.config.num_hidden_layers)
    num_left = num_blocks - settings.drop_blocks
    left = dense - round(in_blocks * settings.drop_blocks / num_blocks)
    small_blocks = in_blocks - (dense - small)
    width = int(network.config.hidden_size)
    rate = _rate(device, torch.float32)
    fast = torch.bfloat16 if settings.precision == "bf16-mixed" else torch.float32
    states = 4 * calibration_tokens * width
    cubes = sum(min(layer.size) ** 3 for layer in source.layers) * num_left / num_blocks
    stages = []
    if settings.drop_blocks:
        tokens = min(TRIAL_TOKENS, calibration_tokens)
        trials = num_trials(num_blocks, settings.drop_blocks)
        seconds = _time(trials * 2 * tokens * (in_blocks / 2 + dense - in_blocks), rate)
        what = f"{settings.drop_blocks} of {num_blocks} blocks, by the loss on {tokens:,} tokens"
        memory = 4 * dense + 4 * tokens * (width + network.config.vocab_size)
        stages.append(StagePlan("drop blocks", what, seconds, memory))
    flops = _SEQUENTIAL_PASSES * 2 * (left - dense + in_blocks) * calibration_tokens
    memory = 4 * left + 3 * states
    on_host = ""
    if settings.allocation == "loss" or settings.whitening == "both":
        of_outputs = sum(layer.out_features**2 for layer in source.layers) * num_left / num_blocks
        flops += 2 * round(_BACKWARD_PASSES * left + of_outputs) * calibration_tokens
        held = num_left * states  # before each block, on the host
        if device.type == "cpu":
            memory = 4 * left + max(3 * states, held + states)
        else:
            on_host = f", {format_bytes(held)} on the host"
    stages.append(
        StagePlan(
            "decompose",
            f"{format_count(left)} to {format_count(round(small))} parameters, on"
            f" {calibration_tokens:,} tokens{on_host}",
            _time(flops + _FACTOR_OPERATIONS * cubes, rate),
            memory,
        )
    )
    if settings.refine:
        rows = 4 * 512
        seconds = _time(6 * small_blocks * settings.refine * rows, rate)
        what = f"{settings.refine} steps for each of {num_left} blocks"
        stages.append(StagePlan("refine", what, seconds, 4 * dense + 3 * states))
    for steps, name in ((settings.heal, "heal"), (settings.heal_quantized, "heal quantized")):
        if not steps:
            continue
        tokens = settings.batch_size * settings.block_length
        per_token = 6 * small + (2 * dense if settings.teacher_weight else 0)
        seconds = _time(steps * tokens * per_token, _rate(device, fast))
        is_rounded = name == "heal quantized"
        num_bytes = healing_bytes(source, settings, device, is_rounded=is_rounded)
        learned = "the original's predictions" if settings.teacher_weight else "the text"
        what = f"{steps} steps of {tokens:,} tokens on {learned}, {settings.precision}"
        if is_rounded:
            what += f", rounded to {settings.format}"
        stages.append(StagePlan(name, what, seconds, num_bytes))
    if settings.format != "low_rank":
        seconds = _time(2 * 2 * small * calibration_tokens + _FACTOR_OPERATIONS * cubes, rate)
        what = f"to {settings.format}, on {calibration_tokens:,} tokens"
        stages.append(StagePlan("round", what, seconds, round(8 * small) + 2 * states))
    tokens = len(settings.texts) * settings.text_tokens
    what = f"{len(settings.texts)} texts, {len(settings.tasks)} tasks; tasks take their time beside"
    seconds = _time(2 * (dense + small) * tokens, rate)
    return [*stages, StagePlan("evaluate", what, seconds, 4 * dense)]


def healing_bytes(
    source: Source, settings: Settings, device: torch.device, *, is_rounded: bool = False
) -> int:
    """The most bytes of tensors that a step of healing holds at one time, about.

    Weights, AdamW's two means and the teacher are there all the time. Beside them there is what the
    blocks keep for the backward pass with, first, the loss over the vocabulary, then one block that
    is computed again; and when the backward pass ends, all gradients.

    Args:
        source: Opened model.
        settings: Settings of the compression.
        device: Device of both networks.
        is_rounded: Whether the passes are those of rounded weights.
    """
    config = source.network.config
    dense = sum(parameter.numel() for parameter in source.network.parameters())
    in_blocks = sum(layer.in_features * layer.out_features for layer in source.layers)
    num_blocks = int(config.num_hidden_layers)
    left = (num_blocks - settings.drop_blocks) / num_blocks  # of all blocks
    small = settings.size * dense
    share = (small - (dense - in_blocks)) / (left * in_blocks)  # of a layer's parameters
    ranks = sum(
        share * layer.in_features * layer.out_features / (layer.in_features + layer.out_features)
        for layer in source.layers
    )
    outputs = sum(layer.out_features for layer in source.layers)
    tokens, width = settings.batch_size * settings.block_length, int(config.hidden_size)
    vocab_size, heads = int(config.vocab_size), int(config.num_attention_heads)
    is_mixed = settings.precision == "bf16-mixed"
    dtype = torch.bfloat16 if is_mixed else torch.float32
    # A block keeps its input, the thin activations of its layers, attention's result and a number
    # per head; behind the blocks there are the last norm, the teacher's states and a gradient.
    kept = left * num_blocks * (4 * width + 4 * heads + dtype.itemsize * width)
    kept += left * dtype.itemsize * ranks + _BEHIND_BLOCKS * 4 * width
    again = _RECOMPUTED * dtype.itemsize * (outputs / num_blocks + width)
    table = vocab_size * (settings.embedding_rank or width)
    held = (16 if is_rounded else 12) * small  # of rounded weights there are those before, too
    if is_mixed:  # copies of the weights of layers and head in 16 bits
        held += 2 * (small - (dense - in_blocks) + table)
    logits = dtype.itemsize
    if settings.teacher_weight:
        teacher_dtype = DTYPES[settings.teacher_dtype]
        held += teacher_dtype.itemsize * dense
        logits += teacher_dtype.itemsize
    chunk = tokens_per_chunk(None, tokens, vocab_size, dtype, device.type)
    rows = min(chunk, rows_per_softmax(vocab_size, torch.float32, device.type))
    of_loss = (logits * chunk + _SOFTMAX_COPIES * 4 * rows) * vocab_size
    beside = tokens * kept + 4 * table  # with the gradient of the head
    most = max(beside + of_loss, beside + tokens * again, 4 * (small + table))
    return round(held + most)


def _rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second of whole networks, about; None where that was never measured."""
    if device.type != "cpu":
        return None
    return _SHARE_OF_PEAK * measured_peak_flops_per_s(device, dtype)


def _time(operations: float, rate: float | None) -> float | None:
    return None if rate is None else operations / rate
