"""The wheel holds the whole of both packages and runs without the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).parents[1]
_PACKAGES = ("callbacks", "fingpt_lightning")
_SHIPPED = ("configs", "sweeps")
_PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")

_IMPORT_ALL = """
import importlib, json, pkgutil, callbacks, fingpt_lightning
files = {}
for package in (callbacks, fingpt_lightning):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        files[found.name] = importlib.import_module(found.name).__file__
    files[package.__name__] = package.__file__
print(json.dumps(files))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is made of: building it leaves no build/ in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(_REPOSITORY / name, folder)
    for name in (*_PACKAGES, *_SHIPPED):
        leave_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(_REPOSITORY / name, folder / name, ignore=leave_out)
    return folder


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's content and nothing else."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("target")
    offline = ("--no-deps", "--no-index")
    _run(*_PIP, "wheel", *offline, "--no-build-isolation", "--wheel-dir", wheels, source)
    (wheel,) = wheels.glob("fingpt_lightning-*-py3-none-any.whl")
    _run(*_PIP, "install", *offline, "--no-compile", "--target", target, wheel)
    return target


@pytest.mark.slow
def test_every_file_of_both_packages_is_in_the_wheel(source: Path, installed: Path) -> None:
    for package in _PACKAGES:
        files = _files(installed / package)
        assert "py.typed" in files
        shipped = {file for file in files if file.partition("/")[0] in _SHIPPED}
        assert files - shipped == _files(source / package)


@pytest.mark.slow
def test_every_config_and_sweep_is_in_the_wheel(source: Path, installed: Path) -> None:
    for folder in _SHIPPED:
        files = _files(installed / "fingpt_lightning" / folder)
        assert len(files) > 5
        assert files == _files(source / folder)
        assert not (installed / folder).exists(), "only our two packages lie at the top"


@pytest.mark.slow
def test_every_module_is_imported_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    files = json.loads(_run(sys.executable, "-c", _IMPORT_ALL, cwd=tmp_path, path=installed))
    assert len(files) == sum(len(list((installed / name).rglob("*.py"))) for name in _PACKAGES)
    elsewhere = {module for module, file in files.items() if not file.startswith(str(installed))}
    assert not elsewhere


@pytest.mark.slow
def test_the_program_of_the_wheel_helps(installed: Path, tmp_path: Path) -> None:
    by_module = _run(
        sys.executable, "-m", "fingpt_lightning", "--help", cwd=tmp_path, path=installed
    )
    by_script = _run(installed / "bin" / "fingpt", "--help", cwd=tmp_path, path=installed)
    assert "usage: fingpt" in by_module
    assert by_script == by_module


@pytest.mark.slow
def test_the_wheel_runs_what_its_help_says_to_start_with(installed: Path, tmp_path: Path) -> None:
    program = (sys.executable, "-m", "fingpt_lightning")
    told = _run(*program, "--help", cwd=tmp_path, path=installed)
    (line,) = re.findall(r"^start with: +fingpt (.+)$", told, re.MULTILINE)
    assert not list(tmp_path.iterdir()), "the folder is empty"
    shorter = (
        *("--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"),
        *("--data.num_synthetic_items", "60", "--data.cache_dir", "cache"),
    )
    printed = _run(*program, *line.split(), *shorter, cwd=tmp_path, path=installed)
    assert "Run summary" in printed
    (summary,) = tmp_path.glob("runs/quickstart-*/summary.json")
    assert json.loads(summary.read_text())["total_parameter_ratio"] > 2.5


@pytest.mark.slow
def test_a_sweep_of_the_wheel_is_found_with_the_config_that_it_names(
    installed: Path, tmp_path: Path
) -> None:
    """All but its runs: every trial is built from a shipped config."""
    script = (
        "from fingpt_lightning.cli.shipped import find_file\n"
        "from fingpt_lightning.cli.sweep import build_fit\n"
        "from fingpt_lightning.sweeping.checking import check_sweep\n"
        "from fingpt_lightning.sweeping.sweep_file import read_sweep\n"
        "path = find_file('quick_rank', 'sweeps', 'sweep')\n"
        "print(path)\n"
        "check_sweep(read_sweep(path), build_fit)\n"
    )
    printed = _run(sys.executable, "-c", script, cwd=tmp_path, path=installed)
    assert printed.startswith(f"{installed / 'fingpt_lightning' / 'sweeps'}")


def _files(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def _run(*command: str | Path, cwd: Path | None = None, path: Path | None = None) -> str:
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run(
        command, cwd=cwd, env=environment, timeout=120, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
