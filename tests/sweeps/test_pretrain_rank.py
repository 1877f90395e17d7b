"""Real ``wandb`` clients drive ``fingpt fit``; what arrived is read back from a loopback server."""

import importlib
import inspect
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer

from tests.support.wandb_server import WandbServer
from tests.support.wandb_sweeps import Json, plan_trials

_REPOSITORY = Path(__file__).parents[2]
_SWEEPS = sorted((_REPOSITORY / "sweeps").rglob("*.yaml"))
_TINY_CONFIG = _REPOSITORY / "configs" / "debug_quickstart.yaml"
# `wandb agent` with a heartbeat every 0.3 s in place of every 5 s.
_AGENT = """
import sys, wandb, wandb.wandb_agent
wandb.wandb_agent.Agent.POLL_INTERVAL = 0.3
wandb.agent(sys.argv[1])
"""


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


def test_there_is_a_sweep() -> None:
    assert _REPOSITORY / "sweeps" / "pretrain_rank.yaml" in _SWEEPS


@pytest.mark.parametrize("path", _SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_runs_fingpt_on_a_config_of_ours(path: Path) -> None:
    command = _read(path)["command"]
    base = command[6]
    assert command == [
        *("${env}", "${interpreter}", "-m", "fingpt_lightning", "fit"),
        *("--config", base, "--config", "${args_json_file}"),
    ]
    assert (_REPOSITORY / base).is_file()


@pytest.mark.parametrize("path", _SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_optimises_a_documented_key(path: Path) -> None:
    metric = _read(path)["metric"]
    assert metric["goal"] in ("minimize", "maximize")
    assert f"`{metric['name']}`" in (_REPOSITORY / "docs" / "metrics.md").read_text()


@pytest.mark.parametrize("path", _SWEEPS, ids=lambda path: path.stem)
def test_every_parameter_of_a_sweep_is_an_argument_and_no_number_is_text(path: Path) -> None:
    sweep = _read(path)
    base = _REPOSITORY / sweep["command"][6]
    trials = plan_trials(sweep)
    assert trials
    for trial in trials:
        for part, settings in trial.items():
            if part == "trainer":
                _check_arguments(settings, Trainer)
            else:
                _check_object(settings, default_class=_class_path(base, part))


@pytest.mark.slow
def test_a_sweep_drives_fit_and_every_trial_arrives(server: WandbServer, tmp_path: Path) -> None:
    sweep = _read(_REPOSITORY / "sweeps" / "pretrain_rank.yaml")
    sweep["command"][6] = str(_TINY_CONFIG)
    searched = sweep["parameters"]["model"]["parameters"]["init_args"]["parameters"]
    searched["rank"] = {"values": [None, 0.25]}
    searched["learning_rate"] = {"values": [0.004]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))

    told = _run(server, tmp_path, "-m", "wandb", "sweep", "--project", "fingpt", "sweep.yaml")
    agent = re.search(r"wandb agent (\S+)", told)
    assert agent, told
    output = _run(server, tmp_path, "-c", _AGENT, agent[1])

    (found,) = server.sweeps.values()
    assert (found.state, len(found.runs)) == ("FINISHED", 2), output
    for name, rank in zip(found.runs, [None, 0.25], strict=True):
        run = server.runs[name]
        assert (run.state, run.exit_code, run.sweep) == ("finished", 0, found.name), output
        arguments = run.config["cli"]["model"]["init_args"]
        assert arguments["rank"] == rank
        assert arguments["learning_rate"] == 0.004
        assert run.logged("val/loss")
        assert all(map(math.isfinite, run.logged("val/loss")))
        assert run.summary["val/loss"] == run.logged("val/loss")[-1]
    dense, low_rank = (server.runs[name].logged("val/loss") for name in found.runs)
    assert dense != low_rank


@pytest.mark.slow
def test_an_offline_run_arrives_whole_by_wandb_sync(server: WandbServer, tmp_path: Path) -> None:
    _run(server, tmp_path, "-m", "fingpt_lightning", "fit", "--config", str(_TINY_CONFIG))
    assert not server.runs
    (folder,) = tmp_path.glob("runs/*/wandb/offline-run-*")
    records = _run(server, tmp_path, "-m", "wandb", "leet", "inspect", "--json", str(folder))
    rows = [json.loads(line) for line in records.splitlines() if line.startswith("{")]
    history = [row["history"]["item"] for row in rows if row["type"] == "history"]
    written = [row["val/loss"] for row in history if "val/loss" in row]
    assert written

    _run(server, tmp_path, "-m", "wandb", "sync", str(folder))
    (run,) = server.runs.values()
    assert (run.state, run.exit_code) == ("finished", 0)
    assert len(run.history) == len(history)
    assert run.logged("val/loss") == written
    assert run.summary["val/loss"] == written[-1]
    assert run.config["cli"]["model"]["class_path"].endswith("LowRankPretraining")


def _read(path: Path) -> Json:
    content: Json = yaml.safe_load(path.read_text())
    return content


def _run(server: WandbServer, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=server.environment(folder),
        cwd=folder,
        timeout=200,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def _class_path(base: Path, part: str) -> str:
    """The class of a part of a runnable config, which may name a block in another file."""
    block = _read(base)[part]
    if isinstance(block, str):
        block = _read(base.parent / block)
    return str(block["class_path"])


def _check_object(settings: Json, default_class: str | None = None) -> None:
    assert settings.keys() <= {"class_path", "init_args"}
    class_path = settings.get("class_path", default_class)
    assert class_path, settings
    module, _, name = class_path.rpartition(".")
    _check_arguments(settings.get("init_args", {}), getattr(importlib.import_module(module), name))


def _check_arguments(settings: Json, owner: type) -> None:
    assert settings
    assert settings.keys() <= inspect.signature(owner).parameters.keys(), owner
    for value in settings.values():
        if isinstance(value, dict):
            _check_object(value)
        else:
            # YAML 1.1 reads 1e-3 as text.
            assert not _is_number_as_text(value), f"{value!r}: write it as 0.001"


def _is_number_as_text(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[+-]?[\d.]+e[+-]?\d+", value) is not None
