"""``fingpt configs``: what comes with the package, by name, and a copy of it to change."""

import argparse
from pathlib import Path

from fingpt_lightning.cli.errors import ConfigError
from fingpt_lightning.cli.shipped import (
    CONFIGS,
    SWEEPS,
    ShippedFile,
    blocks_of,
    find_shipped,
    nearest_shipped,
    shipped_files,
    shipped_folder,
)
from fingpt_lightning.files import refuse_blocked, write_whole

_USES = {CONFIGS: "fingpt fit --config NAME", SWEEPS: "fingpt sweep NAME"}


def run(options: argparse.Namespace) -> None:
    """Lists the shipped files, shows one or copies it.

    Args:
        options: Result of `configs_options.parse_options`.

    Raises:
        ConfigError: No shipped file has that name.
        FileExistsError: A file in the folder differs from the one that would be copied there.
    """
    if options.name is None:
        print("\n\n".join(_listed(kind) for kind in _USES))
        return
    file = _find(options.name)
    if options.copy is None:
        print(file.path.read_text(encoding="utf-8"), end="")
        return
    copies = copy(file, options.copy)
    for path in copies:
        print(path)
    print(f"use it: {_USES[file.kind].replace('NAME', str(copies[0]))}")


def copy(file: ShippedFile, folder: Path) -> list[Path]:
    """Copies a shipped file and the blocks that it names; their relative places are kept.

    Args:
        file: Config, overlay or sweep.
        folder: Folder to copy to; made where it does not exist.

    Returns:
        Paths of the copies, that of ``file`` first.

    Raises:
        FileExistsError: A file there differs; nothing is copied then.
        NotADirectoryError: ``folder`` is a file, or lies below one.
        PermissionError: It cannot be written to.
    """
    root = shipped_folder(file.kind)
    sources = [file.path]
    sources += [file.path.parent / block for block in blocks_of(file.path)]
    copies = {folder / source.relative_to(root): source.read_bytes() for source in sources}
    for path, content in copies.items():
        refuse_blocked(path, "copy")
        if path.exists() and not (path.is_file() and path.read_bytes() == content):
            raise FileExistsError(f"{path} is there already and differs; copy to another folder")
    for path, content in copies.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    return list(copies)


def _find(name: str) -> ShippedFile:
    for kind in _USES:
        if (found := find_shipped(name, kind)) is not None:
            return found
    raise ConfigError(f"no shipped config or sweep {name!r}{nearest_shipped(name, *_USES)}")


def _listed(kind: str) -> str:
    files = shipped_files(kind)
    width = max(len(file.name) for file in files) + 2
    lines = [f"  {file.name:{width}}{file.question()}" for file in files]
    return "\n".join([f"{kind}, for {_USES[kind]}:", *lines])
