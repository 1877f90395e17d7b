"""A config's entries on low-rank layers, beyond the sizes that its weights show.

The activation of low-rank layers goes with the network wherever it is written. Their expansion and
guides are a matter of training: a checkpoint has them, to go on; whatever reads a checkpoint as a
network gets the expansion folded and no guide.
"""

import warnings
from collections.abc import Iterator, Mapping

from torch import Tensor
from transformers import PreTrainedConfig

from fingpt_lightning.low_rank.linear import folded_up
from fingpt_lightning.metric_keys import VAL_LOSS

_ACTIVATION, _EXPANSION = "factor_activation", "factor_expansion"
_OWN_HEAD, _MAP = "low_rank_head", "map"
_SPLIT = "split_fused_layers"
NOTED = (_ACTIVATION, _EXPANSION, _OWN_HEAD, _SPLIT)
"""The keys that ours add to a network's config."""


def note_low_rank(config: PreTrainedConfig, activation: str, expansion: float) -> None:
    """Notes both, where they are not what a config without the note means.

    Args:
        config: Config of the network; changed in place.
        activation: Activation of every `LowRankLinear` in it.
        expansion: Expansion of every `LowRankLinear` in it.
    """
    if activation != "none":
        setattr(config, _ACTIVATION, activation)
    if expansion:
        setattr(config, _EXPANSION, expansion)


def note_own_head(config: PreTrainedConfig) -> None:
    """Notes that the head has factors of its own, where a table alone would mean a tied one.

    Args:
        config: Config of the network; changed in place.
    """
    setattr(config, _OWN_HEAD, True)


def note_own_head_map(config: PreTrainedConfig) -> None:
    """Notes that the head has a map of its own, beside the table that it shares.

    Args:
        config: Config of the network; changed in place.
    """
    setattr(config, _OWN_HEAD, _MAP)


def has_own_head(config: PreTrainedConfig) -> bool:
    """Whether the head has factors of its own, or a map of its own beside a shared table."""
    return bool(getattr(config, _OWN_HEAD, False))


def has_own_head_map(config: PreTrainedConfig) -> bool:
    """Whether the head has a map of its own beside the embedding's table."""
    return bool(getattr(config, _OWN_HEAD, False) == _MAP)


def forget_own_head(config: PreTrainedConfig) -> None:
    """Takes the note away, where the head is dense again.

    Args:
        config: Config of the network; changed in place.
    """
    config.__dict__.pop(_OWN_HEAD, None)


def note_split(config: PreTrainedConfig) -> None:
    """Notes that the fused linear layers of the blocks are split into their parts.

    Args:
        config: Config of the network; changed in place.
    """
    setattr(config, _SPLIT, True)


def is_split(config: PreTrainedConfig) -> bool:
    """Whether the fused linear layers of the blocks are split into their parts."""
    return bool(getattr(config, _SPLIT, False))


def forget_split(config: PreTrainedConfig) -> None:
    """Takes the note away, where the layers are whole again.

    Args:
        config: Config of the network; changed in place.
    """
    config.__dict__.pop(_SPLIT, None)


def noted_activation(config: PreTrainedConfig) -> str:
    """The activation of the network's low-rank layers."""
    return str(getattr(config, _ACTIVATION, "none"))


def folded_tensors(
    config: PreTrainedConfig, state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """A state dict's tensors, the expansion folded into its factors and removed from the config.

    Args:
        config: Config of the network; changed in place, at once.
        state: Tensors by name; ``LAYER.down`` beside ``LAYER.up`` are factors of one layer.
    """
    expansion = float(config.__dict__.pop(_EXPANSION, 0.0))
    return (
        (name, folded_up(tensor, expansion) if _is_of_pair(name, state) else tensor)
        for name, tensor in state.items()
    )


def is_guide(name: str) -> bool:
    """Whether a tensor of a state dict is the matrix that guides a low-rank layer."""
    return name.endswith(".guide")


def drop_guides(state: dict[str, Tensor], source: str) -> None:
    """Takes the guides out of a state dict that is read as a network; a warning reports it.

    Args:
        state: Tensors by name; changed in place.
        source: Name of the place that they were read from.
    """
    guides = [name for name in state if is_guide(name)]
    for name in guides:
        del state[name]
    if guides:
        warnings.warn(
            f"{source} is from the guided steps of a run (model.self_guided): its low-rank layers"
            f" are taken without their auxiliary dense weights, as {VAL_LOSS} was measured",
            stacklevel=2,
        )


def _is_of_pair(name: str, state: Mapping[str, Tensor]) -> bool:
    layer, _, part = name.rpartition(".")
    return part == "up" and f"{layer}.down" in state
