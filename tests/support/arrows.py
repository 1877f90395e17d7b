"""Reads the imports of the source tree and finds those that point the wrong way.

A room is a folder of ``fingpt_lightning``, a module at its top, or the package ``callbacks``.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("fingpt_lightning", "callbacks")

# From the top of the house to its ground. A room imports rooms of lower rows only, so that
# nothing imports a benchmark.
ROWS = (
    ("benchmarks",),
    (
        "__main__",
        "cli",
        "config_errors",
        "lightning_cli",
        "plan_command",
        "sweep_command",
        "wandb_runs",
    ),
    ("sweeping", "reporting", "deploy", "callbacks"),
    ("modules", "strategies", "data", "evaluation"),
    ("pipeline", "models", "tasks"),
    ("low_rank", "profiling"),
    ("command_line", "progress"),
    ("nearest", "new_folders", "settings", "units", "whole_files"),
)
# The program is one room of several files.
PROGRAM = ROWS[1]
# Arrows within a row: only to this module.
LEVEL_ARROWS = {("modules", "data"): "fingpt_lightning.data.batch"}

_LIGHTNING_AND_WANDB = ("lightning", "lightning_fabric", "pytorch_lightning", "wandb")
# What the files below a path never import.
FOREIGN = {
    "fingpt_lightning/low_rank": _LIGHTNING_AND_WANDB,
    "fingpt_lightning/models": _LIGHTNING_AND_WANDB,
    "fingpt_lightning/pipeline": _LIGHTNING_AND_WANDB,
    "fingpt_lightning/profiling": _LIGHTNING_AND_WANDB,
    "fingpt_lightning/tasks": (*_LIGHTNING_AND_WANDB, "torch"),
    "fingpt_lightning/command_line.py": (*_LIGHTNING_AND_WANDB, "torch"),
    "fingpt_lightning/nearest.py": (*_LIGHTNING_AND_WANDB, "torch"),
    "fingpt_lightning/new_folders.py": (*_LIGHTNING_AND_WANDB, "torch"),
    "fingpt_lightning/settings.py": (*_LIGHTNING_AND_WANDB, "torch"),
    "fingpt_lightning/units.py": (*_LIGHTNING_AND_WANDB, "torch"),
    "fingpt_lightning/whole_files.py": (*_LIGHTNING_AND_WANDB, "torch"),
    "fingpt_lightning/pipeline/partition.py": ("torch",),
    "fingpt_lightning/pipeline/schedule.py": ("torch",),
    "fingpt_lightning/pipeline/simulation.py": ("torch",),
}
YAML_FOLDERS = ("configs", "sweeps")


class Import(NamedTuple):
    """One imported module, or name of a module, and where."""

    file: Path
    line: int
    module: str
    is_plain: bool

    def __str__(self) -> str:
        return f"{self.file.as_posix()}:{self.line}"


def find_violations(root: Path) -> list[str]:
    """Lists everything below ``root`` that breaks an arrow, each with file and line.

    Args:
        root: The folder that holds ``fingpt_lightning`` and ``callbacks``.
    """
    found = [
        f"{path.relative_to(root).as_posix()}: only YAML lies in {folder}/"
        for folder in YAML_FOLDERS
        for path in sorted((root / folder).rglob("*.py"))
    ]
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            file = path.relative_to(root)
            found += _violations_of_file(file, list(_imports(path, file)))
    return found


def _violations_of_file(file: Path, imports: list[Import]) -> list[str]:
    room = _room_of_module(_module_name(file))
    if room is None:
        rooms = ((entry, _room_of_module(entry.module)) for entry in imports)
        return [
            f"{entry}: the package imports its room {target}" for entry, target in rooms if target
        ]
    if _row(room) is None:
        return [f"{file.as_posix()}: {room} has no row; give it one in tests/support/arrows.py"]
    found = []
    for entry in imports:
        if foreign := _foreign_package(file, entry.module):
            found.append(f"{entry}: {file.as_posix()} never imports {foreign}")
        if entry.is_plain and entry.module == "callbacks" and room != "cli":
            found.append(f"{entry}: write `from callbacks.FILE import NAME`")
        target = _room_of_module(entry.module)
        if target is not None and not _is_allowed(room, target, entry.module):
            found.append(f"{entry}: {room} -> {target} is no arrow of the design")
    return found


def _imports(path: Path, file: Path) -> Iterator[Import]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, is_plain=True)
        elif isinstance(node, ast.ImportFrom):
            base = _base_module(file, node)
            for alias in node.names:
                # `from package import room` names the room only in its last part.
                module = f"{base}.{alias.name}" if base in PACKAGES else base
                yield Import(file, node.lineno, module, is_plain=False)


def _base_module(file: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = file.parent.parts[: len(file.parent.parts) - node.level + 1]
    return ".".join([*package, *([node.module] if node.module else [])])


def _module_name(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def _room_of_module(module: str) -> str | None:
    package, _, inner = module.partition(".")
    if package == "callbacks":
        return "callbacks"
    if package != "fingpt_lightning" or not inner or inner == "__version__":
        return None
    return inner.split(".")[0]


def _row(room: str) -> int | None:
    return next((row for row, rooms in enumerate(ROWS) if room in rooms), None)


def _is_allowed(room: str, target: str, module: str) -> bool:
    if room == target or (room in PROGRAM and target in PROGRAM):
        return True
    row, target_row = _row(room), _row(target)
    if row is None or target_row is None:
        return False
    return row < target_row or LEVEL_ARROWS.get((room, target)) == module


def _foreign_package(file: Path, module: str) -> str | None:
    package = module.split(".")[0]
    is_foreign = any(
        file.is_relative_to(place) and package in packages for place, packages in FOREIGN.items()
    )
    return package if is_foreign else None
