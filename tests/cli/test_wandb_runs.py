"""What arrives at W&B, by real clients and a loopback server, and what happens without one."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from jsonargparse import Namespace

from fingpt_lightning.cli.wandb_runs import (
    LIMIT_VARIABLES,
    ServerGuard,
    find_unreachable,
    keep_offline_if_unreachable,
)
from tests.evaluation.tiny_language import write_rows
from tests.support.wandb_client import run_client
from tests.support.wandb_server import Fault, WandbServer

CONFIGS = Path(__file__).parents[2] / "configs"
WANDB = "lightning.pytorch.loggers.WandbLogger"
# Several programs one after the other, each of which takes seconds to import its libraries.
pytestmark = pytest.mark.timeout(600)
FIT = ("-m", "fingpt_lightning", "fit", "--config")


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


@pytest.fixture
def closed_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


def _logger(offline: bool) -> Namespace:
    return Namespace(offline=offline, mode=None, save_dir="runs/mine", name=None)


@pytest.mark.slow
def test_a_finetuning_run_arrives_with_all_that_it_logs(
    server: WandbServer, tmp_path: Path
) -> None:
    write_rows(tmp_path / "data", "fpb")
    evaluation = {
        "class_path": "callbacks.FinancialEvaluation",
        "init_args": {"tasks": ["fpb"], "data_dir": str(tmp_path / "data")},
    }
    about = {"tags": ["tiny", "qlora"], "group": "mine", "notes": "tried out", "log_model": True}
    logger = {"class_path": WANDB, "init_args": {"offline": False, **about}}
    extra = tmp_path / "extra.yaml"
    extra.write_text(yaml.safe_dump({"trainer": {"logger": logger, "callbacks+": [evaluation]}}))
    config = str(CONFIGS / "debug_finetune_smollm2_fpb.yaml")
    output = run_client(server, tmp_path, *FIT, config, "--config", str(extra))

    (run,) = server.runs.values()
    assert (run.state, run.exit_code) == ("finished", 0), output
    assert (run.tags, run.group, run.notes) == (["tiny", "qlora"], "mine", "tried out")
    assert run.config["cli"]["model"]["init_args"]["rank"] == 4
    assert run.config["cli"]["trainer"]["max_steps"] == 6
    (folder,) = (tmp_path / "runs").iterdir()
    figures = json.loads((folder / "summary.json").read_text())
    assert len(run.logged("train/loss")) == 6
    losses = run.logged("val/loss")
    assert run.summary["val/loss"] == losses[-1] == figures["last_val_loss"]
    assert run.summary["summary/best_val_loss"] == min(losses) == figures["best_val_loss"]
    assert run.summary["eval/fpb/macro_f1"] == run.logged("eval/fpb/macro_f1")[-1]

    # By tokens and by step.
    tokens = run.logged("train/tokens")
    for key, count in (("train/loss", 6), ("val/loss", 2), ("eval/fpb/macro_f1", 2)):
        rows = [row for row in run.history if key in row]
        assert len(rows) == count
        assert all(row["train/tokens"] in (0, *tokens) for row in rows)
        assert all("trainer/global_step" in row for row in rows)

    picture = run.summary["eval/fpb/confusion"]
    assert picture["_type"] == "images/separated"
    pictures = [path for path in server.files if "confusion" in path and path.endswith(".png")]
    assert len(pictures) == 2
    assert all(server.files[path].startswith(b"\x89PNG") for path in pictures)
    tables = [
        json.loads(server.files[path])
        for path in server.files
        if "predictions" in path and path.endswith(".table.json") and "/artifacts/" not in path
    ]
    assert tables
    assert tables[-1]["columns"] == ["row", "text", "gold", "prediction", "scores"]
    assert tables[-1]["data"][0][:3] == [1, "Shares of Foo fell", "negative"]

    models = {entry.name: entry for entry in server.artifacts.values() if entry.type == "model"}
    adapter = models[f"adapter-{run.name}"]
    assert adapter.state == "COMMITTED"
    uploaded = server.files[f"/upload/artifacts/{adapter.id}/adapter_model.safetensors"]
    assert uploaded == (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    (checkpoint,) = [entry for name, entry in models.items() if name == f"model-{run.name}"][-1:]
    assert any(f"/artifacts/{checkpoint.id}/" in path for path in server.files)


@pytest.mark.slow
def test_two_ranks_log_one_run(server: WandbServer, tmp_path: Path) -> None:
    words = [*FIT, str(CONFIGS / "debug_quickstart.yaml")]
    words += ["--config", str(CONFIGS / "overlays" / "ddp.yaml"), "--trainer.devices", "2"]
    output = run_client(server, tmp_path, *words, "--trainer.logger.offline", "false")
    (run,) = server.runs.values()
    assert (run.state, run.exit_code) == ("finished", 0), output
    assert len(run.logged("train/loss")) == 6
    steps = [row["trainer/global_step"] for row in run.history if "train/loss" in row]
    assert steps == list(range(6))
    assert str(run.config["cli"]["trainer"]["devices"]) == "2"


@pytest.mark.slow
def test_a_run_whose_server_is_away_goes_on_offline_and_says_so_once(
    server: WandbServer, tmp_path: Path, closed_port: str
) -> None:
    words = [*FIT, str(CONFIGS / "debug_quickstart.yaml"), "--trainer.logger.offline", "false"]
    output = run_client(server, tmp_path, *words, WANDB_BASE_URL=closed_port)
    assert output.count("cannot be reached") == 1
    assert f"fingpt: W&B at {closed_port} cannot be reached" in output
    assert "this run is kept offline; upload it later with: wandb sync runs/debug_q" in output
    assert "Run summary" in output
    assert "anonymous" not in output
    (folder,) = tmp_path.glob("runs/*/wandb/offline-run-*")
    run_client(server, tmp_path, "-m", "wandb", "sync", str(folder))
    (run,) = server.runs.values()
    assert run.logged("val/loss")


@pytest.mark.slow
def test_a_local_sweep_is_uploaded_as_one_group(server: WandbServer, tmp_path: Path) -> None:
    _write_sweep(tmp_path)
    words = ("-m", "fingpt_lightning", "sweep", "tiny.yaml", "--project", "mine")
    output = run_client(server, tmp_path, *words, "--output", "out")
    assert not server.runs
    assert "fingpt fit --config out/best.yaml" in output
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [trial["state"] for trial in record["trials"]] == ["finished"]
    (offline,) = tmp_path.glob("out/trials/*/wandb/offline-run-*")
    run_client(server, tmp_path, "-m", "wandb", "sync", str(offline))
    (run,) = server.runs.values()
    assert (run.group, run.project, run.state) == ("out", "mine", "finished")
    assert run.summary["val/loss"] == record["trials"][0]["value"]
    # The best config is that of a run of its own.
    run_client(server, tmp_path, *FIT, "out/best.yaml", "--trainer.max_steps", "1")
    assert len(list(tmp_path.glob("runs/best-*/summary.json"))) == 1


@pytest.mark.slow
def test_a_sweep_on_a_server_is_checked_created_and_run(
    server: WandbServer, tmp_path: Path
) -> None:
    _write_sweep(tmp_path)
    words = ("-m", "fingpt_lightning", "sweep", "tiny.yaml", "--server", "--project", "mine")
    output = run_client(server, tmp_path, *words)
    (sweep,) = server.sweeps.values()
    assert (sweep.project, sweep.state) == ("mine", "FINISHED"), output
    (name,) = sweep.runs
    assert server.runs[name].exit_code == 0
    assert server.runs[name].config["cli"]["model"]["init_args"]["rank"] == 4


def _write_sweep(folder: Path) -> None:
    logger = {"class_path": WANDB, "init_args": {"offline": False}}
    content = {
        "method": "grid",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": {
            "model": {"parameters": {"init_args": {"parameters": {"rank": {"values": [4]}}}}},
            "trainer": {"parameters": {"logger": {"value": logger}}},
        },
        "command": [
            "${env}", "${interpreter}", "-m", "fingpt_lightning", "fit", "--config",
            str(CONFIGS / "debug_quickstart.yaml"), "--config", "${args_json_file}",
        ],
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))


def test_credentials_in_the_address_of_a_server_are_used_and_not_printed(
    server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server.url.replace("://", "://me:secret@"))
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert find_unreachable(5.0) is None
    server.fail(Fault.ERROR)
    assert find_unreachable(5.0) == (server.url, "it answers with status 500")


def test_only_an_answer_of_wandbs_api_is_a_server(
    server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert find_unreachable(5.0) is None
    reasons = {
        Fault.ERROR: "it answers with status 500",
        Fault.REFUSED: "it refuses the API key, status 401: see wandb login",
        Fault.HTML: "what it answers is not W&B's API",
        Fault.GARBAGE: "what it answers is not W&B's API",
    }
    for fault, reason in reasons.items():
        server.fail(fault)
        found = find_unreachable(5.0)
        assert found is not None
        assert found.reason == reason
    server.fail(Fault.SILENT)
    found = find_unreachable(0.5)
    assert found is not None
    assert found.reason in ("no answer in 0.5 s", "timed out")
    server.fail(None)
    assert find_unreachable(5.0) is None


def test_a_server_that_is_lost_is_noticed_once(
    server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    losses: list[int] = []
    with ServerGuard(lambda: losses.append(1), lost_after_s=0.6) as guard:
        time.sleep(1.5)
        assert guard.found is None
        server.fail(Fault.ERROR)
        deadline_s = time.monotonic() + 10
        while not losses and time.monotonic() < deadline_s:
            time.sleep(0.05)
    assert losses == [1]
    assert guard.found is not None
    assert guard.found.reason == "it answers with status 500"


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.SILENT])
def test_a_server_that_fails_in_mid_run_ends_no_training_and_outlives_none(
    fault: Fault, server: WandbServer, tmp_path: Path
) -> None:
    server.fail(fault, after_uploads=1)
    words = [*FIT, str(CONFIGS / "debug_quickstart.yaml"), "--trainer.logger.offline", "false"]
    limit = {"WANDB_FINISH_TIMEOUT": "4"}
    output = run_client(server, tmp_path, *words, **limit)
    ended_s = time.time()
    assert "Run summary" in output
    assert output.count("upload it later with: wandb sync --no-skip-online") == 1
    (folder,) = tmp_path.glob("runs/*")
    last_s = (folder / "summary.json").stat().st_mtime
    assert ended_s - last_s < 60
    left = [p for p in psutil.process_iter(["environ"]) if _is_of(p, server.url)]
    assert not left
    server.fail(None)
    (offline,) = folder.glob("wandb/run-*")
    run_client(server, tmp_path, "-m", "wandb", "sync", "--no-skip-online", str(offline))
    (run,) = server.runs.values()
    assert run.logged("val/loss")


def _is_of(process: psutil.Process, url: str) -> bool:
    return (process.info["environ"] or {}).get("WANDB_BASE_URL") == url


def test_no_answer_is_noticed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", url)
        began_s = time.monotonic()
        found = find_unreachable(0.3)
        assert time.monotonic() - began_s < 5
    assert found is not None
    assert found.url == url
    assert "no answer in 0.3 s" in found.reason or "timed out" in found.reason


def test_a_run_is_kept_offline_only_where_it_would_not_have_been(
    closed_port: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", closed_port)
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in LIMIT_VARIABLES:
        monkeypatch.setenv(name, "5")
    for mode in ("offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        keep_offline_if_unreachable(_logger(offline=False))
    monkeypatch.delenv("WANDB_MODE")
    keep_offline_if_unreachable(_logger(offline=True))
    assert capsys.readouterr().err == ""
    logger = _logger(offline=False)
    keep_offline_if_unreachable(logger)
    assert logger.mode == "offline"
    assert f"W&B at {closed_port} cannot be reached" in capsys.readouterr().err
