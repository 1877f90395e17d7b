"""One way to load a model: Hugging Face folder or name, adapter, GGUF, checkpoint or run."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import HfApi, snapshot_download
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from fingpt_lightning.models.adapting import load_adapter
from fingpt_lightning.models.formats.peft_adapter import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    BEST_ADAPTER_FOLDER,
    Base,
    adapter_base,
    check_adapter,
    trained_quantization,
)
from fingpt_lightning.models.formats.quantized_folder import is_low_rank, place_quantized_layers
from fingpt_lightning.models.formats.tokenizer import (
    check_tokenizer,
    checkpoint_tokenizer,
    holds_tokenizer,
    read_tokenizer,
)
from fingpt_lightning.models.formats.weights import (
    SAFETENSORS,
    SAFETENSORS_INDEX,
    Weights,
    files_sha256,
    folder_weights,
    gguf_weights,
    read_checkpoint,
    refuse_pickled,
)
from fingpt_lightning.models.layout import cut, fill, lay_out
from fingpt_lightning.models.quantization.layers import QUANTIZATIONS
from fingpt_lightning.terminal.messages import first_line, nearest, nearest_sibling

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
"""What ``dtype`` may name."""
AUTO, NONE = "auto", "none"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]


class LoadedModel(NamedTuple):
    """A network ready for evaluation, and where it came from.

    ``source`` names it in tables. ``revision`` is the commit of a model from the hub, else the
    SHA-256 of its weights. ``adapter`` is the folder of an adapter that fits the network and has
    not been applied. ``elsewhere`` names the parameters that ``keep_part`` took out. ``base`` is
    where the network itself was found, whatever adapter led there.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast | None
    source: str
    revision: str
    adapter: Path | None
    elsewhere: frozenset[str] = frozenset()
    base: Base = Base("", None)

    def require_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, where one is needed.

        Raises:
            ValueError: The model came without one.
        """
        if self.tokenizer is None:
            raise ValueError(f"{self.source} has no tokenizer beside it; name the folder of one")
        return self.tokenizer

    def adapted(self) -> PreTrainedModel:
        """The network in evaluation mode, the adapter, where there is one, on its layers.

        Raises:
            ValueError: The adapter needs what is not supported here.
        """
        if self.adapter is not None:
            load_adapter(self.adapter, self.network)
        self.network.eval()
        return self.network


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
    adapter: str | Path | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    keep_part: Callable[[PreTrainedModel], None] | None = None,
) -> LoadedModel:
    """Loads a GPT-2 or Llama, low-rank or dense, for evaluation or finetuning.

    No code of a model runs and nothing is unpickled. No weight is initialised first, and with
    ``quantize`` each layer is quantised as soon as it has been read: memory stays within one
    dense layer of what the loaded network takes.

    Args:
        path: A Hugging Face folder or hub name, the folder of a PEFT adapter (whose base is
            loaded), a GGUF file or its folder, a checkpoint, or a run folder, whose best
            checkpoint is taken, or its last where there is no best; of a finetuning run the
            adapter of either. An adapter that lies as ``adapter/`` in a Hugging Face folder
            belongs to it.
        dtype: Of weights and products: float32, bfloat16, float16 or float64.
        device: Where the network goes.
        quantize: ``nf4`` (with double quantisation) or ``int8`` for the linear layers of the
            blocks; None or ``none`` keeps them; ``auto`` takes what an adapter tells that it was
            trained on.
        adapter: An adapter folder to check against the network and to hand on.
        tokenizer: A folder to take the tokenizer from, in place of the model's own.
        revision: Of a hub name: branch, tag or commit.
        keep_part: Takes out of the network, before it has memory, what other processes hold;
            those weights are not read.

    Raises:
        FileNotFoundError: There is nothing by that name, or a part of it is missing.
        ImportError: A GGUF file, and the package gguf is not installed.
        ValueError: What is there cannot be loaded; the message names the file and why.
    """
    dtype = _checked_dtype(dtype)
    known = (AUTO, NONE, *QUANTIZATIONS)
    if quantize not in (None, *known):
        raise ValueError(f"quantize {quantize!r} is none of {', '.join(known)}")
    place, base = _find(str(path), revision), Base(str(path), revision)
    if (of_run := _adapter_of_run(place.path)) is not None:
        place = _Place(of_run, None)
    if (place.path / ADAPTER_CONFIG).is_file():
        if adapter is not None:
            raise ValueError(f"adapter {adapter}: {path} is an adapter itself")
        adapter = place.path
        base = adapter_base(adapter)
        try:
            place = _find(base.path, base.revision)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"the base of the adapter {adapter}: {error}") from error
        if (place.path / ADAPTER_CONFIG).is_file():
            raise ValueError(f"{adapter}: its base {base.path} is an adapter too")
    elif adapter is None and (place.path / "config.json").is_file():
        beside = place.path / ADAPTER_FOLDER
        adapter = beside if (beside / ADAPTER_CONFIG).is_file() else None
    if adapter is not None:
        adapter = Path(adapter).expanduser()
        if not (adapter / ADAPTER_CONFIG).is_file():
            raise FileNotFoundError(f"adapter {adapter} has no {ADAPTER_CONFIG}")
        adapter_base(adapter)
        if tokenizer is None and holds_tokenizer(adapter):
            tokenizer = adapter
    trained_on = None if adapter is None else trained_quantization(adapter)
    asked, quantize = quantize, {AUTO: trained_on, NONE: None}.get(quantize or NONE, quantize)
    weights, found = _open(place.path, None if tokenizer is None else Path(tokenizer).expanduser())
    try:
        network = lay_out(weights.config, weights.shapes)
        if tokenizer is not None or weights.files[0].suffix != ".gguf":
            # Of a GGUF file transformers adds a token that the network has no row for.
            _check_vocabulary(found, network)
        if adapter is not None:
            check_adapter(adapter, network)
        low_rank = is_low_rank(network)
        elsewhere, stored_as = cut(network, keep_part), None
        if weights.quantized is not None:
            stored_as = weights.quantized.method
            if asked == AUTO:
                quantize = None
            if elsewhere or quantize not in (None, stored_as):
                raise ValueError(f"the weights are stored in {stored_as}; load them whole, as such")
            low_rank = low_rank or weights.quantized.are_low_rank
            place_quantized_layers(network, weights.quantized, dtype, torch.device(device))
        fill(network, weights.tensors, dtype, torch.device(device), quantize, elsewhere)
    except ValueError as error:
        raise ValueError(f"{place.path}: {error}") from error
    if (place.path / "generation_config.json").is_file():
        network.generation_config = GenerationConfig.from_pretrained(str(place.path))
    commit = place.commit or files_sha256(weights.files)
    kind = f"{'low-rank ' if low_rank else ''}{network.config.model_type}"
    if method := stored_as or quantize:
        kind += f", {method}"
    if trained_on not in (None, method):
        kind += f"; its adapter was trained on {trained_on}"
    return LoadedModel(network, found, f"{path} ({kind})", commit, adapter, elsewhere, base)


class StoredModel(NamedTuple):
    """A model whose weights are still on disk, with its tokenizer and where it was found."""

    weights: Weights
    tokenizer: PreTrainedTokenizerFast | None
    path: Path


def open_stored(path: str | Path, tokenizer: str | Path | None = None) -> StoredModel:
    """Finds a model as `load_model` does, and reads none of its weights.

    Args:
        path: As in `load_model`, but no adapter.
        tokenizer: A folder to take the tokenizer from, in place of the model's own.

    Raises:
        FileNotFoundError: There is nothing by that name, or a part of it is missing.
        ValueError: It is an adapter, has one, or cannot be read.
    """
    place = _find(str(path), None)
    for folder, holds in ((place.path, "is"), (place.path / ADAPTER_FOLDER, "has")):
        if (folder / ADAPTER_CONFIG).is_file():
            raise ValueError(
                f"{path} {holds} an adapter; fingpt export --format merged makes a model of it"
            )
    given = None if tokenizer is None else Path(tokenizer).expanduser()
    return StoredModel(*_open(place.path, given), place.path)


class _Place(NamedTuple):
    path: Path
    commit: str | None


def _find(name: str, revision: str | None) -> _Place:
    path = Path(name).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision {revision}: {name} is a local path, which has none")
        return _Place(path, None)
    if path.suffix in (".ckpt", ".gguf") or not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"model {name}: no such file or folder{_nearest(path)}")
    folder = _hub_folder(name, revision, _nearest(path))
    return _Place(folder, folder.name)


def _adapter_of_run(path: Path) -> Path | None:
    """The adapter that a finetuning run left, of its best checkpoint where there is one."""
    if any((path / name).is_file() for name in (ADAPTER_CONFIG, "config.json")):
        return None
    folders = (path / name for name in (BEST_ADAPTER_FOLDER, ADAPTER_FOLDER))
    return next((folder for folder in folders if (folder / ADAPTER_CONFIG).is_file()), None)


def _nearest(path: Path) -> str:
    near = nearest_sibling(path)
    return "" if near is None else f"; did you mean {near}?"


def _hub_folder(name: str, revision: str | None, hint: str) -> Path:
    """The snapshot of a model in the local cache of the hub, fetched where it is not there."""
    try:
        folder = _snapshot(name, revision, local_files_only=True)
        if any((folder / file).is_file() for file in (SAFETENSORS, SAFETENSORS_INDEX)):
            return folder  # else only its tokenizer has been used before
    except OSError:
        pass
    try:
        # One request, for without it loading repeats each failed request for most of a minute.
        HfApi().model_info(name, revision=revision, timeout=10)
        return _snapshot(name, revision, local_files_only=False)
    except Exception as error:
        raise FileNotFoundError(
            f"model {name}: no such file or folder{hint}, and not to be had from the Hugging Face"
            f" hub ({first_line(error)})"
        ) from error


def _snapshot(name: str, revision: str | None, local_files_only: bool) -> Path:
    return Path(
        snapshot_download(
            name,
            revision=revision,
            allow_patterns=_HUB_FILES,
            local_files_only=local_files_only,
        )
    )


def _open(
    path: Path, tokenizer_folder: Path | None
) -> tuple[Weights, PreTrainedTokenizerFast | None]:
    """The weights behind a path, still on disk, and the tokenizer."""
    given = None if tokenizer_folder is None else read_tokenizer(tokenizer_folder)
    file = _main_file(path)
    if file.suffix == ".ckpt":
        checkpoint = read_checkpoint(file)
        if given is None or tokenizer_folder is None:
            return checkpoint.weights, checkpoint_tokenizer(file, checkpoint.tokenizer)
        check_tokenizer(given, checkpoint.tokenizer, tokenizer_folder)
        return checkpoint.weights, given
    if file.suffix == ".gguf":
        return gguf_weights(file), given or read_tokenizer(file.parent, file.name)
    weights = folder_weights(path)
    if given is None and holds_tokenizer(path):
        given = read_tokenizer(path)
    return weights, given


def _main_file(path: Path) -> Path:
    """What decides how a path is read: a checkpoint, a GGUF file or a config."""
    if path.is_file():
        refuse_pickled([path])
        if path.suffix in (".ckpt", ".gguf"):
            return path
        raise ValueError(f"{path} is neither .ckpt nor .gguf; of other models give the folder")
    for checkpoints in (path / "checkpoints", path):
        for name in ("best.ckpt", "last.ckpt"):
            if (checkpoints / name).is_file():
                return checkpoints / name
    if (path / "config.json").is_file():
        return path / "config.json"
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) > 1:
        raise ValueError(f"{path} holds {len(ggufs)} GGUF files; name one, such as {ggufs[0]}")
    if ggufs:
        return ggufs[0]
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(
        f"{path} holds none of config.json, {ADAPTER_CONFIG}, a .gguf file or checkpoints;"
        f" found {found}"
    )


def _checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name in DTYPES:
        return DTYPES[name]
    raise ValueError(f"dtype {name} is none of {', '.join(DTYPES)}{nearest(name, DTYPES)}")


def _check_vocabulary(tokenizer: PreTrainedTokenizerFast | None, network: PreTrainedModel) -> None:
    if tokenizer is None:
        return
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    if num_tokens > network.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {num_tokens} tokens, the network {network.config.vocab_size}"
        )
