"""Which rank each layer gets: a number, a share, and exceptions by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

Rank = int | float | None
"""An int is the rank itself, a float in (0, 1] the share r / min(in, out), None is dense."""


def largest_rank(in_features: int, out_features: int) -> int:
    """The largest rank whose factors are smaller than the dense layer; 0 where none is.

    >>> largest_rank(768, 768), largest_rank(768, 3072), largest_rank(1, 5)
    (383, 614, 0)
    """
    return (in_features * out_features - 1) // (in_features + out_features)


def resolve_rank(rank: Rank, in_features: int, out_features: int, multiple: int = 1) -> int | None:
    """The number of columns a layer's factors get, or None where it stays dense.

    Factors of rank r hold r (in + out) weights; where that is not fewer than in x out, the
    layer stays dense.

    Args:
        rank: Requested rank.
        in_features: Number of in features.
        out_features: Number of out features.
        multiple: Number whose nearest multiple is taken, of two as near the larger, among those
            whose factors are smaller than the layer; a layer without such a multiple keeps its
            rank. It makes no layer dense and no dense layer low-rank.

    Raises:
        ValueError: An int outside [1, min(in, out)] or a float outside (0, 1].

    >>> resolve_rank(224, 768, 2304), resolve_rank(0.25, 768, 3072), resolve_rank(None, 768, 768)
    (224, 192, None)
    >>> resolve_rank(1.0, 768, 768) is None  # 768 x 1536 weights are more than 768 x 768
    True
    >>> resolve_rank(180, 768, 768, multiple=128), resolve_rank(224, 768, 768, multiple=128)
    (128, 256)
    >>> resolve_rank(40, 96, 768, multiple=128)  # 128 columns are more than the layer has
    40
    """
    smaller = min(in_features, out_features)
    if rank is None:
        return None
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise ValueError(f"rank ratio {rank} is outside (0, 1]")
        rank = max(1, round(rank * smaller))
    if not 1 <= rank <= smaller:
        raise ValueError(
            f"rank {rank} is outside [1, {smaller}] for a layer of {in_features} x {out_features}"
        )
    largest = largest_rank(in_features, out_features)
    if rank > largest:
        return None
    num_multiples = min(max(1, (2 * rank + multiple) // (2 * multiple)), largest // multiple)
    return multiple * num_multiples or rank


@dataclass(frozen=True)
class RankRule:
    """A rank for every linear layer, with exceptions by name pattern.

    Args:
        default: Rank of a layer that no pattern names.
        overrides: Shell-style patterns over full module names, such as ``"*.mlp.c_proj"``; the
            last one that fits wins.
        multiple: Number whose multiples all ranks are rounded to, as in `resolve_rank`.
    """

    default: Rank = None
    overrides: Mapping[str, Rank] = field(default_factory=dict)
    multiple: int = 1

    def rank_of(self, name: str, in_features: int, out_features: int) -> int | None:
        """The rank of the layer ``name``, or None where it stays dense.

        Raises:
            ValueError: The rank does not fit the layer; the message names it.
        """
        rank = self.default
        for pattern, override in self.overrides.items():
            if fnmatchcase(name, pattern):
                rank = override
        try:
            return resolve_rank(rank, in_features, out_features, self.multiple)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def patterns_of(self, name: str) -> list[str]:
        """The patterns of the exceptions that a layer's name fits."""
        return [pattern for pattern in self.overrides if fnmatchcase(name, pattern)]

    def unused_patterns(self, names: list[str]) -> list[str]:
        """The patterns that fit none of ``names``: most likely misspelt."""
        return [p for p in self.overrides if not any(fnmatchcase(name, p) for name in names)]
