"""Layers taken apart one after the other, each for the outputs of the low-rank layers before it."""

from collections.abc import Callable, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.data.calibration_text import Calibration
from fingpt_lightning.decomposition.layer_files import (
    LayerWeight,
    Work,
    decompose_reached,
    keep_dense,
    read_result,
)
from fingpt_lightning.decomposition.refinement import (
    last_factors,
    read_errors,
    refine_block,
    write_refined,
)
from fingpt_lightning.decomposition.source import Source
from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.low_rank.factorize import Factors
from fingpt_lightning.models.finite import check_network
from fingpt_lightning.models.input_moments import ChangedBlock, shifted_moments
from fingpt_lightning.models.loading import build_model
from fingpt_lightning.terminal.progress import shown_progress


def decompose_in_sequence(
    source: Source,
    calibration: Calibration,
    layers: Sequence[LayerWeight],
    work: Work,
    refine_steps: int = 0,
) -> None:
    """Takes the layers of a network's blocks apart; those with a result are not done again.

    Args:
        source: The network, which is loaded once, in float32.
        calibration: Text to keep the outputs on.
        layers: All linear layers of the blocks.
        work: Settings of the decomposition, with a rank or None for each layer that has no result.
        refine_steps: Steps of `refine_block` for each block, when its layers are done.
    """
    known = {layer.name: layer for layer in layers}
    ranks = work.ranks or {}
    blocks = dict.fromkeys(block_of(layer.name) for layer in layers)

    def is_wanted(names: Sequence[str]) -> bool:
        return any(
            ranks.get(name) is not None and read_result(work.folder, name) is None for name in names
        )

    network = build_model(source.model, device=work.device).network
    check_network(network)
    ids = calibration.ids.to(work.device)
    what = f"taking layers apart in sequence, on {ids.numel():,} tokens"
    total = len(layers)
    if refine_steps:
        what, total = f"refining blocks on {ids.numel():,} tokens", len(blocks) * refine_steps
    num_done = 0
    with shown_progress(what, total, "steps" if refine_steps else "layers") as show:

        def finish(changed: ChangedBlock) -> None:
            nonlocal num_done
            if refine_steps:
                started = num_done
                _refine(work, changed, refine_steps, lambda steps: show(started + steps))
                num_done += refine_steps
                show(num_done)

        for reached in shifted_moments(network, ids, is_wanted, finish=finish):
            for name, place in reached.layers.items():
                result = read_result(work.folder, name)
                if result is None and ranks[name] is None:
                    result = keep_dense(work, known[name])
                elif result is None:
                    assert reached.moments is not None
                    result = decompose_reached(work, known[name], reached.moments)
                if result.rank is not None:
                    pair = last_factors(work.folder, name, block_of(name))
                    layer = reached.block.get_submodule(place)
                    reached.block.set_submodule(place, _pair(pair, layer))
            if not refine_steps:
                num_done += len(reached.layers)
                show(num_done)


def block_of(name: str) -> str:
    """The name of the block that holds a layer.

    >>> block_of("model.layers.3.mlp.up_proj")
    'model.layers.3'
    """
    parts = name.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdecimal()) + 1])


def _refine(work: Work, changed: ChangedBlock, num_steps: int, show: Callable[[int], None]) -> None:
    """Refines a block, unless it is refined already; later blocks read its stored factors.

    Raises:
        FloatingPointError: The block's outputs are not finite.
    """
    if read_errors(work.folder, changed.name) is not None:
        return
    number = int(changed.name.rpartition(".")[2])
    try:
        errors = refine_block(
            changed.block,
            changed.calls,
            changed.targets,
            num_steps,
            work.seed + number,
            show,
            dtype=work.dtype,
        )
    except FloatingPointError as error:
        raise FloatingPointError(f"{changed.name}: {error}") from error
    layers = {
        f"{changed.name}.{place}": layer
        for place, layer in changed.block.named_modules()
        if isinstance(layer, LowRankLinear)
    }
    write_refined(work.folder, changed.name, layers, errors, work.dtype)


def _pair(factors: Factors, layer: nn.Module) -> LowRankLinear:
    assert isinstance(layer, nn.Linear | Conv1D)
    up, down = (factor.to(layer.weight.device, layer.weight.dtype) for factor in factors)
    return LowRankLinear.from_factors(Factors(up, down), layer.bias)
