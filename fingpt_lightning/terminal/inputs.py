"""What a command is given to read: refused where it is missing, before anything heavy is imported.

The commands call these functions at the place where they read, and once more before they import
torch: a mistake is named at once, in the same words.
"""

import functools
import glob
import math
import re
from collections.abc import Sequence
from pathlib import Path

from fingpt_lightning.terminal.messages import (
    first_line,
    nearest,
    nearest_name,
    nearest_sibling,
    wrong_ending,
)

FILES_OF_ONE_MODEL = (".ckpt", ".gguf")
"""Suffixes of files that hold a whole model: never the name of one on the hub."""
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|hpu|xla|mtia)(:\d+)?")
_CONFIGS = ("config.json", "adapter_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Of which a folder with a tokenizer has one."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
TEMPLATE_CHOICES = ("auto", "none")
"""What ``chat_template`` may be beside a file."""
_PROMPT_FORMS = (".txt", ".jsonl")
TASK_PREFIX = "task:"
"""What the names of tasks begin with in a calibration."""
_WEIGHTED = re.compile(r"(?P<name>.+)=(?P<weight>[^=/]*)")
HUB_PREFIX = "hf://"
"""What names of data sets on the hub begin with."""


def refuse_missing_texts(paths: str | Sequence[str], key: str) -> None:
    """Refuses text files of which one is missing, and globs that match no file.

    Args:
        paths: Files, folders or globs; ``hf://`` names are not looked up.
        key: Setting that the paths come from, for the messages.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A path is empty, or neither a file nor a folder.
    """
    for text in [paths] if isinstance(paths, str) else paths:
        if not text:  # which a path takes for the current folder
            raise ValueError(f"{key}: an empty path")
        if text.startswith(HUB_PREFIX):
            continue
        path = Path(text).expanduser()
        if path.is_dir() or path.is_file():
            continue
        if path.exists():  # reading it could wait forever, or never end
            raise ValueError(f"{key}: {path} is neither a file nor a folder")
        if not glob.has_magic(text):
            raise FileNotFoundError(f"{key}: {path} does not exist{nearest_name(path)}")
        if not any(Path(name).is_file() for name in glob.iglob(str(path), recursive=True)):  # noqa: PTH207
            raise FileNotFoundError(f"{key}: no file matches {path}")


def refuse_missing_tokenizer(name: str) -> None:
    """Refuses a tokenizer that is neither a local folder nor to be had from the Hugging Face hub.

    Args:
        name: Folder, GGUF file or hub name.

    Raises:
        FileNotFoundError: There is no such tokenizer.
        ValueError: It is a file of another kind.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() or (folder.suffix == ".gguf" and folder.is_file()):
        return
    if folder.exists():
        raise ValueError(f"tokenizer: {folder} is a file; give its folder")
    if not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"tokenizer: no folder {folder}{nearest_name(folder)}")
    if _is_cached(name, (*TOKENIZER_FILES, "tokenizer_config.json")):
        return
    if (reason := _reason_of_hub(name, None)) is not None:
        raise FileNotFoundError(
            f"tokenizer: {name} is neither a local folder nor to be had from the Hugging Face hub"
            f" ({reason}){_nearest(folder)}"
        )


def refuse_missing_model(name: str, revision: str | None = None) -> None:
    """Refuses a model that is neither a local path nor to be had from the Hugging Face hub.

    Args:
        name: Path or hub name.
        revision: Branch, tag or commit of a hub name.

    Raises:
        FileNotFoundError: There is no such model.
    """
    path = Path(name).expanduser()
    if path.exists():
        return
    if path.suffix in FILES_OF_ONE_MODEL or not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"model {name}: no such file or folder{_nearest(path)}")
    if not _is_cached(name, _CONFIGS, revision):
        refuse_unknown_on_hub(name, revision)


def _is_cached(name: str, files: Sequence[str], revision: str | None = None) -> bool:
    """Whether one of some files of a hub name has been fetched before."""
    from huggingface_hub import try_to_load_from_cache

    cached = (try_to_load_from_cache(name, file, revision=revision) for file in files)
    return any(isinstance(path, str) for path in cached)


def refuse_unknown_on_hub(name: str, revision: str | None = None) -> None:
    """Refuses a name that the hub does not know, or when it cannot be reached.

    One request, for without it loading repeats each failed request for most of a minute.

    Raises:
        FileNotFoundError: The model cannot be had.
    """
    if (reason := _reason_of_hub(name, revision)) is not None:
        raise FileNotFoundError(
            f"model {name}: no such file or folder{_nearest(Path(name))}, and not to be had from"
            f" the Hugging Face hub ({reason})"
        )


@functools.cache
def _reason_of_hub(name: str, revision: str | None) -> str | None:
    """Why the hub does not give a model; None where it does. Asked once per process."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, revision=revision, timeout=10)
    except Exception as error:  # of many libraries; each means that the model cannot be had
        return first_line(error)
    return None


def refuse_missing_adapter(path: str | Path) -> None:
    """Refuses an adapter that is not there.

    Raises:
        FileNotFoundError: There is no such file or folder.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"adapter {path}: no such file or folder{_nearest(path)}")


def refuse_unknown_device(name: str) -> None:
    """Refuses what cannot be the name of a device; whether this machine has it is not asked.

    Raises:
        ValueError: It is not such a name.
    """
    if _DEVICE.fullmatch(name) is None:
        raise ValueError(f"device {name!r} is not cpu, cuda or a name such as cuda:1")


def refuse_missing_prompts(file: Path) -> None:
    """Refuses a file of prompts that is missing, or of another form.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a folder, or neither of lines nor of JSON lines.
    """
    if not file.is_file():
        if file.is_dir():
            raise ValueError(f"prompts: {file} is a folder, not a file")
        there = [path.name for path in file.parent.glob("*")] if file.parent.is_dir() else []
        raise FileNotFoundError(f"prompts: no file {file}{nearest(file.name, there)}")
    if file.suffix.lower() not in _PROMPT_FORMS:  # of a table each line would be a prompt
        raise ValueError(f"prompts: {wrong_ending(file, _PROMPT_FORMS)}")


def refuse_missing_template(choice: str) -> None:
    """Refuses a chat template that is neither one of `TEMPLATE_CHOICES` nor a file.

    Raises:
        FileNotFoundError: There is no such file.
    """
    path = Path(choice).expanduser()
    if choice not in TEMPLATE_CHOICES and not path.is_file():
        near = nearest(choice, TEMPLATE_CHOICES) or nearest_name(path)
        raise FileNotFoundError(f"chat_template {choice!r} is neither auto, none nor a file{near}")


def refuse_file_as_cache(folder: str | Path) -> None:
    """Refuses a file in place of the folder of a cache.

    Raises:
        NotADirectoryError: It is a file.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"cache_dir {folder} is a file, not a folder")


def refuse_missing_run(folder: Path) -> None:
    """Refuses a path that is not the folder of a run, a sweep or an evaluation.

    Raises:
        FileNotFoundError: It is not a folder.
    """
    if not folder.is_dir():
        parent = folder.parent
        beside = parent.iterdir() if parent.is_dir() else ()
        siblings = [path.name for path in beside if path.is_dir()]
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}{nearest(folder.name, siblings)}")


def _nearest(path: Path) -> str:
    near = nearest_sibling(path)
    return "" if near is None else f"; did you mean {near}?"


def weighted_name(word: str) -> tuple[str, float]:
    """Name and weight of a part of a mixture; a file of that very name has weight 1.

    >>> weighted_name("task:fpb=0.5"), weighted_name("texts/a.jsonl")
    (('task:fpb', 0.5), ('texts/a.jsonl', 1.0))

    Raises:
        ValueError: The weight is not above 0.
    """
    match = _WEIGHTED.fullmatch(word)
    if match is None or Path(word).expanduser().exists():
        return word, 1.0
    try:
        weight = float(match["weight"])
    except ValueError:
        return word, 1.0  # a path with an equals sign
    if not 0 < weight < math.inf:
        raise ValueError(f"calibration {word}: weight {match['weight']} is not above 0")
    return match["name"], weight
