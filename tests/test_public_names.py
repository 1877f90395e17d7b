"""``import fingpt_lightning`` is light, names all that is public, and is typed.

Python's functions and the command line have the same options with the same defaults.
"""

import argparse
import ast
import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import callbacks as top_level_callbacks
import fingpt_lightning
import fingpt_lightning.callbacks
from fingpt_lightning.decomposition import options as decompose_options
from fingpt_lightning.deploy import export_options
from fingpt_lightning.evaluation import options as evaluate_options

_REPOSITORY = Path(__file__).parents[1]
_HEAVY = ("torch", "lightning", "transformers", "numpy", "wandb", "rich", "yaml", "jsonargparse")


def _run(script: str) -> str:
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_front_door_is_open_in_a_fresh_process() -> None:
    """Names are tried where each is the package's first use, ``callbacks`` among them."""
    _run(
        "import fingpt_lightning as f; f.load_model, f.evaluate, f.export, f.decompose,"
        " f.make_low_rank, f.LowRankLinear, f.vocabulary_loss, f.PipelineStrategy\n"
        "assert callable(f.decompose), 'no package of that name in its place'\n"
        "import callbacks as c; assert f.callbacks.RunSummary is c.RunSummary\n"
        "from fingpt_lightning.callbacks import MemoryMonitor\n"
        "from transformers import AutoConfig\n"
        "assert type(AutoConfig.for_model('fingpt_lightning')).__name__ == 'FinGPTConfig'"
    )


@pytest.mark.parametrize(
    "script",
    ["import fingpt_lightning; dir(fingpt_lightning)",
     "from fingpt_lightning.cli.main import main; main(['--help'])"],
    ids=["import", "help"],
)  # fmt: skip
def test_nothing_heavy_is_imported_before_it_is_used(script: str) -> None:
    loaded = _run(f"{script}\nimport sys; print('loaded:', *sys.modules)").rpartition("loaded:")[2]
    assert not set(_HEAVY) & set(loaded.split())


@pytest.mark.parametrize("name", fingpt_lightning.__all__)
def test_each_public_name_is_what_its_module_has(name: str) -> None:
    found = getattr(fingpt_lightning, name)
    assert name in dir(fingpt_lightning)
    if name not in ("__version__", "callbacks"):
        assert found is getattr(importlib.import_module(found.__module__), name)
        assert inspect.getdoc(found)


def test_type_checkers_and_the_interpreter_are_told_the_same() -> None:
    tree = ast.parse(Path(fingpt_lightning.__file__).read_text(encoding="utf-8"))
    (for_types,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {
        alias.name: (node.module or "").removeprefix("fingpt_lightning.")
        for node in for_types.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told.pop("callbacks") == "fingpt_lightning"
    assert told == fingpt_lightning._MODULES
    assert {*told, "callbacks", "__version__"} == set(fingpt_lightning.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lod_model'"):
        getattr(fingpt_lightning, "lod_model")  # noqa: B009


def test_callbacks_are_the_same_by_either_way() -> None:
    names = {*top_level_callbacks.__all__} - {"DISTRIBUTION"}
    assert len(names) > 8
    assert {*fingpt_lightning.callbacks.__all__} == names
    for name in names:
        one, other = fingpt_lightning.callbacks, top_level_callbacks
        assert getattr(one, name) is getattr(other, name)


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((_REPOSITORY / "pyproject.toml").read_text())["project"]
    assert fingpt_lightning.__version__ == importlib.metadata.version("fingpt-lightning")
    changelog = (_REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## (\d\S*)", changelog, re.MULTILINE)
    assert released[0] == project["version"]


@pytest.mark.parametrize(
    ("function", "parser"),
    [
        (fingpt_lightning.evaluate, evaluate_options.build_parser()),
        (fingpt_lightning.decompose, decompose_options.build_parser()),
        (fingpt_lightning.export, export_options.build_parser()),
    ],
    ids=["evaluate", "decompose", "export"],
)
def test_python_has_the_options_and_defaults_of_the_command_line(
    function: Callable[..., Any], parser: argparse.ArgumentParser
) -> None:
    # Shards are for the jobs of a scheduler, which start programs.
    left_out = ("help", "shard", "merge")
    options = {action.dest: action for action in parser._actions if action.dest not in left_out}
    parameters = inspect.signature(function).parameters
    assert parameters.keys() == options.keys()
    for name, parameter in parameters.items():
        option = options[name]
        default = inspect.Parameter.empty if option.required else option.default
        assert parameter.default == default, name
    described = inspect.getdoc(function) or ""
    for name in parameters:
        assert re.search(rf"^    {name}: ", described, re.MULTILINE), name
