"""The tokenizer that belongs to a model: read from its folder, known again by its digest."""

import hashlib
import os
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fingpt_lightning.models.formats.peft_adapter import ADAPTER_FOLDER
from fingpt_lightning.terminal.messages import is_panic

_PROBE = (
    "Profit rose 5 % to \N{EURO SIGN}1.5 m: \N{LATIN SMALL LIGATURE FI}ne \N{CIRCLED DIGIT ONE}"
)
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def holds_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer is among the files of a folder."""
    return any((folder / name).is_file() for name in _FILES)


def tokenizer_of_model(model: str) -> str | None:
    """Where the tokenizer of a model is, unread; None where its files have none.

    Args:
        model: A Hugging Face or adapter folder, a run folder, a checkpoint, a GGUF file or its
            folder; what is none of them counts as a hub name, which is its tokenizer's too.
    """
    path = Path(model).expanduser()
    if not path.exists():
        return model
    if path.is_file():
        if path.suffix == ".gguf":
            return str(path)
        folders = [path.absolute().parents[up] / "tokenizer" for up in (0, 1)]
    else:
        folders = [path / "tokenizer", path, path / ADAPTER_FOLDER]
    found = [str(folder) for folder in folders if holds_tokenizer(folder)]
    if not found and path.is_dir():
        found = [str(file) for file in path.glob("*.gguf")]
    return found[0] if found else None


def read_tokenizer(folder: Path, gguf_file: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a folder, or of a GGUF file in it, without truncation and padding.

    Raises:
        ValueError: There is none that loads, or no fast implementation of it.
    """
    where = folder / gguf_file if gguf_file else folder
    more = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **more)
    except BaseException as error:  # of many kinds, and all say that the files are wrong
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{where} holds no tokenizer that loads ({reason})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{where}: its tokenizer has no fast implementation")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    _try_out(tokenizer, where)
    return tokenizer


def _try_out(tokenizer: PreTrainedTokenizerFast, where: Path) -> None:
    """Raises where damage lets the code behind a tokenizer panic at a text."""
    # The panic describes itself at length before it is an exception.
    standard_error, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        tokenizer.backend_tokenizer.encode(_PROBE)
    except BaseException as error:
        if is_panic(error):
            raise ValueError(f"{where}: its tokenizer is damaged ({error})") from None
        if not isinstance(error, Exception):
            raise
    finally:
        os.dup2(standard_error, 2)
        os.close(standard_error)
        os.close(nowhere)


def begin_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The tokens that the tokenizer puts before a text; none for most."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a", add_special_tokens=True)
    return tuple(whole[: whole.index(bare[0])])


def tokenizer_sha256(tokenizer: PreTrainedTokenizerFast) -> str:
    """The digest of all that decides the tokens: the contents of ``tokenizer.json`` and the end."""
    contents = f"{tokenizer.eos_token_id} {tokenizer.backend_tokenizer.to_str()}"
    return hashlib.sha256(contents.encode()).hexdigest()


def checkpoint_tokenizer(
    file: Path, reference: dict[str, str | int] | None
) -> PreTrainedTokenizerFast | None:
    """The tokenizer that a checkpoint was trained with.

    That is ``tokenizer/`` in its folder or, as runs have it, in the folder above; without these
    the folder that the checkpoint names. None where no folder is left.

    Args:
        file: The checkpoint.
        reference: What it says of its tokenizer.

    Raises:
        ValueError: The tokenizer beside the checkpoint is not the one it was trained with.
    """
    named = [] if reference is None else [Path(str(reference["name_or_path"]))]
    beside = [file.absolute().parents[up] / "tokenizer" for up in (0, 1)]
    for folder in (*beside, *named):
        if holds_tokenizer(folder):
            tokenizer = read_tokenizer(folder)
            check_tokenizer(tokenizer, reference, folder)
            return tokenizer
    return None


def check_tokenizer(
    tokenizer: PreTrainedTokenizerFast, reference: dict[str, str | int] | None, folder: Path
) -> None:
    """Raises unless a tokenizer is the one that a checkpoint names.

    Raises:
        ValueError: It is another.
    """
    if reference is not None and tokenizer_sha256(tokenizer) != reference["sha256"]:
        raise ValueError(
            f"the tokenizer {folder} differs from the one of {reference['vocabulary_size']} tokens"
            f" that the checkpoint was trained with, {reference['name_or_path']}"
        )
