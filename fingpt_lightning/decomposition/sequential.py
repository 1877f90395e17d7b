"""Layers taken apart one after the other, each for the outputs of the low-rank layers before it."""

from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.data.calibration_text import Calibration
from fingpt_lightning.decomposition.layer_files import (
    LayerWeight,
    Work,
    decompose_reached,
    keep_dense,
    read_factors,
    read_result,
)
from fingpt_lightning.decomposition.source import Source
from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.low_rank.factorize import Factors
from fingpt_lightning.models.finite import check_network
from fingpt_lightning.models.input_moments import shifted_moments
from fingpt_lightning.models.loading import build_model
from fingpt_lightning.terminal.progress import shown_progress


def decompose_in_sequence(
    source: Source, calibration: Calibration, layers: Sequence[LayerWeight], work: Work
) -> None:
    """Takes the layers of a network's blocks apart; those with a result are not done again.

    Args:
        source: The network, which is loaded once, in float32.
        calibration: Text to keep the outputs on.
        layers: All linear layers of the blocks.
        work: Settings of the decomposition, with a rank or None for each layer.
    """
    assert work.ranks is not None
    known = {layer.name: layer for layer in layers}
    ranks = work.ranks

    def is_wanted(names: Sequence[str]) -> bool:
        return any(
            ranks.get(name) is not None and read_result(work.folder, name) is None for name in names
        )

    network = build_model(source.model, device=work.device).network
    check_network(network)
    ids = calibration.ids.to(work.device)
    what = f"taking layers apart in sequence, on {ids.numel():,} tokens"
    num_done = 0
    with shown_progress(what, len(layers), "layers") as show:
        for reached in shifted_moments(network, ids, is_wanted):
            for name, place in reached.layers.items():
                result = read_result(work.folder, name)
                if result is None and ranks[name] is None:
                    result = keep_dense(work, known[name])
                elif result is None:
                    assert reached.moments is not None
                    result = decompose_reached(work, known[name], reached.moments)
                if result.rank is not None:
                    pair = read_factors(work.folder, name)
                    layer = reached.block.get_submodule(place)
                    reached.block.set_submodule(place, _pair(pair, layer))
            num_done += len(reached.layers)
            show(num_done)


def _pair(factors: Factors, layer: nn.Module) -> LowRankLinear:
    assert isinstance(layer, nn.Linear | Conv1D)
    up, down = (factor.to(layer.weight.device, layer.weight.dtype) for factor in factors)
    return LowRankLinear.from_factors(Factors(up, down), layer.bias)
