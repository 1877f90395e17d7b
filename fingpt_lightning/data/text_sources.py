"""Which text each split reads: from settings to corpora."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict, get_args

from fingpt_lightning.data.corpus import (
    Corpus,
    CorpusShare,
    JoinedCorpus,
    OnBadRow,
    SyntheticCorpus,
)
from fingpt_lightning.data.hub_text import HUB_PREFIX, parse_hub_name
from fingpt_lightning.data.text_files import TextFiles, find_text_files
from fingpt_lightning.terminal.messages import check_choice

Split = Literal["train", "val", "test"]
Files = str | list[str] | None

_HUB_SPLITS: dict[Split, str] = {"train": "train", "val": "validation", "test": "test"}


class MixturePart(TypedDict):
    """One of several corpora that a run trains on.

    Attributes:
        name: Name that distinguishes the parts, in messages and in checkpoints.
        files: Files as in ``train_files``; null for synthetic news that no other part has.
        weight: Weight of the part; its share of blocks is weight / sum of weights.
        text_field: Name of the text field, in place of that of the data module.
    """

    name: str
    files: str | list[str] | None
    weight: float
    text_field: NotRequired[str]


@dataclass(frozen=True)
class TextSources:
    """The corpora of all splits.

    Args:
        files: Files of each split, as given.
        mixture: Parts of a mixture, in place of the training files.
        val_share: Share held out of the training text where there are no files for validation.
        text_field: Name of the field that holds the text.
        num_synthetic_items: Number of documents of synthetic news.
        seed: Seed of the synthetic news.
        on_bad_row: Whether a line or row that holds no text is an error or is skipped.

    Raises:
        ValueError: The training text is given twice, a part of the mixture is wrong,
            ``val_share`` is outside (0, 1), or ``on_bad_row`` is unknown.
    """

    files: dict[Split, Files]
    mixture: list[MixturePart] | None
    val_share: float
    text_field: str
    num_synthetic_items: int
    seed: int
    on_bad_row: OnBadRow = "error"

    def __post_init__(self) -> None:
        check_choice("on_bad_row", self.on_bad_row, get_args(OnBadRow))
        if not 0 < self.val_share < 1:
            raise ValueError(f"val_share {self.val_share} is outside (0, 1)")
        if self.mixture is not None:
            if self.files["train"] is not None:
                raise ValueError("train_files and mixture both name the training text: give one")
            _check_mixture(self.mixture)

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the parts by name; empty without a mixture."""
        return {part["name"]: float(part["weight"]) for part in self.mixture or ()}

    def corpora(self, split: Split) -> tuple[Corpus, ...]:
        """What a split reads: one corpus, or the parts of the training mixture.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: Two parts of the mixture hold the same text.
        """
        if split == "test" and self.files["test"] is None:
            split = "val"
        if split != "train" and self.files[split] is not None:
            return (self._open(self.files[split], split, f"{split}_files"),)
        parts = self._training_parts()
        if self.files["val"] is not None:
            return parts
        if split == "train":
            return tuple(CorpusShare(part, self.val_share, "kept") for part in parts)
        return (joined([CorpusShare(part, self.val_share, "held out") for part in parts]),)

    def _training_parts(self) -> tuple[Corpus, ...]:
        if self.mixture is None:
            return (self._open(self.files["train"], "train", "train_files"),)
        parts = {}
        for index, part in enumerate(self.mixture):
            key = f"mixture part {part['name']!r}"
            field = part.get("text_field", self.text_field)
            parts[key] = self._open(part["files"], "train", key, field, self.seed + index)
        for (first, one), (second, other) in itertools.combinations(parts.items(), 2):
            if one.fingerprint() == other.fingerprint():
                raise ValueError(f"{first} and {second} hold the same text: give it once")
        return tuple(parts.values())

    def _open(
        self,
        files: Files,
        split: Split,
        key: str,
        text_field: str | None = None,
        seed: int | None = None,
    ) -> Corpus:
        if files is None:
            seed = self.seed if seed is None else seed
            return SyntheticCorpus(self.num_synthetic_items, seed)
        field = text_field or self.text_field
        names = [files] if isinstance(files, str) else files
        corpora: list[Corpus] = []
        for on_hub, group in itertools.groupby(names, lambda name: name.startswith(HUB_PREFIX)):
            if on_hub:
                corpora += [
                    parse_hub_name(name, field, _HUB_SPLITS[split], key, self.on_bad_row)
                    for name in group
                ]
            else:
                files_found = find_text_files(list(group), key)
                corpora.append(TextFiles(files_found, field, self.on_bad_row))
        if not corpora:
            raise ValueError(f"{key}: no path is given")
        return joined(corpora)


def joined(corpora: Sequence[Corpus]) -> Corpus:
    """One corpus as it is, several one after the other."""
    return corpora[0] if len(corpora) == 1 else JoinedCorpus(tuple(corpora))


def _check_mixture(mixture: list[MixturePart]) -> None:
    if not mixture:
        raise ValueError("mixture has no parts: give null, or parts of name, files and weight")
    for index, part in enumerate(mixture):
        known, needed = MixturePart.__annotations__.keys(), MixturePart.__required_keys__
        if not needed <= part.keys() <= known:
            raise ValueError(
                f"mixture part {index} has {sorted(part)}; it needs {sorted(needed)} and may have "
                f"{sorted(known - needed)}"
            )
    names = [part["name"] for part in mixture]
    for part in mixture:
        name, weight = part["name"], part["weight"]
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"mixture part {name!r}: weight {weight} is not a number above 0")
        if names.count(name) > 1:
            raise ValueError(f"mixture has {names.count(name)} parts named {name!r}")
