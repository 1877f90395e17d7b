"""Reads the imports of the source tree and finds those that point the wrong way.

A package is a folder of ``fingpt_lightning``, a file at its top, or ``callbacks``,
``benchmarks`` or ``documentation``; ``fingpt_lightning.callbacks``, an alias of ``callbacks``,
counts as it. Files of a package import each other in one direction too.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("fingpt_lightning", "callbacks", "benchmarks", "documentation")

# From top to bottom; a package imports only those below it, so that there is no circle.
ORDER = (
    "documentation",
    "benchmarks",
    "__main__",
    "cli",
    "planning",
    "reporting",
    "sweeping",
    "compression",
    "decomposition",
    "serving",
    "deploy",
    "callbacks",
    "strategies",
    "modules",
    "hub",
    "evaluation",
    "data",
    "tasks",
    "pipeline",
    "auto_classes",
    "models",
    "profiling",
    "low_rank",
    "own_format",
    "shards",
    "terminal",
    "files",
    "metric_keys",
    "units",
)

_LIGHTNING_AND_WANDB = ("lightning", "lightning_fabric", "pytorch_lightning", "wandb")
_HEAVY = (*_LIGHTNING_AND_WANDB, "torch")
# What the files below a path must never import.
FOREIGN = {
    "fingpt_lightning/hub": _HEAVY,
    "fingpt_lightning/low_rank": _LIGHTNING_AND_WANDB,
    "fingpt_lightning/models": _LIGHTNING_AND_WANDB,
    "fingpt_lightning/pipeline": _LIGHTNING_AND_WANDB,
    "fingpt_lightning/profiling": _LIGHTNING_AND_WANDB,
    "fingpt_lightning/tasks": _HEAVY,
    "fingpt_lightning/shards": _HEAVY,
    "fingpt_lightning/terminal": _HEAVY,
    "fingpt_lightning/own_format.py": _HEAVY,
    "fingpt_lightning/files.py": _HEAVY,
    "fingpt_lightning/metric_keys.py": _HEAVY,
    "fingpt_lightning/units.py": _HEAVY,
    "fingpt_lightning/pipeline/partition.py": ("torch",),
    "fingpt_lightning/pipeline/schedule.py": ("torch",),
    "fingpt_lightning/pipeline/simulation.py": ("torch",),
}
YAML_FOLDERS = ("configs", "sweeps")
_MAP_ROW = re.compile(r"^\| `([\w./]+)`", re.MULTILINE)


class Import(NamedTuple):
    """One imported module, or name of a module, and where.

    ``is_for_types`` marks an import below ``if TYPE_CHECKING:``, which never runs.
    """

    file: Path
    line: int
    module: str
    is_plain: bool
    is_for_types: bool

    def __str__(self) -> str:
        return f"{self.file.as_posix()}:{self.line}"


def find_violations(root: Path) -> list[str]:
    """Lists everything below ``root`` that breaks an arrow, each with file and line.

    Args:
        root: Folder that holds ``fingpt_lightning`` and ``callbacks``.
    """
    found = [
        f"{path.relative_to(root).as_posix()}: only YAML lies in {folder}/"
        for folder in YAML_FOLDERS
        for path in sorted((root / folder).rglob("*.py"))
    ]
    imports = {file: list(_imports(root / file, file)) for file in _files(root)}
    for file, entries in imports.items():
        found += _violations_of_file(file, entries)
    return found + [f"circle: {' -> '.join(circle)}" for circle in find_circles(root)]


def find_circles(root: Path) -> list[list[str]]:
    """The circles of imports between files below ``root``, each from its first file to itself.

    An import within a function counts too: it only hides the circle.
    """
    files = {_module_name(file): file for file in _files(root)}
    edges: dict[str, list[str]] = {}
    for module, file in files.items():
        targets = (_target(entry.module, files) for entry in _imports(root / file, file, deep=True))
        edges[module] = sorted({target for target in targets if target not in (None, module)})
    circles: list[list[str]] = []
    done: set[str] = set()
    for start in sorted(edges):
        path: list[str] = []
        stack = [(start, iter(edges[start]))] if start not in done else []
        path += [start] if stack else []
        while stack:
            module, targets_left = stack[-1]
            target = next(targets_left, None)
            if target is None:
                done.add(module)
                stack.pop()
                path.pop()
            elif target in path:
                circles.append([*path[path.index(target) :], target])
            elif target not in done:
                stack.append((target, iter(edges[target])))
                path.append(target)
    return circles


def mapped_packages(document: str) -> list[str]:
    r"""The packages that the table of a document names, in its order.

    >>> mapped_packages("| `fingpt_lightning/cli/` | x |\n| `callbacks/` | y |")
    ['cli', 'callbacks']
    """
    names = (match.removesuffix("/") for match in _MAP_ROW.findall(document))
    return [name.removeprefix("fingpt_lightning/").removesuffix(".py") for name in names]


def packages_in(root: Path) -> set[str]:
    """The packages of a tree; the ``__init__`` of ``fingpt_lightning`` does not count."""
    packages = (_package_of_module(_module_name(file)) for file in _files(root))
    return {package for package in packages if package is not None}


def _files(root: Path) -> list[Path]:
    return [
        path.relative_to(root)
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    ]


def _violations_of_file(file: Path, imports: list[Import]) -> list[str]:
    package = _package_of_module(_module_name(file))
    if package is not None and package not in ORDER:
        place = f"{file.as_posix()}: {package} has no place"
        return [f"{place}; give it one in tests/support/arrows.py and CONTRIBUTING.md"]
    found = []
    for entry in imports:
        if foreign := _foreign_package(file, entry.module):
            found.append(f"{entry}: {file.as_posix()} never imports {foreign}")
        if entry.is_plain and entry.module == "callbacks" and package != "cli":
            found.append(f"{entry}: write `from callbacks.FILE import NAME`")
        target = _package_of_module(entry.module)
        if target is None or target == package:
            continue
        if package is None and entry.is_for_types:
            continue  # the names that the package imports when they are first used
        if package is None:
            found.append(f"{entry}: the package imports its part {target} before it is asked for")
        elif target not in ORDER or ORDER.index(target) < ORDER.index(package):
            found.append(f"{entry}: {package} -> {target} is no arrow of the design")
    return found


def _imports(path: Path, file: Path, deep: bool = False) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        is_for_types = node in for_types
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, True, is_for_types)
        elif isinstance(node, ast.ImportFrom):
            base = _base_module(file, node)
            for alias in node.names:
                # `from package import part` names the part only in its last word.
                is_named = deep or base in PACKAGES
                module = f"{base}.{alias.name}" if is_named else base
                yield Import(file, node.lineno, module, False, is_for_types)


def _target(module: str, files: dict[str, Path]) -> str | None:
    """The file behind an imported name: a module, or the module that holds the name."""
    if module in files:
        return module
    holder = module.rpartition(".")[0]
    return holder if holder in files else None


def _base_module(file: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = file.parent.parts[: len(file.parent.parts) - node.level + 1]
    return ".".join([*package, *([node.module] if node.module else [])])


def _module_name(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def _package_of_module(module: str) -> str | None:
    package, _, inner = module.partition(".")
    if package in PACKAGES[1:]:
        return package
    if package != "fingpt_lightning" or not inner or inner == "__version__":
        return None
    return inner.split(".")[0]


def _foreign_package(file: Path, module: str) -> str | None:
    package = module.split(".")[0]
    is_foreign = any(
        file.is_relative_to(place) and package in packages for place, packages in FOREIGN.items()
    )
    return package if is_foreign else None
