"""Blocks left out of a model before the rest of it is decomposed."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from fingpt_lightning.data.calibration_text import Calibration
from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.models.block_calls import blocks_of
from fingpt_lightning.models.depth import blocks_to_drop, check_number, drop_blocks, num_trials
from fingpt_lightning.models.formats.quantized_folder import is_low_rank
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.terminal.progress import shown_progress

TRIAL_TOKENS = 4096
"""Number of tokens, at most, on which each shorter network is tried."""


def check_depth(network: PreTrainedModel, number: int, size: float) -> None:
    """Checks that something is left to decompose when blocks are gone.

    Args:
        network: Laid out network; its weights are not read.
        number: Number of blocks to drop.
        size: Share of all parameters that is kept in the end.

    Raises:
        ValueError: There are not that many blocks, or fewer parameters than ``size`` would be left.
    """
    _, blocks = blocks_of(network)
    check_number(number, len(blocks))
    total = network.num_parameters()
    of_blocks = [sum(p.numel() for p in block.parameters()) for block in blocks]
    # Blocks of one network may differ: the largest are those that could go.
    largest = sorted(of_blocks, reverse=True)
    if number and total - sum(largest[:number]) <= size * total:
        most = next(n for n in range(len(blocks)) if total - sum(largest[: n + 1]) <= size * total)
        left = 1 - sum(largest[:number]) / total
        raise ValueError(
            f"drop_blocks {number} leaves {left:.3g} of the parameters, no more than size {size:g};"
            f" at most {most} fit"
        )


def write_shorter(
    model: str | Path,
    tokenizer: str | Path | None,
    number: int,
    calibration: Calibration,
    folder: Path,
    *,
    device: str = "cpu",
) -> None:
    """Writes a folder of a model without some of its blocks.

    Args:
        model: Path of the model.
        tokenizer: Folder of its tokenizer, where the model has none beside it.
        number: Number of blocks to drop, as `blocks_to_drop` chooses them.
        calibration: Tokens, of which rows from all over are taken.
        folder: Folder that is made, whole or not at all.
        device: Device of the networks that are tried.
    """
    loaded = load_model(model, tokenizer=tokenizer, device=device)
    ids = calibration.ids.to(device)
    num_rows = max(1, min(len(ids), TRIAL_TOKENS // ids.shape[1]))
    rows = torch.linspace(0, len(ids) - 1, num_rows).long()
    total = num_trials(len(blocks_of(loaded.network)[1]), number)
    what = f"choosing {number} blocks to drop, on {num_rows * ids.shape[1]:,} tokens"
    with shown_progress(what, total, "networks") as show:
        dropped = blocks_to_drop(loaded.network, ids[rows], number, show=show)
    print(f"dropping blocks {', '.join(map(str, dropped))}", flush=True)
    drop_blocks(loaded.network, dropped)
    # A factorized embedding before dense blocks stays one.
    export(loaded, "low_rank" if is_low_rank(loaded.network) else "hf", folder)
