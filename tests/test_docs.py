"""Every command of README and docs runs here at debug size, or ``NOT_RUN`` has the reason.

A new command needs nothing here if it runs as it is written in a folder that holds what the guides
name (``folder`` below): there, ``configs/X.yaml`` is its debug twin, models and tables are tiny.
Options are checked against the command line in any case, run or not.
"""

import ast
import importlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer
from typing_extensions import override

from fingpt_lightning.cli import trainer
from fingpt_lightning.cli.main import COMMANDS, main
from fingpt_lightning.cli.sweep import build_fit
from fingpt_lightning.cli.trainer import FinGPTCLI
from fingpt_lightning.sweeping.checking import check_sweep
from fingpt_lightning.sweeping.sweep_file import read_sweep
from tests.deploy.tiny_clients import save_clients
from tests.evaluation.tiny_language import ROWS, tiny_network, tiny_tokenizer
from tests.support.documents import (
    ShellCommand,
    anchors,
    blocks,
    inline_code,
    links,
    options_in,
    shell_commands,
)
from tests.tasks.chat_templates import ENDED

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# How a command begins, and why it does not run here. The longest beginning counts.
NOT_RUN = {
    "git clone": "needs a network",
    "make": "installs; what it then runs is in tests/test_configs.py",
    "source .venv": "of the shell",
    "export": "of the shell",
    "pip": "installs: tests/test_wheel.py",
    "python -m pip": "installs: tests/test_wheel.py",
    "wandb sync": "needs W&B's server",
    "python -m benchmarks.": "at toy size in tests/benchmarks",
    "torchrun": "several processes: tests/modules/test_several_devices.py",
    "#!/bin/bash": "SLURM; its variables: tests/modules/test_several_devices.py",
    "jobs=$(sbatch": "SLURM; with a stub: tests/test_examples.py",
    "sbatch": "SLURM; with a stub: tests/test_examples.py",
    "SHARDS=8 sbatch": "SLURM; with a stub: tests/test_examples.py",
    "fingpt fit --config configs/pretrain_openwebtext.yaml --data.train_files hf://": "needs a"
    " network; a stand-in of the hub: tests/data/test_hub_text.py",
    "fingpt fit --config configs/pretrain_gpt2_small.yaml --config configs/overlays/ddp.yaml":
    "several processes: tests/test_overlays.py",
    "fingpt fit --config configs/pretrain_gpt2_small.yaml --config configs/overlays/fsdp.yaml":
    "several processes: tests/test_overlays.py",
    "fingpt fit --config configs/quickstart.yaml --config configs/overlays/pipeline.yaml": "two"
    " processes: tests/test_overlays.py",
    "fingpt fit --config configs/debug_finetune_llama2_70b_qlora_pipeline.yaml": "two processes:"
    " tests/test_configs.py",
    "fingpt fit --config configs/finetune_llama2_70b_qlora_pipeline.yaml": "needs four GPUs",
    "fingpt fit --config quickstart": "as an installed wheel does: tests/test_wheel.py",
    "fingpt export --model runs/NAME --format low_rank --output small --push": "needs the hub; a"
    " stand-in of it: tests/deploy/test_export_push.py",
    "fingpt serve": "goes on until it is ended: tests/serving/test_command.py",
    "fingpt chat": "talks to a person: tests/deploy/test_chat_command.py",
    "curl": "asks a server: tests/serving/test_app.py",
    "fingpt compare": "needs two results on the same rows: tests/reporting/test_comparison.py",
    "fingpt tasks audit --data_dir data --train_files": "ends with status 1 where rows occur twice:"
    " tests/tasks/test_audit.py",
    "tensorboard --logdir": "goes on until it is ended: tests/cli/test_experiment_loggers.py",
    "mlflow ui": "goes on until it is ended: tests/cli/test_experiment_loggers.py",
    "fingpt fit --config configs/quickstart.yaml --trainer.callbacks+ BatchSizeFinder": "needs more"
    " rows than are here: tests/modules/test_lightning_tools.py",
    "fingpt sweep": "each trial is a process: tests/benchmarks/test_local_sweep.py",
    "--trainer.callbacks+ callbacks.PipelineTrace": "tests/callbacks/test_pipeline_trace.py",
}  # fmt: skip

# What makes a command quick, behind its own words.
SMALLER = {
    "fit": (
        *("--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"),
        *("--trainer.logger", "false", "--data.num_synthetic_items", "40"),
    ),
    "validate": ("--trainer.limit_val_batches", "1", "--trainer.logger", "false"),
    "predict": ("--trainer.limit_predict_batches", "1", "--trainer.logger", "false"),
    "generate": ("--max_new_tokens", "3"),
    # Two processes are those of tests/decomposition/test_command.py.
    "decompose": ("--workers", "1"),
    "compress": (
        *("--calibration_tokens", "300", "--refine", "2", "--heal", "2", "--block_length", "32"),
        *("--precision", "32-true", "--text_tokens", "64", "--limit", "2"),
    ),
}

_CACHING = ("fit", "tokenize")
COMMANDS_OF = {guide: shell_commands(guide) for guide in GUIDES}
ALL_COMMANDS = [command for found in COMMANDS_OF.values() for command in found]
EACH_GUIDE = pytest.mark.parametrize(
    "guide", GUIDES, ids=lambda guide: str(guide.relative_to(ROOT))
)


def test_the_guides_are_read() -> None:
    assert len(GUIDES) >= 25
    assert len(ALL_COMMANDS) > 40
    reasons = [_reason(command) for command in ALL_COMMANDS]
    assert set(NOT_RUN.values()) <= set(reasons), "a reason without a command"


def test_a_reason_names_a_test_that_is_there() -> None:
    for reason in NOT_RUN.values():
        for path in re.findall(r"tests/[\w/]+(?:\.py)?", reason):
            assert (ROOT / path).exists(), reason


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds what the guides name, at debug size, under the names that they use."""
    folder = tmp_path_factory.mktemp("guides")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for twin in (folder / "configs").glob("debug_*.yaml"):
        shutil.copy(twin, twin.with_name(twin.name.removeprefix("debug_")))
    texts = [json.dumps({"text": "Profit of Foo rose as the dividend was kept. " * 9})] * 12
    for name in ("texts/some.jsonl", "val.jsonl", "validation.jsonl"):
        _write(folder / name, texts)
    for task, rows in {**ROWS, "tfns": [{"text": "Foo fell", "label": 0}]}.items():
        for split in ("train", "validation"):
            repeated = rows * (20 if split == "train" else 1)
            _write(folder / "data" / task / f"{split}.jsonl", map(json.dumps, repeated))
    base = folder / "models" / "smollm2-135m"
    tiny_network("llama").save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    tiny_tokenizer().save_pretrained(folder / "FOLDER_OR_HUB_NAME")
    row = {"instruction": "Name a gain.", "input": "", "output": "Profit rose"}
    _write(folder / "instructions.jsonl", [json.dumps(row)] * 60)
    turns = [{"role": "user", "content": "Up?"}, {"role": "assistant", "content": "Yes."}]
    _write(folder / "chats.jsonl", [json.dumps({"messages": turns})] * 60)
    _write(folder / "chat.jinja", [ENDED])
    _write(folder / "prompts.txt", ["Profit rose", "Shares of Foo"])
    _write(folder / "prompts.jsonl", ['{"prompt": "Profit", "adapter": "ann"}'])
    _write(folder / "news.csv", ["headline,text,client", "Profit rose,Foo fell,bob"])
    _write_examples(folder)
    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ("--config", "configs/quickstart.yaml", *SMALLER["fit"], *_cache(folder))
        main(["fit", *words, "--trainer.default_root_dir", "runs/NAME"])
        own = save_clients(Path("models/smollm2-135m"), folder / "clients", 4)
    run = folder / "runs" / "NAME"
    shutil.copy(run / "checkpoints" / "last.ckpt", run / "checkpoints" / "best.ckpt")
    for client, name in zip(own, ("A", "B", "...", "NAME"), strict=True):
        if name != "NAME":
            shutil.copytree(run, run.with_name(name))
        shutil.copytree(client, run.with_name(name) / "adapter")
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    return folder


@pytest.mark.xdist_group("guides")
@EACH_GUIDE
def test_every_command_runs_at_debug_size(
    guide: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for command in COMMANDS_OF[guide]:
        if _reason(command) is not None:
            continue
        where = f"{guide.name}, line {command.line}: {command.text}"
        program, *words = command.words
        assert program == "fingpt", f"{where}: what runs it? Give NOT_RUN the reason if nothing"
        cache = _cache(folder) if "finetune" not in command.text and words[0] in _CACHING else ()
        try:
            _remove_output(words)
            main([*words, *SMALLER.get(words[0], ()), *cache])
        except SystemExit as ended:
            if not ended.code:  # of --help
                continue
            error = capsys.readouterr().err.strip().splitlines()[-1:]
            pytest.fail(f"{where}\n{error}\nGive NOT_RUN the reason if it cannot run here")


@EACH_GUIDE
def test_the_command_line_takes_every_word(
    guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_examples(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    # What they read is not here: `folder` has it, where they run.
    monkeypatch.setattr(trainer, "check_trainer_inputs", lambda *given: None)
    for command in COMMANDS_OF[guide]:
        where = f"{guide.name}, line {command.line}: {command.text}"
        try:
            _parse(command)
        except (ValueError, LookupError) as error:
            pytest.fail(f"{where}\n{error}")


@EACH_GUIDE
def test_an_option_or_a_command_in_a_sentence_exists(guide: Path) -> None:
    known = _all_options()
    for code in inline_code(guide):
        first, _, rest = code.partition(" ")
        if first == "fingpt" and rest and not rest.startswith(("-", "COMMAND")):
            assert rest.split()[0] in COMMANDS, code
        if first in ("fingpt", "python") or first.startswith("--"):
            for option in options_in(code.split()):
                assert option.rstrip("+") in known, f"{guide.name}: {code}"


@EACH_GUIDE
def test_a_program_of_the_hub_in_a_sentence_is_installed(guide: Path) -> None:
    there = entry_points(group="console_scripts").names
    for code in inline_code(guide):
        program = code.partition(" ")[0]
        if program == "hf" or program.startswith("huggingface"):
            assert program in there, f"{guide.name}: {code}"


@EACH_GUIDE
def test_no_link_is_dead(guide: Path) -> None:
    for target in links(guide):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = guide.parent / name if name else guide
        assert path.exists(), f"{guide.name}: {target}"
        assert path.resolve().is_relative_to(ROOT), f"{guide.name}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{guide.name}: {target}"


@EACH_GUIDE
def test_a_file_or_a_name_in_a_sentence_exists(guide: Path) -> None:
    for code in inline_code(guide):
        for path in re.findall(r"\b(?:configs|sweeps|docs|tests)/[\w/]+\.\w+", code):
            assert (ROOT / path).exists() or "NAME" in path, f"{guide.name}: {path}"
        for name in re.findall(r"(?<![\w.])(?:fingpt_lightning|callbacks)(?:\.\w+)+", code):
            assert _is_there(name) or name.endswith(".NAME"), f"{guide.name}: {name}"


@EACH_GUIDE
def test_examples_can_be_read(guide: Path) -> None:
    for block in blocks(guide):
        if block.language == "yaml":
            assert yaml.safe_load(block.text), f"{guide.name}, line {block.line}"
        elif block.language == "python":
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom):
                    for alias in node.names:
                        assert _is_there(f"{node.module}.{alias.name}"), guide.name
        else:
            assert block.language in ("", "bash", "text"), f"{guide.name}, line {block.line}"


def test_every_guide_and_every_record_is_linked_from_somewhere() -> None:
    linked = {
        (guide.parent / target.partition("#")[0]).resolve()
        for guide in GUIDES
        for target in links(guide)
    }
    index = {
        (ROOT / "docs" / target.partition("#")[0]) for target in links(ROOT / "docs/README.md")
    }
    for guide in GUIDES:
        assert guide in index or guide.name == "README.md" or guide.parent == ROOT, guide.name
    for record in (ROOT / "docs" / "benchmarks").glob("*.json"):
        assert linked & {record, record.with_suffix(".md")}, f"{record.name} is named nowhere"


def test_the_sweep_that_the_guide_shows_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = [block for block in blocks(ROOT / "docs/sweeps.md") if block.language == "yaml"]
    (tmp_path / "mine.yaml").write_text(example.text)
    monkeypatch.chdir(ROOT)
    check_sweep(read_sweep(tmp_path / "mine.yaml"), build_fit)


def _write(path: Path, lines: Iterator[str] | list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _write_examples(folder: Path) -> None:
    """The files that the guides show: blocks whose first line is ``# NAME.yaml``."""
    for guide in GUIDES:
        for block in blocks(guide):
            if named := re.match(r"# (\w+\.yaml)\n", block.text):
                _write(folder / named[1], [block.text])


def _remove_output(words: list[str]) -> None:
    """Of an earlier command: none replaces what is there."""
    if "--output" in words:
        path = Path(words[words.index("--output") + 1])
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)


def _cache(folder: Path) -> tuple[str, str]:
    return "--data.cache_dir", str(folder / "cache")


def _reason(command: ShellCommand) -> str | None:
    starts = [start for start in NOT_RUN if command.text.startswith(start)]
    return NOT_RUN[max(starts, key=len)] if starts else None


class _Parsed(Exception):
    """The command line was read."""


class _OnlyParsed(FinGPTCLI):
    @override
    def before_instantiate_classes(self) -> None:
        raise _Parsed


def _parse(command: ShellCommand) -> None:
    """Reads the words as the program would.

    Raises:
        ValueError: They are wrong.
        LookupError: There is no such command.
    """
    if command.text.startswith("--"):
        _parse_fingpt(["fit", "--config", "configs/debug_quickstart.yaml", *command.words])
    elif "benchmarks." in command.text:
        module = re.findall(r"benchmarks\.\w+", command.text)[0]
        known = _options_of_source(ROOT / f"{module.replace('.', '/')}.py")
        if wrong := set(options_in(command.words)) - known:
            raise ValueError(f"{module} has no option {wrong}")
    elif command.text.startswith("make"):
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        if command.words[1] not in targets:
            raise LookupError(f"no target {command.words[1]}")
    elif found := re.search(r"\bfingpt (?=[a-z-])|-m fingpt_lightning ", command.text):
        text = re.split(r"[&|;]", command.text[found.end() :])[0]
        text = re.sub(r'"\$\{\w+\[@\]\}"', "", text).replace("--config ... ", "")
        _parse_fingpt(command._replace(text=re.sub(r'"\$\w+"', "2", text)).words)
    elif not _reason(command):
        raise LookupError("what runs this? Give NOT_RUN the reason if nothing")


def _parse_fingpt(words: list[str]) -> None:
    name, *rest = words
    if "--help" in words:
        assert name == "--help" or name in COMMANDS
        return
    options = COMMANDS[name].options
    if options is not None:
        read = importlib.import_module(options).parse_options(rest)
        if name not in ("plan", "tokenize"):
            return
        name, rest = "fit", read.words
    if "--ckpt_path" in rest:  # a file that is not there, without which validate and test refuse
        at = rest.index("--ckpt_path")
        del rest[at : at + 2]
        name = "fit"
    try:
        _OnlyParsed([name, *rest])
    except _Parsed:
        return


def _options_of_source(path: Path) -> set[str]:
    return set(re.findall(r'"(--[a-z_]+)"', path.read_text()))


def _all_options() -> set[str]:
    """Of all commands and benchmarks, and the keys of the classes that a config names."""
    found = {"--help", "--config", "--print_config", "--debug", "--version", "--ckpt_path"}
    found |= {"--runs_dir", "--model.help", "--data.help"}
    for package in ("fingpt_lightning", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            found |= _options_of_source(path)
    golden = (ROOT / "tests" / "golden" / "cli_options.txt").read_text().splitlines()
    for line in golden:
        key, _, name = line.partition(":")[0].rpartition(".")
        found.add(f"--{key.partition('.')[0]}.{name}")
        found.add(f"--{key}.{name}")
        if key.startswith("strategies."):
            found.add(f"--trainer.strategy.init_args.{name}")
    found |= {f"--trainer.{name}" for name in Trainer.__init__.__annotations__}
    found |= {f"--trainer.logger.{name}" for name in ("notes", "tags", "group", "log_model")}
    return found | {"--trainer.logger.offline", "--trainer.logger.project", "--signal"}


def _is_there(name: str) -> bool:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False
