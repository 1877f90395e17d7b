"""The import arrows of the design hold, and the reader that says so finds each kind of break."""

from pathlib import Path

import pytest

from tests.support.arrows import (
    ORDER,
    PACKAGES,
    find_circles,
    find_violations,
    mapped_packages,
    packages_in,
)

_REPOSITORY = Path(__file__).parents[1]


def test_no_import_points_the_wrong_way_or_in_a_circle() -> None:
    num_files = sum(len(list((_REPOSITORY / package).rglob("*.py"))) for package in PACKAGES)
    assert num_files > 100
    assert find_violations(_REPOSITORY) == []


def test_the_map_in_contributing_is_the_tree() -> None:
    told = mapped_packages((_REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert set(told) == packages_in(_REPOSITORY) - {"__main__"}
    assert told == [package for package in ORDER if package in told], "the order of the arrows"


def test_few_files_lie_at_the_root_of_the_package() -> None:
    files = sorted(path.name for path in (_REPOSITORY / "fingpt_lightning").glob("*.py"))
    assert len(files) <= 7, files


@pytest.mark.parametrize(
    ("file", "source", "told"),
    [
        (
            "fingpt_lightning/low_rank/linear.py",
            "import fingpt_lightning.models.shapes",
            "models",
        ),
        ("fingpt_lightning/low_rank/linear.py", "from fingpt_lightning import data", "data"),
        ("fingpt_lightning/low_rank/linear.py", "from ..modules import x", "modules"),
        ("fingpt_lightning/low_rank/deep/er.py", "from ...cli import main", "cli"),
        ("fingpt_lightning/low_rank/linear.py", "from .. import profiling", "profiling"),
        ("fingpt_lightning/units.py", "def f():\n    from callbacks.memory import x", "callbacks"),
        ("fingpt_lightning/data/blocks.py", "import fingpt_lightning.modules", "modules"),
        ("fingpt_lightning/data/blocks.py", "import fingpt_lightning.evaluation", "evaluation"),
        ("fingpt_lightning/cli/main.py", "from benchmarks import a", "benchmarks"),
        ("fingpt_lightning/cli/main.py", "import fingpt_lightning.newroom", "newroom"),
        ("fingpt_lightning/planning/command.py", "import fingpt_lightning.cli.trainer", "cli"),
        ("callbacks/memory.py", "from fingpt_lightning.cli import main", "cli"),
    ],
)
def test_an_arrow_against_the_design_is_found(
    file: str, source: str, told: str, tmp_path: Path
) -> None:
    _write(tmp_path, file, f'"""Text."""\n{source}\n')
    (violation,) = find_violations(tmp_path)
    line = 2 + source.count("\n")
    assert violation.startswith(f"{file}:{line}: ")
    assert violation.endswith(f"-> {told} is no arrow of the design")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("benchmarks/memory.py", "from fingpt_lightning.cli import main"),
        ("fingpt_lightning/cli/main.py", "import callbacks\nimport fingpt_lightning.cli.trainer"),
        ("fingpt_lightning/cli/main.py", "from fingpt_lightning import __version__"),
        ("fingpt_lightning/modules/a.py", "from fingpt_lightning.data.blocks import x"),
        ("fingpt_lightning/modules/a.py", "import lightning, torch, fingpt_lightning.low_rank"),
        ("fingpt_lightning/low_rank/a.py", "from . import b\nfrom .c import d\nimport torch"),
        ("callbacks/memory.py", "from callbacks.throughput import x"),
        ("fingpt_lightning/__init__.py", "from importlib.metadata import version"),
    ],
)
def test_an_arrow_of_the_design_is_left_alone(file: str, source: str, tmp_path: Path) -> None:
    _write(tmp_path, file, source)
    assert find_violations(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "source", "told"),
    [
        ("fingpt_lightning/low_rank/a.py", "import lightning.pytorch as L", "lightning"),
        ("fingpt_lightning/models/a.py", "from wandb import Table", "wandb"),
        ("fingpt_lightning/pipeline/runtime.py", "import pytorch_lightning", "pytorch_lightning"),
        ("fingpt_lightning/profiling/a.py", "from lightning import Trainer", "lightning"),
        ("fingpt_lightning/units.py", "import torch.nn", "torch"),
        ("fingpt_lightning/terminal/progress.py", "import torch", "torch"),
        ("fingpt_lightning/pipeline/partition.py", "from torch import nn", "torch"),
        ("fingpt_lightning/pipeline/schedule.py", "import torch", "torch"),
    ],
)
def test_a_foreign_package_is_found(file: str, source: str, told: str, tmp_path: Path) -> None:
    _write(tmp_path, file, source)
    assert find_violations(tmp_path) == [f"{file}:1: {file} never imports {told}"]


@pytest.mark.parametrize(
    "sources",
    [
        {"a": "from fingpt_lightning.low_rank.b import x", "b": "from . import a"},
        {
            "a": "from .b import x",
            "b": "import fingpt_lightning.low_rank.c",
            "c": "from .a import y",
        },
        {"a": "from .b import x", "b": "def f():\n    from fingpt_lightning.low_rank.a import y"},
    ],
)
def test_a_circle_of_files_is_found(sources: dict[str, str], tmp_path: Path) -> None:
    for name, source in sources.items():
        _write(tmp_path, f"fingpt_lightning/low_rank/{name}.py", source)
    (circle,) = find_circles(tmp_path)
    assert circle[0] == circle[-1]
    assert {module.rpartition(".")[2] for module in circle} == set(sources)
    (violation,) = find_violations(tmp_path)
    assert violation.startswith("circle: fingpt_lightning.low_rank.a -> ")


def test_an_unknown_package_asks_for_a_place(tmp_path: Path) -> None:
    _write(tmp_path, "fingpt_lightning/garage/car.py", "import torch")
    assert find_violations(tmp_path) == [
        "fingpt_lightning/garage/car.py: garage has no place; give it one in"
        " tests/support/arrows.py and CONTRIBUTING.md"
    ]


def test_the_package_itself_imports_no_part(tmp_path: Path) -> None:
    _write(tmp_path, "fingpt_lightning/__init__.py", "from fingpt_lightning.units import MIB")
    (violation,) = find_violations(tmp_path)
    assert violation == (
        "fingpt_lightning/__init__.py:1: the package imports its part units before it is asked for"
    )


def test_the_package_names_its_parts_for_type_checkers_alone(tmp_path: Path) -> None:
    source = "if TYPE_CHECKING:\n    from fingpt_lightning.units import MIB\nelse:\n    "
    _write(tmp_path, "fingpt_lightning/__init__.py", f"{source}pass")
    assert find_violations(tmp_path) == []
    _write(tmp_path, "fingpt_lightning/__init__.py", f"{source}import fingpt_lightning.units")
    assert len(find_violations(tmp_path)) == 1


def test_an_import_of_a_public_name_by_a_part_is_a_circle(tmp_path: Path) -> None:
    source = "if TYPE_CHECKING:\n    from fingpt_lightning.data.blocks import x"
    _write(tmp_path, "fingpt_lightning/__init__.py", source)
    _write(tmp_path, "fingpt_lightning/data/blocks.py", "from fingpt_lightning import y")
    name = "fingpt_lightning"
    assert find_circles(tmp_path) == [[name, f"{name}.data.blocks", name]]


def test_callbacks_have_the_same_place_by_either_way(tmp_path: Path) -> None:
    _write(tmp_path, "fingpt_lightning/callbacks/__init__.py", "from callbacks import X")
    assert find_violations(tmp_path) == []
    _write(tmp_path, "fingpt_lightning/data/a.py", "from fingpt_lightning.callbacks import X")
    (violation,) = find_violations(tmp_path)
    assert violation.endswith("data -> callbacks is no arrow of the design")


def test_a_plain_import_of_callbacks_is_found(tmp_path: Path) -> None:
    _write(tmp_path, "benchmarks/a.py", "import callbacks")
    (violation,) = find_violations(tmp_path)
    assert violation.endswith("a.py:1: write `from callbacks.FILE import NAME`")


@pytest.mark.parametrize("folder", ["configs", "sweeps"])
def test_python_among_yaml_is_found(folder: str, tmp_path: Path) -> None:
    _write(tmp_path, f"{folder}/model/__init__.py", "")
    assert find_violations(tmp_path) == [
        f"{folder}/model/__init__.py: only YAML lies in {folder}/",
    ]


def _write(root: Path, file: str, source: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
