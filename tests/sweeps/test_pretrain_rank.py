"""Real ``wandb`` clients drive ``fingpt fit``; what arrived is read back from a loopback server."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fingpt_lightning.cli.sweep import build_fit
from fingpt_lightning.sweeping.checking import check_sweep, documented_keys
from fingpt_lightning.sweeping.sweep_file import read_sweep
from tests.support.wandb_client import run_client
from tests.support.wandb_server import WandbServer
from tests.support.wandb_sweeps import Json

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


def test_the_number_of_sweeps_is_known() -> None:
    assert [path.stem for path in _SWEEPS] == [
        "pipeline", "pretrain_frontier", "pretrain_low_rank", "pretrain_rank", "qlora",
        "quick_rank",
    ]  # fmt: skip


@pytest.mark.parametrize("path", _SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_runs_fingpt_on_configs_of_ours(path: Path) -> None:
    command = _read(path)["command"]
    assert command[:5] == ["${env}", "${interpreter}", "-m", "fingpt_lightning", "fit"]
    assert command[5::2] == ["--config"] * len(command[6::2])
    *configs, arguments = command[6::2]
    assert arguments == "${args_json_file}"
    assert configs
    assert all((_REPOSITORY / config).is_file() for config in configs)


@pytest.mark.parametrize("path", _SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_says_question_need_and_command(path: Path) -> None:
    head = " ".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert "# Question: " in head
    assert "# Needs " in head
    assert re.search(rf"# Run: .*sweep .*sweeps/{path.name}", head)


@pytest.mark.slow
@pytest.mark.parametrize("path", _SWEEPS, ids=lambda path: path.stem)
def test_the_command_line_takes_every_value_of_a_sweep_and_something_logs_its_metric(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(_REPOSITORY)
    # One parameter at a time: a whole grid takes its time.
    sweep = read_sweep(path)._replace(method="random")
    built = check_sweep(sweep, build_fit)
    assert documented_keys(built) is not None
    assert built.settings["trainer"]["logger"]["init_args"]["offline"] is False
    values = [value for found in sweep.parameters.values() for value in found.samples()]
    texts = [value for value in values if isinstance(value, str)]
    # YAML 1.1 reads 1e-3 as text.
    assert not any(re.fullmatch(r"[+-]?[\d.]+e[+-]?\d+", text) for text in texts)


@pytest.mark.slow
def test_a_sweep_drives_fit_and_every_trial_arrives(server: WandbServer, tmp_path: Path) -> None:
    sweep = _read(_REPOSITORY / "sweeps" / "pretrain_rank.yaml")
    sweep["command"][6] = str(_TINY_CONFIG)
    searched = sweep["parameters"]["model"]["parameters"]["init_args"]["parameters"]
    searched["rank"] = {"values": [None, 0.25]}
    searched["learning_rate"] = {"values": [0.004]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))

    told = run_client(server, tmp_path, "-m", "wandb", "sweep", "--project", "fingpt", "sweep.yaml")
    agent = re.search(r"wandb agent (\S+)", told)
    assert agent, told
    output = run_client(server, tmp_path, "-c", _AGENT, agent[1])

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
    run_client(server, tmp_path, "-m", "fingpt_lightning", "fit", "--config", str(_TINY_CONFIG))
    assert not server.runs
    (folder,) = tmp_path.glob("runs/*/wandb/offline-run-*")
    records = run_client(server, tmp_path, "-m", "wandb", "leet", "inspect", "--json", str(folder))
    rows = [json.loads(line) for line in records.splitlines() if line.startswith("{")]
    history = [row["history"]["item"] for row in rows if row["type"] == "history"]
    written = [row["val/loss"] for row in history if "val/loss" in row]
    assert written

    run_client(server, tmp_path, "-m", "wandb", "sync", str(folder))
    (run,) = server.runs.values()
    assert (run.state, run.exit_code) == ("finished", 0)
    assert len(run.history) == len(history)
    assert run.logged("val/loss") == written
    assert run.summary["val/loss"] == written[-1]
    assert run.config["cli"]["model"]["class_path"].endswith("LowRankPretraining")


def _read(path: Path) -> Json:
    content: Json = yaml.safe_load(path.read_text())
    return content
