"""Which rank each layer gets: a number, a share, and exceptions by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

Rank = int | float | None
"""An int is the rank itself, a float in (0, 1] the share r / min(in, out), None is dense."""


def resolve_rank(rank: Rank, in_features: int, out_features: int) -> int | None:
    """The number of columns a layer's factors get, or None where it stays dense.

    Factors of rank r hold r (in + out) weights; where that is not fewer than in x out, the
    layer stays dense.

    Raises:
        ValueError: An int outside [1, min(in, out)] or a float outside (0, 1].

    >>> resolve_rank(224, 768, 2304), resolve_rank(0.25, 768, 3072), resolve_rank(None, 768, 768)
    (224, 192, None)
    >>> resolve_rank(1.0, 768, 768) is None  # 768 x 1536 weights are more than 768 x 768
    True
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
    return rank if rank * (in_features + out_features) < in_features * out_features else None


@dataclass(frozen=True)
class RankRule:
    """A rank for every linear layer, with exceptions by name pattern.

    Args:
        default: Rank of a layer that no pattern names.
        overrides: Shell-style patterns over full module names, such as ``"*.mlp.c_proj"``; the
            last one that fits wins.
    """

    default: Rank = None
    overrides: Mapping[str, Rank] = field(default_factory=dict)

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
            return resolve_rank(rank, in_features, out_features)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def patterns_of(self, name: str) -> list[str]:
        """The patterns of the exceptions that a layer's name fits."""
        return [pattern for pattern in self.overrides if fnmatchcase(name, pattern)]

    def unused_patterns(self, names: list[str]) -> list[str]:
        """The patterns that fit none of ``names``: most likely misspelt."""
        return [p for p in self.overrides if not any(fnmatchcase(name, p) for name in names)]
