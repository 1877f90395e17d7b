"""The tokenizer that belongs to a model: read from its folder, known again by its digest."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fingpt_lightning.files import read_json
from fingpt_lightning.terminal.inputs import TOKENIZER_FILES
from fingpt_lightning.terminal.messages import first_line, is_panic

_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Names of the class that computes what ``tokenizer.json`` describes, and nothing else."""
_PROBE = (
    "Profit rose 5 % to \N{EURO SIGN}1.5 m: \N{LATIN SMALL LIGATURE FI}ne \N{CIRCLED DIGIT ONE}"
)
MAX_ADDED_TOKENS = 50_000
"""With as many loading takes some seconds; models have some hundreds."""
_USES_CHAT_TEMPLATE = "fingpt_uses_chat_template"
"""The key of ``tokenizer_config.json`` that says whether prompts are rendered as chats."""


def holds_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer is among the files of a folder."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def read_tokenizer(folder: Path, gguf_file: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a folder, or of a GGUF file in it, without truncation and padding.

    Raises:
        ValueError: There is none that loads, or no fast implementation of it.
    """
    where = folder / gguf_file if gguf_file else folder
    if not gguf_file:
        check_added_tokens(folder)
    more: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    # By a network's family transformers may build another tokenizer than the file describes.
    kind = PreTrainedTokenizerFast if not gguf_file and _is_plain(folder) else AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(str(folder), trust_remote_code=False, **more)
    except BaseException as error:  # of many kinds, and all mean that the files are wrong
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise ValueError(f"{where} {not_loaded(where, error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{where}: its tokenizer has no fast implementation")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    try_out(tokenizer, where)
    return tokenizer


def not_loaded(where: Path, error: BaseException) -> str:
    """The end of the message on a tokenizer that does not load.

    Args:
        where: Folder or GGUF file of the tokenizer, or hub name.
        error: What the library raised.
    """
    if where.is_dir() and not holds_tokenizer(where):  # of which it writes at length
        found = ", ".join(sorted(path.name for path in where.iterdir())[:8]) or "nothing"
        return f"holds none of {', '.join(TOKENIZER_FILES)}; found {found}"
    return f"holds no tokenizer that loads ({first_line(error)})"


def _is_plain(folder: Path) -> bool:
    """Whether a folder describes its tokenizer whole, in a file of the library tokenizers."""
    config = folder / "tokenizer_config.json"
    if not (config.is_file() and (folder / "tokenizer.json").is_file()):
        return False
    return read_json(config).get("tokenizer_class") in _PLAIN_CLASSES


def check_added_tokens(folder: Path) -> None:
    """Checks that a tokenizer loads within seconds: that takes the square of its added tokens.

    Raises:
        ValueError: It has more than `MAX_ADDED_TOKENS`.
    """
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            number = (folder / name).read_bytes().count(b'"content"')
            if number > MAX_ADDED_TOKENS:
                raise ValueError(
                    f"{folder / name}: {number:,} added tokens, more than {MAX_ADDED_TOKENS:,}"
                )


def try_out(tokenizer: PreTrainedTokenizerFast, where: Path) -> None:
    """Raises where damage lets the code behind a tokenizer panic at a text.

    Args:
        tokenizer: Tokenizer that has been loaded.
        where: Folder or file of the tokenizer.

    Raises:
        ValueError: It panics.
    """
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
    return tuple(whole[: whole.index(bare[0])]) if bare else ()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerFast) -> str:
    """The digest of all that decides the tokens: the contents of ``tokenizer.json`` and the end."""
    contents = f"{tokenizer.eos_token_id} {tokenizer.backend_tokenizer.to_str()}"
    return hashlib.sha256(contents.encode()).hexdigest()


def own_chat_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The chat template that came with a tokenizer; of several the default."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default")
    return str(found) if found else None


def uses_chat_template(tokenizer: PreTrainedTokenizerFast) -> bool | None:
    """Whether prompts are rendered as chats; None where nobody has said so yet."""
    found = tokenizer.init_kwargs.get(_USES_CHAT_TEMPLATE)
    return found if isinstance(found, bool) else None


def chat_template_in_use(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The chat template that prompts are rendered with; None where they are plain texts."""
    return own_chat_template(tokenizer) if uses_chat_template(tokenizer) else None


def use_chat_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> None:
    """Decides how prompts are rendered, which is saved with the tokenizer.

    Args:
        tokenizer: Tokenizer of a network.
        template: Template in Jinja, which becomes the tokenizer's own; None for plain texts.
    """
    tokenizer.init_kwargs[_USES_CHAT_TEMPLATE] = template is not None
    if template is not None:
        tokenizer.chat_template = template


def stored_chat_template(folder: Path) -> str | None:
    """The template in use that is saved with a tokenizer: "" where prompts are plain texts.

    None where the folder does not say; nothing but two small files is read.
    """
    config, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    uses = read_json(config).get(_USES_CHAT_TEMPLATE) if config.is_file() else None
    if uses is True and template.is_file():
        return template.read_text(encoding="utf-8")
    return "" if uses is False else None


def tokenizer_of_checkpoint(file: Path) -> Path | None:
    """Where the tokenizer of a checkpoint is: in its folder or, as runs have it, the one above."""
    folders = (file.absolute().parents[up] / "tokenizer" for up in (0, 1))
    return next((folder for folder in folders if holds_tokenizer(folder)), None)


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


def write_tokenizer(tokenizer: PreTrainedTokenizerFast | None, folder: Path) -> None:
    """Writes the tokenizer, where there is one."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def num_rows_reached(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows of an embedding that ordinary text needs.

    A token that was added to the vocabulary, such as ``[PAD]``, is reached only by a text that
    spells it, and counts only where the tokenizer puts it into every text.
    """
    added = set(tokenizer.get_added_vocab().values())
    everywhere = {*begin_tokens(tokenizer), tokenizer.eos_token_id, tokenizer.unk_token_id}
    ids = set(tokenizer.get_vocab().values())
    return max((ids - added) | (everywhere & ids), default=-1) + 1


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, num_rows: int) -> None:
    """Raises where ordinary text has tokens without a row in a network.

    Raises:
        ValueError: It has.
    """
    if (reached := num_rows_reached(tokenizer)) > num_rows:
        raise ValueError(f"the tokenizer has {reached} tokens, the network {num_rows}")


def check_tokens(
    tokenizer: PreTrainedTokenizerFast,
    rows: Iterable[Sequence[int]],
    num_rows: int,
    where: str = "a text",
) -> None:
    """Raises where a text has reached a token without a row in the network.

    Args:
        tokenizer: Tokenizer of the network.
        rows: Rows of the texts' tokens.
        num_rows: Number of rows of the network's embedding.
        where: Name of the tokenized text, for messages.

    Raises:
        ValueError: One has; the message names the token.
    """
    highest = max((max(row, default=-1) for row in rows), default=-1)
    if highest >= num_rows:
        raise ValueError(
            f"{where} has the token {tokenizer.convert_ids_to_tokens(highest)!r}, id {highest}, and"
            f" the network knows {num_rows} tokens: take it out of the text"
        )
