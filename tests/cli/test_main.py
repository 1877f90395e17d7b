import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.plugins import TorchCheckpointIO

from callbacks.progress import TrainingProgress
from fingpt_lightning.cli.early_checks import OFF_VARIABLE
from fingpt_lightning.cli.main import COMMANDS, _tell_start, main, one_line
from fingpt_lightning.cli.run_folders import RUN_FOLDER_VARIABLE
from fingpt_lightning.cli.trainer import FinGPTCLI
from fingpt_lightning.modules import LowRankPretraining
from fingpt_lightning.reporting.environment import environment
from fingpt_lightning.strategies.checkpoint_files import WholeCheckpoints
from tests.support.warm_python import WarmProcess

REPOSITORY = Path(__file__).parents[2]
DEBUG = REPOSITORY / "configs" / "debug_quickstart.yaml"

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``fingpt`` in this process, in a folder of its own; gives status and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str]:
        status = 0
        try:
            main(list(words))
        except SystemExit as error:
            status = int(error.code or 0)
        return status, capsys.readouterr().err

    return call


@pytest.fixture
def fit(run: Run, tmp_path: Path) -> Run:
    """Runs ``fingpt fit`` with the debug config, without W&B."""

    def call(*words: str) -> tuple[int, str]:
        cache = str(tmp_path / "cache")
        shared = ("--trainer.logger", "false", "--data.cache_dir", cache)
        return run("fit", "--config", str(DEBUG), *shared, *words)

    return call


def _only_error(stderr: str) -> str:
    errors = [line for line in stderr.splitlines() if line.startswith("fingpt: error: ")]
    assert len(errors) == 1, stderr
    assert "Traceback" not in stderr
    return errors[0]


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_random_weights_are_not_evaluated(command: str, run: Run, tmp_path: Path) -> None:
    status, stderr = run(command, "--config", str(DEBUG), "--trainer.logger", "false")
    assert status == 2
    assert f"{command} has no trained weights: give --ckpt_path (a file" in _only_error(stderr)
    assert not list(tmp_path.iterdir()), "no run folder is made"


def test_the_untrained_base_is_evaluated_and_named(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OFF_VARIABLE, "1")  # else only the model is named, being missing
    words = ("--config", str(DEBUG), "--trainer.logger", "false", "--model.init_from", "./nowhere")
    status, stderr = run("validate", *words)
    assert status != 0
    assert "fingpt: validate of model.init_from ./nowhere as it is, without a ch" in stderr
    assert "has no trained weights" not in stderr


@pytest.mark.parametrize(
    "program",
    [["-m", "fingpt_lightning"], ["-c", "from fingpt_lightning.cli.main import main; main()"]],
    ids=["module", "script"],
)
def test_help_lists_the_commands_at_once(program: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, *program, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the processor, not of the clock: another program may be busy beside the test.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    for word in (*COMMANDS, "--debug"):
        assert re.search(rf"^ +{word}", done.stdout, re.MULTILINE)


def test_help_of_a_command_has_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["help", "sweep"])
    assert ended.value.code == 0
    assert "--storage" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["help", "swep"])
    assert ended.value.code == 2
    assert "did you mean sweep?" in capsys.readouterr().err


def test_credentials_in_an_address_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "--trainer.logger.tracking_uri", "http://me:secret@host/mlflow", "--bad"]
    with pytest.raises(SystemExit):
        main(["configs", words[2]])
    assert one_line(ValueError(" ".join(words))).endswith(" http://host/mlflow --bad")
    _tell_start(words)
    printed = capsys.readouterr().err
    assert printed.count("host/mlflow") == 2
    assert "secret" not in printed
    assert "secret" not in environment(["fingpt", *words])["command"]


def test_an_unknown_command_names_the_nearest(run: Run) -> None:
    status, stderr = run("fti")
    assert status == 2
    assert f"command 'fti' is none of {', '.join(COMMANDS)}; did you mean fit?" in stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model.rnk", "3"), "rnk"),
        (("--model.rank", "many"), "rank"),
        (("--model.rank", "33"), r"rank 33 is outside \[1, 32\]"),
        (("--model.preset", "gpt2-smal"), "did you mean gpt2-small"),
        (("--model", "LowRankPretrainin"), "LowRankPretrainin"),
        (("--data.block_length", "33"), "block_length 33 is longer than the 32 positions"),
        (("--data.batch_size", "0"), "batch_size 0 is below 1"),
        (("--trainer.max_stps", "3"), "max_stps"),
        (("--trainer.devices", "banana"), "trainer.devices 'banana': `devices` selected with `CPU"),
        (("--config", "no_such.yaml"), "no_such.yaml"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    fit: Run, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    status, stderr = fit(*words)
    assert status == 2, stderr
    assert re.search(message, _only_error(stderr))
    assert not (tmp_path / "runs").exists()


def test_a_misspelt_key_of_a_config_is_named(fit: Run, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("model:\n  init_args:\n    lerning_rate: 0.1\n")
    status, stderr = fit("--config", str(wrong))
    assert status == 2
    error = _only_error(stderr)
    assert "lerning_rate" in error
    assert "learning_rate" in error.replace("lerning_rate", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no\.jsonl"),
        (b"", "text"),
        (b'{"text": "a"}\nnot json\n', r"no\.jsonl.*2"),
        (b'{"body": "a"}\n', "body"),
        (b'{"text": 7}\n', "a number, not a text"),
        (b"\xff\xfe\x00\x01\n", r"no\.jsonl"),
        (b'{"text": "too short"}\n', "token|held out|batch"),
    ],
    ids=["missing", "empty", "no_json", "no_field", "no_string", "binary", "short"],
)
def test_bad_text_is_one_line_and_leaves_nothing_behind(
    fit: Run, tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "no.jsonl"
    if content is not None:
        file.write_bytes(content)
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps({"text": "one two three " * 40}) + "\n")
    status, stderr = fit("--data.train_files", str(file), "--data.val_files", str(good))
    assert status == 1, stderr
    assert re.search(message, _only_error(stderr))
    assert not (tmp_path / "runs").exists()


def test_a_run_that_fails_on_its_data_leaves_the_metrics_that_are_there(
    fit: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.csv").write_text("step,val/loss\n1,2.5\n")
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "too short"}\n')
    words = ("--trainer.default_root_dir", str(folder), "--data.train_files", str(short))
    assert fit(*words, "--data.val_files", str(short))[0] == 1
    assert fit(*words[:2], "--data.train_files", "none.jsonl")[0] == 1
    assert [path.name for path in folder.glob("metrics*")] == ["metrics.csv"]
    assert (folder / "metrics.csv").read_text() == "step,val/loss\n1,2.5\n"


@pytest.mark.parametrize("overlay", [None, "ddp", "fsdp", "pipeline"])
def test_every_run_writes_its_checkpoints_whole(
    overlay: str | None, fit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[FinGPTCLI] = []
    monkeypatch.setattr(FinGPTCLI, "_run_subcommand", lambda self, subcommand: built.append(self))
    words: tuple[str, ...] = ()
    if overlay is not None:
        path = REPOSITORY / "configs" / "overlays" / f"{overlay}.yaml"
        words = ("--config", str(path), "--trainer.devices", "2")
    assert fit(*words)[0] == 0
    assert type(built[0].trainer.strategy.checkpoint_io) is WholeCheckpoints


def test_another_writer_of_checkpoints_is_left_in_place(
    fit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[FinGPTCLI] = []
    monkeypatch.setattr(FinGPTCLI, "_run_subcommand", lambda self, subcommand: built.append(self))
    own = "lightning.pytorch.plugins.TorchCheckpointIO"
    assert fit("--trainer.plugins", f'[{{"class_path": "{own}"}}]')[0] == 0
    assert type(built[0].trainer.strategy.checkpoint_io) is TorchCheckpointIO


@pytest.mark.parametrize("content", [b"no checkpoint", b"", None], ids=["text", "empty", "missing"])
def test_a_checkpoint_that_is_none_is_one_line(
    fit: Run, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "wrong.ckpt"
    if content is not None:
        path.write_bytes(content)
    status, stderr = fit("--ckpt_path", str(path))
    assert status == 1
    assert "wrong.ckpt" in _only_error(stderr)


def test_a_pickle_is_not_run(fit: Run, tmp_path: Path) -> None:
    path, target = tmp_path / "evil.ckpt", tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (target,)

    torch.save({"state_dict": {}, "hyper_parameters": Evil()}, path)
    status, stderr = fit("--ckpt_path", str(path))
    assert status == 1
    assert "not a checkpoint that can be read safely" in _only_error(stderr)
    assert not target.exists()


def test_last_without_a_run_says_where_it_looked(fit: Run) -> None:
    status, stderr = fit("--ckpt_path", "last")
    assert status == 1
    assert "no runs/debug_quickstart-*/checkpoints/last.ckpt" in _only_error(stderr)


def test_pipes_and_alias_bombs_are_refused_at_once(fit: Run, run: Run, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    for words in (("fit", "--config", str(pipe)), ("validate", "--ckpt_path", str(pipe))):
        status, stderr = run(*words)
        assert status != 0
        assert f"{pipe} is neither a file nor a folder" in _only_error(stderr)
    _, stderr = fit("--data.train_files", str(pipe))
    assert f"train_files: {pipe} is neither a file nor a folder" in _only_error(stderr)
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 9):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")
    bomb = tmp_path / "bomb.yaml"
    bomb.write_text("\n".join(lines))
    status, stderr = run("fit", "--config", str(bomb))
    assert status == 2
    assert f"{bomb}: with its aliases it has" in _only_error(stderr)


def test_debug_shows_the_traceback(fit: Run) -> None:
    status, stderr = fit("--data.train_files", "no.jsonl", "--debug")
    assert status == 1
    assert "Traceback" in stderr


@pytest.mark.slow
def test_a_run_leaves_one_folder_that_later_commands_need_alone(
    fit: Run, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, stderr = fit()
    assert status == 0, stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"debug_quickstart-\d{8}-\d{6}", folder.name)
    for name in (
        "config.yaml",
        "metrics.csv",
        "summary.json",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "tokenizer/tokenizer.json",
    ):
        assert (folder / name).is_file(), name
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["model"]["init_args"]["rank"] == 8
    assert resolved["data"]["init_args"]["batch_size"] == 4
    checkpoint = folder / "checkpoints" / "last.ckpt"
    loaded = LowRankPretraining.load_from_checkpoint(checkpoint, weights_only=True)
    assert loaded.hparams["rank"] == 8

    for command in ("validate", "test", "predict"):
        status, stderr = run(command, "--ckpt_path", str(checkpoint), "--trainer.logger", "false")
        assert status == 0, stderr
    (written,) = tmp_path.glob("runs/run-predict-*/predictions.jsonl")
    assert f"{written.relative_to(tmp_path)}: " in stderr
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert [row["block"] for row in rows] == list(range(len(rows)))
    assert all(0 < row["bits_per_byte"] < 20 for row in rows)

    # Weakest first: defaults (rank 0.25), checkpoint (8), config, command line.
    other = tmp_path / "other.yaml"
    other.write_text("model:\n  init_args:\n    learning_rate: 0.5\n    weight_decay: 0.3\n")
    words = (
        *("fit", "--config", str(other), "--model.learning_rate", "0.25"),
        *("--trainer.max_steps", "7", "--trainer.val_check_interval", "1"),
        *("--trainer.check_val_every_n_epoch", "null", "--trainer.logger", "false"),
    )
    status, stderr = run(*words, "--ckpt_path", str(checkpoint))
    assert status == 0, stderr
    assert "model.learning_rate: 0.25 as given, in place of 0.002" in stderr
    assert "model.weight_decay: 0.3 as given, in place of 0.1" in stderr
    resumed = next(f for f in (tmp_path / "runs").iterdir() if f.name.startswith("other-"))
    settings = yaml.safe_load((resumed / "config.yaml").read_text())["model"]["init_args"]
    assert (settings["rank"], settings["learning_rate"], settings["weight_decay"]) == (8, 0.25, 0.3)

    status, stderr = run("validate", "--ckpt_path", str(checkpoint), "--model.rank", "4")
    assert status != 0
    assert "model.rank is 4, the checkpoint was trained with 8" in stderr


@pytest.mark.parametrize("shown", ["true", "false"])
def test_a_terminal_sees_our_own_progress(
    shown: str, fit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[FinGPTCLI] = []
    monkeypatch.setattr(FinGPTCLI, "_run_subcommand", lambda self, subcommand: built.append(self))
    assert fit("--trainer.enable_progress_bar", shown)[0] == 0
    bar = built[0].trainer.progress_bar_callback
    assert isinstance(bar, TrainingProgress) == (shown == "true")
    if shown == "true":
        # Others print what came of the run when it has left the screen.
        assert built[0].trainer.callbacks[0] is bar  # type: ignore[attr-defined]


_STEPS = (
    *("--trainer.max_steps", "30", "--trainer.accumulate_grad_batches", "2"),
    *("--trainer.limit_val_batches", "0", "--last_checkpoint.every_n_train_steps", "1"),
    *("--data.num_synthetic_items", "40"),
)


@pytest.mark.slow
def test_a_run_killed_at_any_step_and_resumed_equals_one_that_was_not(
    fit: Run, tmp_path: Path
) -> None:
    """30 steps of 2 x 4 blocks go on into the second epoch of the debug text."""
    assert fit(*_STEPS)[0] == 0
    (whole,) = (tmp_path / "runs").iterdir()
    words = ["fit", "--config", str(DEBUG), "--trainer.logger", "false", "--data.cache_dir",
             str(tmp_path / "cache"), *_STEPS, "--runs_dir", str(tmp_path / "killed")]  # fmt: skip
    stop_at = random.Random(os.getpid()).randint(1, 28)
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = WarmProcess(["-m", "fingpt_lightning", *words], cwd=tmp_path, env=env)
    try:
        _wait_for_step(tmp_path / "killed", stop_at, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    status, stderr = fit(*_STEPS, "--runs_dir", str(tmp_path / "killed"), "--ckpt_path", "last")
    assert status == 0, f"killed at step {stop_at}: {stderr}"
    resumed = max((tmp_path / "killed").iterdir(), key=lambda folder: folder.stat().st_mtime)
    states = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (whole, resumed)
    ]
    assert states[0]["global_step"] == states[1]["global_step"] == 30
    assert states[0]["tokens_seen"] == states[1]["tokens_seen"]
    assert states[0]["epoch"] >= 1
    for name, weight in states[0]["state_dict"].items():
        assert torch.equal(weight, states[1]["state_dict"][name]), f"{name}, stop at {stop_at}"


def test_the_config_of_a_run_makes_another_run(fit: Run, run: Run, tmp_path: Path) -> None:
    assert fit("--trainer.max_steps", "1")[0] == 0
    (first,) = (tmp_path / "runs").iterdir()
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    status, stderr = run("fit", "--config", str(first / "config.yaml"))
    assert status == 0, stderr
    (second,) = set((tmp_path / "runs").iterdir()) - {first}
    assert (second / "checkpoints" / "last.ckpt").is_file()
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before


def test_two_runs_of_one_second_have_folders_of_their_own(
    fit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []

    def note(cli: FinGPTCLI, _: str) -> None:
        # The first has written nothing when the second begins.
        folders.append(cli.run_folder)
        if len(folders) == 1:
            del os.environ[RUN_FOLDER_VARIABLE]  # another process would not have it
            assert fit()[0] == 0

    monkeypatch.setattr("time.strftime", lambda _: "20260101-000000")
    monkeypatch.setattr(FinGPTCLI, "_run_subcommand", note)
    assert fit()[0] == 0
    names = ["debug_quickstart-20260101-000000", "debug_quickstart-20260101-000000-2"]
    assert [folder.name for folder in folders] == names


@pytest.mark.parametrize(
    ("signum", "status", "message"),
    [
        (signal.SIGTERM, 143, "ended by SIGTERM"),
        (signal.SIGINT, 130, "interrupted"),
    ],
    ids=["terminated", "interrupted"],
)
def test_a_run_that_is_told_to_end_does_not_count_as_done(
    signum: signal.Signals, status: int, message: str, fit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signal_self(*_: Any) -> None:
        os.kill(os.getpid(), signum)

    # A job in the background ignores interrupts, which its children then do too.
    monkeypatch.setattr(LowRankPretraining, "on_train_batch_end", signal_self)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        found, stderr = fit("--trainer.max_steps", "9")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert found == status
    assert _only_error(stderr) == f"fingpt: error: {message}"


def test_the_other_commands_take_the_last_checkpoint_of_a_finetuning_run(
    run: Run, tmp_path: Path
) -> None:
    config = DEBUG.with_name("debug_finetune_smollm2_fpb.yaml")
    words = ("--config", str(config), "--trainer.logger=false")
    status, stderr = run("fit", *words)
    assert status == 0, stderr
    for command in ("validate", "test", "predict"):
        status, stderr = run(command, *words, "--ckpt_path", "last")
        assert status == 0, stderr
        assert "as given, in place of" not in stderr, "nothing differs from the checkpoint"
    (written,) = tmp_path.glob("runs/*-predict-*/predictions.jsonl")
    assert len(written.read_text().splitlines()) == 48


@pytest.mark.parametrize("config", ["debug_quickstart", "debug_finetune_smollm2_fpb"])
def test_a_log_file_of_a_minute_has_ten_lines_that_say_how_it_goes(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", config, "--trainer.logger", "false"]
    words += ["--trainer.max_steps", "6"]
    words += [] if "finetune" in config else ["--data.cache_dir", str(tmp_path / "cache")]
    # A line for each of six steps, as for every 10 s of a minute.
    words += ["--trainer.callbacks+=callbacks.LogLines", "--trainer.callbacks.every_s", "1e-6"]
    log = tmp_path / "nohup.out"
    with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        main(words)
    text = log.read_text()
    lines = re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.+)$", text, re.MULTILINE)
    assert len(set(lines)) >= 10, text
    steps = [
        line for line in lines if re.match(r"step \d/6, .*left, loss .* tokens/s, rate ", line)
    ]
    assert len(steps) >= 5, text
    for start in ("training of", "trainable params:", "validation after", "checkpoint of step"):
        assert any(line.startswith(start) for line in lines), start
    assert lines[-1].startswith("training ended after step 6")
    assert "\r" not in text, "no bar"


def _wait_for_step(runs: Path, step: int, process: WarmProcess) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        for path in runs.glob("*/checkpoints/last.ckpt"):
            try:
                state = torch.load(path, weights_only=True, mmap=True)
            except (RuntimeError, OSError, EOFError):  # being written
                continue
            if state["global_step"] >= step:
                return
        time.sleep(0.02)
    assert process.poll() == 0, "the run neither reached the step nor ended well"


def test_another_class_starts_from_its_own_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[Any] = []

    def stop(cli: FinGPTCLI) -> None:
        parsed.append(cli.config["fit"])
        raise KeyboardInterrupt

    monkeypatch.setattr(FinGPTCLI, "before_instantiate_classes", stop)
    words = ["--model", "fingpt_lightning.modules.QuantizedFinetuning"]
    words += ["--data", "fingpt_lightning.data.FinancialInstructions", "--data.tasks", '["fpb"]']
    with pytest.raises(KeyboardInterrupt):
        FinGPTCLI(["fit", *words, "--model.beta1", "0.8"])
    model, data = parsed[0].model.init_args, parsed[0].data.init_args
    assert (model.weight_decay, model.beta1, model.beta2) == (0.0, 0.8, 0.999)
    assert data.val_share == 0.1
