"""The sizes of networks that are made from scratch: presets, and any family's config file."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol, TypeAlias

from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from fingpt_lightning.files import read_json
from fingpt_lightning.models.families import family_named, max_positions
from fingpt_lightning.models.formats.network_config import network_config
from fingpt_lightning.terminal.messages import nearest

MAX_LAYERS = 10_000
"""Most blocks of a network that is made here: one with more would take hours to be laid out."""
CONFIG = "config.json"


class NetworkShape(Protocol):
    """Whatever decides a network but for its vocabulary and ranks."""

    @property
    def num_positions(self) -> int:
        """Length of the longest sequence."""

    def config(
        self, vocab_size: int, dropout: float = 0.0, eos_token_id: int | None = None
    ) -> PreTrainedConfig:
        """The config of the dense network.

        Raises:
            ValueError: The family has no dropout, and ``dropout`` is not 0.
        """


@dataclass(frozen=True)
class GPT2Shape:
    """The sizes of a GPT-2.

    Args:
        num_layers: Number of decoder blocks.
        width: Width of the hidden states: features of the residual stream, a multiple of
            ``num_heads``.
        num_heads: Number of attention heads.
        num_positions: Length of the longest sequence.
    """

    num_layers: int
    width: int
    num_heads: int
    num_positions: int = 1024

    def __post_init__(self) -> None:
        _check(self)

    def config(
        self, vocab_size: int, dropout: float = 0.0, eos_token_id: int | None = None
    ) -> PreTrainedConfig:
        """See `NetworkShape`."""
        return GPT2Config(
            vocab_size=vocab_size,
            n_positions=self.num_positions,
            n_embd=self.width,
            n_layer=self.num_layers,
            n_head=self.num_heads,
            # The same curve as GPT-2's gelu_new, in one fused operator.
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=eos_token_id,
            eos_token_id=eos_token_id,
        )


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama whose heads all have keys and values of their own.

    Args:
        num_layers: Number of decoder blocks.
        width: Width of the hidden states, a multiple of ``num_heads``.
        num_heads: Number of attention heads.
        mlp_width: Width between the MLP's layers.
        num_positions: Length of the longest sequence.
    """

    num_layers: int
    width: int
    num_heads: int
    mlp_width: int
    num_positions: int = 1024

    def __post_init__(self) -> None:
        _check(self)

    def config(
        self, vocab_size: int, dropout: float = 0.0, eos_token_id: int | None = None
    ) -> PreTrainedConfig:
        """See `NetworkShape`."""
        check_dropout("llama", dropout)
        return LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=self.width,
            intermediate_size=self.mlp_width,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            max_position_embeddings=self.num_positions,
            rms_norm_eps=1e-6,
            bos_token_id=eos_token_id,
            eos_token_id=eos_token_id,
        )


@dataclass(frozen=True)
class StoredShape:
    """The sizes in a ``config.json`` of any family; but for the vocabulary, which the data decide.

    Args:
        file: File of the config, for messages.
        contents: Text of the file.
    """

    file: Path
    contents: str

    @property
    def num_positions(self) -> int:
        """See `NetworkShape`."""
        return max_positions(self.config(1))

    def config(
        self, vocab_size: int, dropout: float = 0.0, eos_token_id: int | None = None
    ) -> PreTrainedConfig:
        """See `NetworkShape`."""
        contents = json.loads(self.contents)
        family = family_named(contents.get("model_type"), self.file)
        check_dropout(family.model_type, dropout)
        tokens = {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id, "pad_token_id": None}
        dropouts = dict.fromkeys(family.dropouts, dropout)
        of_file = {key: value for key, value in contents.items() if key != "quantization_config"}
        return network_config(of_file | tokens | dropouts | {"vocab_size": vocab_size}, self.file)

    def of_width(self, width: int) -> "StoredShape":
        """The sizes at another width: as many heads, MLP and heads in the same proportion.

        Raises:
            ValueError: The rotary embedding is laid out for the size of the file's heads.
        """
        config = self.config(1)
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"architecture {self.file}: its rotary embedding is laid out for heads of one size,"
                " which another width does not have"
            )
        share = width / config.hidden_size
        changes = {"hidden_size": width}
        for key in ("intermediate_size", "n_inner"):
            if (found := getattr(config, key, None)) is not None:
                changes[key] = max(1, round(found * share))
        if (found := getattr(config, "head_dim", None)) is not None:
            changes["head_dim"] = 2 * max(1, round(found * share / 2))
        return self._with(**changes)

    def of_depth(self, num_layers: int) -> "StoredShape":
        """The sizes of so many blocks, for counting: windows of attention are left out."""
        return self._with(num_hidden_layers=num_layers, layer_types=None)

    def _with(self, **changes: int | None) -> "StoredShape":
        names = self.config(1).attribute_map
        contents = json.loads(self.contents)
        for key, value in changes.items():
            contents.pop(key, None)
            if value is not None:
                contents[names.get(key, key)] = value
        return replace(self, contents=json.dumps(contents))


AnyShape: TypeAlias = GPT2Shape | LlamaShape | StoredShape


def _check(shape: GPT2Shape | LlamaShape) -> None:
    for name, value in asdict(shape).items():
        if value < 1:
            raise ValueError(f"{name} {value} is below 1")
    if shape.num_layers > MAX_LAYERS:
        raise ValueError(f"num_layers {shape.num_layers:,} is above {MAX_LAYERS:,}")
    if shape.width % shape.num_heads:
        raise ValueError(f"width {shape.width} is not a multiple of num_heads {shape.num_heads}")
    if isinstance(shape, LlamaShape) and shape.width // shape.num_heads % 2:
        raise ValueError(
            f"width {shape.width} over num_heads {shape.num_heads} is odd, and a rotation turns"
            " features in pairs"
        )


GPT2_PRESETS: Mapping[str, GPT2Shape] = {
    "gpt2-nano": GPT2Shape(num_layers=4, width=256, num_heads=4, num_positions=256),
    "gpt2-small": GPT2Shape(num_layers=12, width=768, num_heads=12),
    "gpt2-medium": GPT2Shape(num_layers=24, width=1024, num_heads=16),
    "gpt2-large": GPT2Shape(num_layers=36, width=1280, num_heads=20),
    "gpt2-xl": GPT2Shape(num_layers=48, width=1600, num_heads=25),
}
"""Source: Radford et al. (2019), table 2; nano is ours, for laptops and tests."""
LLAMA_PRESETS: Mapping[str, LlamaShape] = {
    "llama-60m": LlamaShape(num_layers=8, width=512, num_heads=8, mlp_width=1376),
    "llama-130m": LlamaShape(num_layers=12, width=768, num_heads=12, mlp_width=2048),
    "llama-350m": LlamaShape(num_layers=24, width=1024, num_heads=16, mlp_width=2736),
    "llama-1b": LlamaShape(num_layers=24, width=2048, num_heads=32, mlp_width=5461),
}
"""Source: https://arxiv.org/abs/2403.03507, table 5, as in https://arxiv.org/abs/2502.10940."""
PRESETS: Mapping[str, GPT2Shape | LlamaShape] = {**GPT2_PRESETS, **LLAMA_PRESETS}
"""Sizes by the name of the setting ``preset``."""


def preset_shape(preset: str, **changes: int | None) -> GPT2Shape | LlamaShape:
    """The shape of a preset, with those ``changes`` that are not None.

    Raises:
        ValueError: No such preset (the nearest is named), or sizes that do not fit together.

    >>> preset_shape("gpt2-small", num_layers=2).num_layers
    2
    """
    if preset not in PRESETS:
        hint = nearest(preset, PRESETS, cutoff=0.3)
        raise ValueError(f"preset {preset!r} is none of {', '.join(PRESETS)}{hint}")
    return resized(PRESETS[preset], **changes)


def resized(shape: GPT2Shape | LlamaShape, **changes: int | None) -> GPT2Shape | LlamaShape:
    """A shape with those ``changes`` that are not None.

    A Llama of another width has an MLP in the same proportion.

    Raises:
        ValueError: The sizes do not fit together.

    >>> resized(PRESETS["llama-60m"], width=256, num_heads=4).mlp_width
    688
    """
    given = {name: value for name, value in changes.items() if value is not None}
    if isinstance(shape, LlamaShape) and "width" in given:
        given["mlp_width"] = max(1, round(shape.mlp_width * given["width"] / shape.width))
    made: GPT2Shape | LlamaShape = replace(shape, **given)  # type: ignore[arg-type]
    return made


def of_width(shape: AnyShape, width: int) -> AnyShape:
    """A shape of another width with as many heads, the MLP in the same proportion.

    Raises:
        ValueError: The width does not fit the heads.
    """
    return shape.of_width(width) if isinstance(shape, StoredShape) else resized(shape, width=width)


def of_depth(shape: AnyShape, num_layers: int) -> AnyShape:
    """A shape of another number of blocks, whose parameters can be counted."""
    if isinstance(shape, StoredShape):
        return shape.of_depth(num_layers)
    return resized(shape, num_layers=num_layers)


def width_step(shape: AnyShape) -> int:
    """The number whose multiples the width may be, with as many heads as the shape has.

    >>> width_step(PRESETS["gpt2-small"]), width_step(PRESETS["llama-130m"])
    (12, 24)
    """
    config = shape.config(1)
    turns_pairs = family_named(config.model_type).positions is None
    return int(config.num_attention_heads) * (2 if turns_pairs else 1)


def stored_shape(path: str) -> StoredShape:
    """The sizes in a config file.

    Args:
        path: File, or a folder that holds ``config.json``.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not the config of a supported family.
    """
    place = Path(path).expanduser()
    file = place / CONFIG if place.is_dir() else place
    if not file.is_file():
        hint = nearest(path, PRESETS)
        raise FileNotFoundError(
            f"architecture {path} is neither a {CONFIG} nor a folder with one; model.preset takes"
            f" {', '.join(PRESETS)}{hint}"
        )
    shape = StoredShape(file, json.dumps(read_json(file)))
    shape.config(1)
    return shape


def check_dropout(model_type: str, dropout: float) -> None:
    """Checks that a family has a place for dropout.

    Args:
        model_type: Family, as in ``config.json``.
        dropout: Probability.

    Raises:
        ValueError: It has none, and ``dropout`` is not 0.
    """
    family = family_named(model_type)
    if dropout and not family.dropouts:
        raise ValueError(f"dropout {dropout}: a {family.title} has no dropout; set 0.0")
