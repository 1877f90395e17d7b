"""The configs and sweeps that come with the package, found by name.

They are in ``configs/`` and ``sweeps/`` at the top of the repository, and inside the package in
a wheel.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fingpt_lightning.cli.errors import ConfigError
from fingpt_lightning.terminal.messages import nearest_of, nearest_sibling

CONFIGS, SWEEPS = "configs", "sweeps"
_SUFFIX = ".yaml"
_CONFIG_OPTIONS = ("--config", "-c")


class ShippedFile(NamedTuple):
    """A runnable config, an overlay or a sweep.

    Attributes:
        kind: Folder of the file, ``configs`` or ``sweeps``.
        name: Path below that folder, without ``.yaml``.
        path: Absolute path of the file.
    """

    kind: str
    name: str
    path: Path

    def question(self) -> str:
        """The question that the head of the file claims to answer."""
        head = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            head.append(line.removeprefix("#").strip())
        found = re.match(r"Question: (.*?\?)", " ".join(head))
        return found[1] if found else ""


def shipped_folder(kind: str) -> Path:
    """Folder of ``configs`` or ``sweeps``: inside the package of a wheel, beside it in a checkout.

    Raises:
        FileNotFoundError: It is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    places = (package / kind, package.parent / kind)
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(f"no folder {places[0]}: the package was installed without it")


def shipped_files(kind: str) -> list[ShippedFile]:
    """The files of a kind that a command takes: runnable ones, overlays, smoke-test configs.

    The blocks in ``model/``, ``data/`` and ``trainer/`` are values, and are left out.
    """
    folder = shipped_folder(kind)
    paths = [*folder.glob(f"*{_SUFFIX}"), *folder.glob(f"overlays/*{_SUFFIX}")]
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}
    in_order = sorted(names, key=lambda name: (name.startswith("debug_"), "/" in name, name))
    return [ShippedFile(kind, name, names[name]) for name in in_order]


def find_shipped(name: str, kind: str) -> ShippedFile | None:
    """The shipped file with that name, or None.

    Args:
        name: Name with or without ``.yaml``, with or without ``configs/`` or ``sweeps/`` before it.
        kind: Folder of the file, ``configs`` or ``sweeps``.
    """
    return next((file for file in shipped_files(kind) if file.name == _bare(name, kind)), None)


def nearest_shipped(name: str, *kinds: str) -> str:
    """``; did you mean X?`` for the most similar name, or the command that lists all names.

    Args:
        name: Name as given.
        kinds: Folders to search: ``configs``, ``sweeps`` or both.
    """
    names = [file.name for kind in kinds for file in shipped_files(kind)]
    known = {full.rpartition("/")[2]: full for full in names} | {full: full for full in names}
    for kind in kinds:
        name = _bare(name, kind)
    found = name if name in known else nearest_of(name, known)  # the last part of a name alone
    return "; fingpt configs lists them" if found is None else f"; did you mean {known[found]}?"


def find_file(given: str, kind: str, option: str) -> Path:
    """The file that a word of the command line refers to.

    A file of that name, else one with ``.yaml`` appended, else the shipped file of that name.

    Args:
        given: Path or name.
        kind: Folder of the file, ``configs`` or ``sweeps``.
        option: Name of the option, for the message.

    Raises:
        ConfigError: There is no such file.
    """
    for path in (Path(given), Path(f"{given}{_SUFFIX}")):
        if path.is_file():
            return path
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{option} {given}: {path} is neither a file nor a folder")
    if (shipped := find_shipped(given, kind)) is not None:
        return shipped.path
    if Path(given).is_dir():
        raise ConfigError(f"{option} {given} is a folder, not a file")
    sibling = nearest_sibling(Path(given))
    hint = f"; did you mean {sibling}?" if sibling is not None else nearest_shipped(given, kind)
    what = f"no such file, and no shipped {kind.removesuffix('s')} of that name"
    raise ConfigError(f"{option} {given}: {what}{hint}")


def with_config_files(words: Sequence[str]) -> list[str]:
    """The words of a command line, with the value of each ``--config`` replaced by its file.

    A value that is YAML itself stays as it is.

    Raises:
        ConfigError: A config is not found.
    """
    found, is_value = [], False
    for word in words:
        option, equals, value = word.partition("=")
        if is_value:
            found.append(_config(word))
        elif equals and option in _CONFIG_OPTIONS:
            found.append(f"{option}={_config(value)}")
        else:
            found.append(word)
        is_value = word in _CONFIG_OPTIONS
    return found


def blocks_of(path: Path) -> list[Path]:
    """The files that a config names as blocks, relative to its folder, each once."""
    import yaml  # --help does without it

    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    named = [value for value in content.values() if isinstance(value, str)]
    blocks = [Path(value) for value in named if value.endswith(_SUFFIX)]
    return list(dict.fromkeys(blocks))


def _bare(name: str, kind: str) -> str:
    return name.removeprefix(f"{kind}/").removesuffix(_SUFFIX)


def _config(given: str) -> str:
    is_yaml = re.search(r"[{\n]|:\s", given) is not None
    return given if is_yaml else str(find_file(given, CONFIGS, "--config"))
