"""What is declared fits together: dependencies, versions, continuous integration."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

_REPOSITORY = Path(__file__).parents[1]

_IMPORT_ALL = """
import importlib, pkgutil, sys
sys.modules["peft"] = None  # importing it is an ImportError
# What a machine with a GPU may lack, and neither the check of it nor our public names need.
absent = ["wandb", "jsonargparse", "datasets", "bitsandbytes", "optuna", "pyarrow"]
sys.modules |= dict.fromkeys(absent)
import benchmarks.gpu_check
import callbacks, fingpt_lightning
for name in set(fingpt_lightning.__all__) - {"__version__"}:
    getattr(fingpt_lightning, name)
for name in absent:
    del sys.modules[name]
names = []
for package in (callbacks, fingpt_lightning):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(found.name)
        names.append(found.name)
print(len(names))
"""


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((_REPOSITORY / "pyproject.toml").read_text())["project"]
    return found


def test_every_dependency_admits_the_version_that_the_tests_run_with(
    project: dict[str, Any],
) -> None:
    lines = (_REPOSITORY / "constraints.txt").read_text().split()
    pinned = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}
    requirements = [Requirement(text) for text in project["dependencies"]]
    for name in ("test", "docs", "bench"):
        requirements += [Requirement(text) for text in project["optional-dependencies"][name]]
    checked = 0
    for requirement in requirements:
        if (version := pinned.get(canonicalize_name(requirement.name))) is not None:
            assert requirement.specifier.contains(version), f"{requirement} and {version}"
            checked += 1
    assert checked > 20


def test_the_lower_bounds_are_the_versions_that_have_been_tried(project: dict[str, Any]) -> None:
    tried = {
        canonicalize_name(name): Version(version)
        for name, _, version in (
            line.partition("==")
            for line in (_REPOSITORY / "constraints-floor.txt").read_text().split()
        )
    }
    lowest = {
        canonicalize_name(requirement.name): Version(bound.version)
        for requirement in map(Requirement, project["dependencies"])
        for bound in requirement.specifier
        if bound.operator == ">="
    }
    # Whatever torch asks for: others ask for more.
    assert lowest.pop(canonicalize_name("typing-extensions"))
    assert lowest == tried


@pytest.mark.parametrize("name", ["torch", "lightning", "transformers", "jsonargparse", "wandb"])
def test_what_we_lean_on_inside_has_an_upper_bound(project: dict[str, Any], name: str) -> None:
    (found,) = (r for r in map(Requirement, project["dependencies"]) if r.name == name)
    assert any(bound.operator in ("<", "<=") for bound in found.specifier), found


def test_peft_is_for_tests_and_benchmarks_alone(project: dict[str, Any]) -> None:
    assert "peft" not in {Requirement(text).name for text in project["dependencies"]}
    for extra in ("test", "bench"):
        names = {Requirement(text).name for text in project["optional-dependencies"][extra]}
        assert "peft" in names, extra
    importing = re.compile(r"^\s*(import|from) peft\b", re.MULTILINE)
    for package in ("fingpt_lightning", "callbacks", "examples"):
        for path in (_REPOSITORY / package).rglob("*.py"):
            lines = path.read_text(encoding="utf-8")
            code = re.sub(r'"""[\s\S]*?"""', "", lines)
            assert not importing.search(code), path


@pytest.mark.slow
def test_every_module_is_imported_without_what_few_need(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _IMPORT_ALL]
    environment = os.environ | {"PYTHONPATH": str(_REPOSITORY)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


def test_the_workflow_and_the_hooks_run_what_is_here() -> None:
    workflow = yaml.safe_load((_REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert os.access(_REPOSITORY / ".ci" / "run", os.X_OK)
    hooks = yaml.safe_load((_REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"][0]
    entries = {hook["entry"].split()[0].rpartition("/")[2] for hook in hooks["hooks"]}
    assert entries == {"ruff", "mypy"}, "tests are too slow before a commit"


def test_the_citation_names_software_and_paper() -> None:
    found = yaml.safe_load((_REPOSITORY / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= found.keys()
    assert "version" not in found, "the version stands in pyproject.toml alone"
    paper = found["preferred-citation"]
    readme = (_REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert paper["url"] in readme
    assert len(paper["authors"]) == 5


def test_the_issue_forms_can_be_read() -> None:
    forms = sorted((_REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert [form.stem for form in forms] == ["bug", "config", "feature"]
    for form in forms:
        content = yaml.safe_load(form.read_text())
        assert form.stem == "config" or {"name", "description", "body"} <= content.keys()
