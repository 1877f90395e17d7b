"""The parts that a model's name stands for, found once: weights, adapter, tokenizer, base, commit.

Nothing but small configs is read here; `fingpt_lightning.models.loading` builds from the result.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download

from fingpt_lightning.models.formats.checkpoint import CHECKPOINT, read_adapter_checkpoint
from fingpt_lightning.models.formats.hf_folder import CONFIG, SAFETENSORS, SAFETENSORS_INDEX
from fingpt_lightning.models.formats.peft_adapter import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    BEST_ADAPTER_FOLDER,
    Base,
    adapter_digest,
    holds_adapter,
    read_adapter_config,
)
from fingpt_lightning.models.formats.safetensors_files import refuse_pickled
from fingpt_lightning.models.formats.tokenizer import holds_tokenizer, tokenizer_of_checkpoint
from fingpt_lightning.terminal.inputs import (
    refuse_missing_adapter,
    refuse_missing_model,
    refuse_missing_tokenizer,
    refuse_unknown_on_hub,
)
from fingpt_lightning.terminal.messages import first_line

GGUF = ".gguf"
"""Suffix of the other kind of one file, beside a checkpoint, that holds a network."""
_CHECKPOINTS = ("checkpoints/best.ckpt", "best.ckpt", "checkpoints/last.ckpt", "last.ckpt")
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja", "README.md"]


@dataclass(frozen=True)
class ModelSource:
    """Where the parts of a model are.

    Args:
        name: Path or hub name that was resolved.
        weights: Hugging Face folder, checkpoint or GGUF file of the network.
        adapter: Folder or checkpoint of the adapter that belongs on the network, if any.
        tokenizer: Folder or GGUF file of the tokenizer; None where none lies beside the weights.
            A checkpoint may name one that lies elsewhere.
        commit: Commit of a network from the hub; None where the files are local.
        base: Path or hub name of the network itself, whatever adapter led there.
    """

    name: str
    weights: Path
    adapter: Path | None
    tokenizer: Path | None
    commit: str | None
    base: Base

    @property
    def folder(self) -> Path:
        """The folder of the weights."""
        return self.weights if self.weights.is_dir() else self.weights.parent

    def without_adapter(self) -> "ModelSource":
        """The base alone."""
        return replace(self, adapter=None)


class _Place(NamedTuple):
    path: Path
    commit: str | None


def resolve_source(
    name: str | Path,
    *,
    adapter: str | Path | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
) -> ModelSource:
    """Finds the parts of a model.

    Args:
        name: A Hugging Face folder or hub name, the folder of a PEFT adapter (which leads to its
            base), a GGUF file or its folder, a checkpoint (of a finetuning an adapter), or a run
            folder, whose best checkpoint is taken, or its last where none is marked best. What
            lies as ``adapter/`` in a Hugging Face folder belongs to it.
        adapter: Adapter for the network as in `find_adapter`, in place of one beside it.
        tokenizer: Folder of the tokenizer, in place of the model's own.
        revision: Branch, tag or commit of a hub name.

    Raises:
        FileNotFoundError: There is nothing by that name, or a part of it is missing.
        ValueError: The place does not hold a model, or its adapter requests what is not supported.
    """
    place, base = _find(str(name), revision), Base(str(name), revision)
    own = adapter_at(place.path)
    if own is not None and not _is_beside(own, place.path):
        if adapter is not None:
            raise ValueError(f"adapter {adapter}: {name} is an adapter itself")
        adapter, base = own, read_adapter_config(own).base
        try:
            place = _find(base.path, base.revision)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"the base of the adapter {own}: {error}") from error
        under = adapter_at(place.path)
        if under is not None and not _is_beside(under, place.path):
            raise ValueError(f"{own}: its base {base.path} is an adapter too")
    elif adapter is None:
        adapter = own
    if adapter is not None:
        adapter = find_adapter(adapter)
        read_adapter_config(adapter)
    weights = _weights_at(place.path)
    if tokenizer is not None:
        refuse_missing_tokenizer(str(tokenizer))
        found: Path | None = Path(tokenizer).expanduser()
    elif adapter is not None and (its_own := _tokenizer_beside(adapter)) is not None:
        found = its_own
    else:
        found = _tokenizer_of(weights)
    return ModelSource(str(name), weights, adapter, found, place.commit, base)


def adapter_at(path: Path) -> Path | None:
    """The adapter that a path is, or has.

    That is the folder or checkpoint itself, ``adapter/`` beside the weights of a network, or what a
    finetuning has learned so far: the adapter of its best checkpoint where there is one.
    """
    if holds_adapter(path):
        return path
    names: tuple[str, ...] = (ADAPTER_FOLDER,)
    if not (path / CONFIG).is_file():
        # A folder beside checkpoints is written when training ends, and may be of a run before.
        names = (*_CHECKPOINTS[:2], BEST_ADAPTER_FOLDER, *_CHECKPOINTS[2:], ADAPTER_FOLDER)
    return next((path / name for name in names if holds_adapter(path / name)), None)


def find_adapter(path: str | Path) -> Path:
    """The folder or checkpoint of an adapter that is named.

    Args:
        path: Folder in PEFT's format, checkpoint of a finetuning, or folder of its run.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: A checkpoint is not one of adapters, or cannot be read.
    """
    refuse_missing_adapter(path)
    path = Path(path).expanduser()
    if (found := adapter_at(path)) is not None:
        return found
    if path.suffix == CHECKPOINT and path.is_file():
        read_adapter_checkpoint(path)
    raise FileNotFoundError(f"adapter {path} has no {ADAPTER_CONFIG}")


def named_adapter_digest(path: str | Path | None) -> str | None:
    """The digest of the weights of an adapter that is named; None where none is.

    Args:
        path: Path as in `find_adapter`, or None.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: A checkpoint is not one of adapters, or cannot be read.
    """
    return None if path is None else adapter_digest(find_adapter(path))


def tokenizer_of_model(name: str) -> str | None:
    """Where the tokenizer of a model is; None where its files have none.

    Args:
        name: Name as in `resolve_source`; anything but a local path counts as a hub name, which is
            that of its tokenizer too and is not looked up.

    Raises:
        FileNotFoundError: A local folder holds no model.
        ValueError: The place does not hold a model.
    """
    path = Path(name).expanduser()
    if not path.exists():
        return name
    adapter = adapter_at(path)
    if adapter is not None and (own := _tokenizer_beside(adapter)) is not None:
        return str(own)
    if adapter is not None and not _is_beside(adapter, path):
        return tokenizer_of_model(read_adapter_config(adapter).base.path)
    found = _tokenizer_of(_weights_at(path))
    return None if found is None else str(found)


def _tokenizer_beside(adapter: Path) -> Path | None:
    """The folder of the tokenizer that was saved with an adapter."""
    if adapter.is_file():
        return tokenizer_of_checkpoint(adapter)
    return adapter if holds_tokenizer(adapter) else None


def _is_beside(adapter: Path, folder: Path) -> bool:
    """Whether an adapter lies beside the weights of its base, in a folder of a network."""
    return adapter != folder and (folder / CONFIG).is_file()


def _find(name: str, revision: str | None) -> _Place:
    path = Path(name).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision {revision}: {name} is a local path, which has none")
        return _Place(path, None)
    refuse_missing_model(name, revision)
    folder = _hub_folder(name, revision)
    return _Place(folder, folder.name)


def _hub_folder(name: str, revision: str | None) -> Path:
    """The snapshot of a model in the local cache of the hub, fetched where it is not there."""
    try:
        folder = _snapshot(name, revision, local_files_only=True)
        if any((folder / file).is_file() for file in (SAFETENSORS, SAFETENSORS_INDEX)):
            return folder  # else only its tokenizer has been used before
    except OSError:
        pass
    refuse_unknown_on_hub(name, revision)
    try:
        return _snapshot(name, revision, local_files_only=False)
    except Exception as error:
        raise FileNotFoundError(
            f"model {name}: no such file or folder, and not to be had from the Hugging Face"
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


def _weights_at(path: Path) -> Path:
    """The file or folder that a path means: a checkpoint, a GGUF file or a Hugging Face folder."""
    if path.is_file():
        refuse_pickled([path])
        if path.suffix in (CHECKPOINT, GGUF):
            return path
        raise ValueError(f"{path} is neither .ckpt nor .gguf; of other models give the folder")
    for name in _CHECKPOINTS:
        if (path / name).is_file():
            return path / name
    if (path / CONFIG).is_file():
        return path
    ggufs = sorted(path.glob(f"*{GGUF}"))
    if len(ggufs) > 1:
        raise ValueError(f"{path} holds {len(ggufs)} GGUF files; name one, such as {ggufs[0]}")
    if ggufs:
        return ggufs[0]
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(
        f"{path} holds none of {CONFIG}, {ADAPTER_CONFIG}, a .gguf file or checkpoints;"
        f" found {found}"
    )


def _tokenizer_of(weights: Path) -> Path | None:
    if weights.suffix == GGUF and weights.is_file():
        return weights
    if weights.is_file():
        return tokenizer_of_checkpoint(weights)
    return weights if holds_tokenizer(weights) else None
