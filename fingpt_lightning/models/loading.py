"""Builds a model from its source: the network with its adapter applied, and its tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fingpt_lightning.files import files_sha256
from fingpt_lightning.models.adapting import load_adapter
from fingpt_lightning.models.dequantization import CHOICES, NEVER, dequantize_once
from fingpt_lightning.models.device import AUTO_DTYPE, dtype_remark, find_device, find_dtype
from fingpt_lightning.models.formats.checkpoint import CHECKPOINT, read_checkpoint
from fingpt_lightning.models.formats.gguf import gguf_weights
from fingpt_lightning.models.formats.hf_folder import (
    GENERATION_CONFIG,
    folder_config,
    folder_weights,
    make_savable,
)
from fingpt_lightning.models.formats.network_config import network_config
from fingpt_lightning.models.formats.peft_adapter import check_adapter, trained_quantization
from fingpt_lightning.models.formats.quantized_folder import is_low_rank, place_quantized_layers
from fingpt_lightning.models.formats.tokenizer import (
    check_tokenizer,
    check_vocabulary,
    holds_tokenizer,
    read_tokenizer,
)
from fingpt_lightning.models.formats.weights import Weights
from fingpt_lightning.models.layout import cut, fill, lay_out
from fingpt_lightning.models.low_rank_config import drop_guides, folded_tensors
from fingpt_lightning.models.quantization.layers import QUANTIZATIONS
from fingpt_lightning.models.sources import (
    GGUF,
    ModelSource,
    adapter_at,
    resolve_source,
)
from fingpt_lightning.terminal.messages import check_choice, nearest

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
"""What ``dtype`` may name."""
AUTO, NONE = "auto", "none"


class LoadedModel(NamedTuple):
    """A network in evaluation mode, its adapter applied, and where it came from.

    ``description`` names it in tables. ``revision`` is the commit of a network from the hub, else
    the SHA-256 of its weights. ``remarks`` are lines that say what was decided while loading.
    ``stored_as`` is the quantization of the stored weights, if any.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast | None
    source: ModelSource
    description: str
    revision: str
    remarks: tuple[str, ...] = ()
    stored_as: str | None = None

    def quantization_by(self, setting: str) -> str | None:
        """The quantization that a setting ``quantize`` of `load_model` gives this model.

        Args:
            setting: ``auto``, ``none``, ``nf4`` or ``int8``.
        """
        if self.stored_as is not None:
            return self.stored_as
        adapter = self.source.adapter
        if setting == AUTO:
            return None if adapter is None else trained_quantization(adapter)
        return None if setting == NONE else setting

    def require_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, where one is needed.

        Raises:
            ValueError: The model came without one.
        """
        if self.tokenizer is None:
            raise ValueError(
                f"{self.description} has no tokenizer beside it; name the folder of one"
            )
        return self.tokenizer


class StoredModel(NamedTuple):
    """A model whose weights are still on disk, with its tokenizer and where it was found."""

    weights: Weights
    tokenizer: PreTrainedTokenizerFast | None
    source: ModelSource


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    quantize: str | None = AUTO,
    dequantize: str = NEVER,
    adapter: str | Path | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    keep_part: Callable[[PreTrainedModel], None] | None = None,
) -> LoadedModel:
    """Loads a network of a family in `FAMILIES`, low-rank or dense, its adapter applied.

    No code of a model runs and nothing is unpickled. No weight is initialized first, and with
    ``quantize`` each layer is quantized as soon as it has been read: memory stays within one
    dense layer of what the loaded network takes.

    Args:
        path: Model to load, as in `resolve_source`.
        dtype: Dtype of weights and products: float32, bfloat16, float16 or float64; ``auto`` is
            what `find_dtype` takes for the device and the network.
        device: Device of the network.
        quantize: ``nf4`` (with double quantization) or ``int8`` for the linear layers of the
            blocks; None or ``none`` keeps them; ``auto`` takes the method that an adapter was
            trained on and keeps stored quantized layers.
        dequantize: Whether quantized weights are kept dequantized, for speed: ``always``,
            ``never``, or ``auto`` as `dequantize_once` decides.
        adapter: Folder of an adapter to apply, in place of one that lies beside the network.
        tokenizer: Folder to take the tokenizer from, in place of the model's own.
        revision: Branch, tag or commit of a hub name.
        keep_part: Function that takes out of the network, before it has memory, what other
            processes hold; those weights are not read.

    Raises:
        FileNotFoundError: There is nothing by that name, or a part of it is missing.
        ImportError: A GGUF file, and the package gguf is not installed.
        ValueError: The model cannot be loaded; the message gives the file and the reason.
    """
    if dtype != AUTO_DTYPE:
        _checked_dtype(dtype)
    _check_quantize(quantize)
    check_choice("dequantize", dequantize, CHOICES)
    source = resolve_source(path, adapter=adapter, tokenizer=tokenizer, revision=revision)
    return build_model(
        source,
        dtype=dtype,
        device=device,
        quantize=quantize,
        dequantize=dequantize,
        keep_part=keep_part,
    )


def build_model(
    source: ModelSource,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    quantize: str | None = AUTO,
    dequantize: str = NEVER,
    keep_part: Callable[[PreTrainedModel], None] | None = None,
) -> LoadedModel:
    """Loads a model whose parts have been found.

    Args:
        source: Source of network and tokenizer.
        dtype: Dtype as in `load_model`.
        device: Device as in `load_model`.
        quantize: Quantization as in `load_model`.
        dequantize: Choice as in `load_model`.
        keep_part: Function as in `load_model`.

    Raises:
        FileNotFoundError: A file is missing.
        ImportError: A GGUF file, and the package gguf is not installed.
        ValueError: The model cannot be loaded; the message gives the file and the reason.
    """
    device, requested = find_device(device) if isinstance(device, str) else device, str(dtype)
    if dtype != AUTO_DTYPE:
        dtype = _checked_dtype(dtype)
    _check_quantize(quantize)
    check_choice("dequantize", dequantize, CHOICES)
    trained_on = None if source.adapter is None else trained_quantization(source.adapter)
    method = {AUTO: trained_on, NONE: None}.get(quantize or NONE, quantize)
    weights, tokenizer = _open(source)
    if isinstance(dtype, str):
        dtype = DTYPES[find_dtype(dtype, device, product_sizes(weights.config))]
    try:
        network = lay_out(weights.config, weights.shapes)
        # To the tokenizer of a GGUF file transformers adds a token without a row in the network.
        if tokenizer is not None and not _is_of_gguf(source):
            check_vocabulary(tokenizer, network.config.vocab_size)
        if source.adapter is not None:
            check_adapter(source.adapter, network)
        low_rank = is_low_rank(network)
        elsewhere, stored_as = cut(network, keep_part), None
        if weights.quantized is not None:
            stored_as = weights.quantized.method
            if quantize == AUTO:
                method = None
            if elsewhere or method not in (None, stored_as):
                raise ValueError(f"the weights are stored in {stored_as}; load them whole, as such")
            low_rank = low_rank or weights.quantized.are_low_rank
            place_quantized_layers(network, weights.quantized, dtype, device)
        fill(network, weights.tensors, dtype, device, method, elsewhere)
    except ValueError as error:
        raise ValueError(f"{source.weights}: {error}") from error
    if (source.folder / GENERATION_CONFIG).is_file():
        network.generation_config = GenerationConfig.from_pretrained(str(source.folder))
    if source.adapter is not None:
        load_adapter(source.adapter, network, elsewhere)
    try:
        of_weights = dequantize_once(network, dequantize, dtype, device)
    except ValueError as error:
        raise ValueError(f"{source.weights}: {error}") from None
    network.eval()
    make_savable(network)
    kind = f"{'low-rank ' if low_rank else ''}{network.config.model_type}"
    if method := stored_as or method:
        kind += f", {method}"
    if trained_on not in (None, method):
        kind += f"; its adapter was trained on {trained_on}"
    revision = source.commit or files_sha256(weights.files)
    of_dtype = dtype_remark(requested, str(dtype).removeprefix("torch."), device)
    remarks = tuple(remark for remark in (of_dtype, of_weights) if remark is not None)
    name = f"{source.name} ({kind})"
    return LoadedModel(network, tokenizer, source, name, revision, remarks, stored_as)


def standalone_copy(network: PreTrainedModel) -> PreTrainedModel:
    """A copy on the CPU of a network in training, as a checkpoint of it would be read.

    An expansion of its factors is folded in, and auxiliary dense weights are left out.

    Args:
        network: Whole network without adapters, none of its layers quantized.
    """
    state = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    drop_guides(state, "the module")
    config = network_config(network.config.to_dict(), Path("the module"))
    tensors = folded_tensors(config, state)
    copied = lay_out(config, {name: tuple(tensor.shape) for name, tensor in state.items()})
    fill(copied, tensors, network.dtype, torch.device("cpu"))
    copied.generation_config = network.generation_config
    return copied


def open_stored(path: str | Path, tokenizer: str | Path | None = None) -> StoredModel:
    """Finds a model as `load_model` does, and reads none of its weights.

    Args:
        path: Path as in `load_model`, but not an adapter.
        tokenizer: Folder to take the tokenizer from, in place of the model's own.

    Raises:
        FileNotFoundError: There is nothing by that name, or a part of it is missing.
        ValueError: It is an adapter, has one, or cannot be read.
    """
    folder = Path(path).expanduser()
    if (adapter := adapter_at(folder)) is not None:
        raise ValueError(
            f"{path} {'is' if adapter == folder else 'has'} an adapter; fingpt export --format"
            " merged makes a model of it"
        )
    source = resolve_source(path, tokenizer=tokenizer)
    return StoredModel(*_open(source), source)


def stored_config(source: ModelSource) -> PreTrainedConfig:
    """The config of a model's network; of a Hugging Face folder the weights need not be there.

    Raises:
        FileNotFoundError: A file is missing.
        ImportError: A GGUF file, and the package gguf is not installed.
        ValueError: The config cannot be read, or requests what is not supported.
    """
    if source.weights.is_dir():
        return folder_config(source.weights)
    return _open_weights(source.weights)[0].config


def _open(source: ModelSource) -> tuple[Weights, PreTrainedTokenizerFast | None]:
    """The weights of a model, still on disk, and the tokenizer."""
    weights, reference = _open_weights(source.weights)
    place = source.tokenizer
    if place is None and reference is not None:
        named = Path(str(reference["name_or_path"]))
        place = named if holds_tokenizer(named) else None
    if place is None:
        return weights, None
    is_file = place.is_file()
    tokenizer = read_tokenizer(*((place.parent, place.name) if is_file else (place,)))
    check_tokenizer(tokenizer, reference, place)
    return weights, tokenizer


def _open_weights(place: Path) -> tuple[Weights, dict[str, str | int] | None]:
    """The weights at a place, and a checkpoint's entry on its tokenizer."""
    if place.is_dir():
        return folder_weights(place), None
    if place.suffix == GGUF:
        return gguf_weights(place), None
    assert place.suffix == CHECKPOINT
    checkpoint = read_checkpoint(place)
    return checkpoint.weights, checkpoint.tokenizer


def product_sizes(config: PreTrainedConfig) -> tuple[int, int]:
    """In and out features of the widest product of a block: into the MLP."""
    width = int(config.hidden_size)
    return width, int(getattr(config, "intermediate_size", None) or 4 * width)


def _is_of_gguf(source: ModelSource) -> bool:
    return source.tokenizer is not None and source.tokenizer.is_file()


def _checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name in DTYPES:
        return DTYPES[name]
    raise ValueError(f"dtype {name} is none of {', '.join(DTYPES)}{nearest(name, DTYPES)}")


def _check_quantize(quantize: str | None) -> None:
    known = (AUTO, NONE, *QUANTIZATIONS)
    if quantize not in (None, *known):
        raise ValueError(f"quantize {quantize!r} is none of {', '.join(known)}")
