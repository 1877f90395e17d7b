"""Mistakes are named before torch is imported, in the words of the command itself.

Every kind of mistake is walked for every command: once by the early checks alone, once by the
command with them switched off.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from fingpt_lightning.cli import early_options, option_table
from fingpt_lightning.cli.early_checks import OFF_VARIABLE, check_command, check_trainer_command
from fingpt_lightning.cli.early_options import TABLE, Option, read_table, signature_digest
from fingpt_lightning.cli.errors import ConfigError
from fingpt_lightning.cli.main import COMMANDS, main, one_line
from fingpt_lightning.cli.shipped import CONFIGS, shipped_files
from fingpt_lightning.hub.card import CARD, EXPORT_MARK
from fingpt_lightning.terminal import inputs

_FIT = ("fit", "--config", "debug_quickstart", "--trainer.logger", "false")
_TUNE = ("fit", "--config", "debug_finetune_smollm2_fpb", "--trainer.logger", "false")
_PREDICT = "predict --config debug_quickstart --model.init_from ./none --model.preset null"
_COMPRESS = "compress --model ./none --size .5 --output out"
_LABEL = "label --model ./none --output out.csv --task fpb --input news.csv"
_FILES = {
    "key.yaml": "model:\n  init_args:\n    lerning_rate: 0.1\n",
    "group.yaml": "trainr:\n  max_steps: 3\n",
    "trainer.yaml": "trainer:\n  max_stps: 3\n",
    "value.yaml": "trainer:\n  max_steps: many\n",
    "fraction.yaml": "trainer:\n  max_steps: 1.5\n",
    "yes.yaml": "trainer:\n  max_steps: true\n",
    "class.yaml": "model:\n  class_path: fingpt_lightning.modules.LowRankPretrainig\n",
    "broken.yaml": "model: [\n",
    "list.yaml": "- 1\n",
    "nested.yaml": "fit:\n  trainer:\n    max_steps: 3\n",
    "block.yaml": "trainer: inner.yaml\n",
    "inner.yaml": "max_stps: 3\n",
    "block_value.yaml": "trainer: inner_value.yaml\n",
    "inner_value.yaml": "max_steps: many\n",
    "news.csv": "text\nShares rose.\n",
    "texts.csv": "body\nShares rose.\n",
    "small.yaml": "data:\n  class_path: fingpt_lightning.data.TextBlocks\n"
    "  init_args:\n    batch_size: 0\n",
}

WRONG_FITS = (
    "--trainer.max_stps 3",
    "--trainer.max_stps=3",
    "--trainr.max_steps 3",
    "--best_checkpoint.moniter val/loss",
    "--runs_dr x",
    "stray",
    "stray and --more",
    "--more 3 stray",
    "--trainer.max_steps",
    "--trainer.max_steps --runs_dir x",
    "--config",
    "--trainer.max_steps many",
    "--trainer.max_steps 1.50",
    "--trainer.max_epochs=many",
    "--trainer.limit_val_batches x",
    "--trainer.enable_progress_bar maybe",
    "--trainer.precision bf17",
    "--trainer.deterministic wrn",
    "--seed_everything x",
    "--model.rnk 3",
    "--model.init_args.rnk 3",
    "--model.rank many",
    "--model.init_args.rank many",
    "--model.learning_rate fast",
    "--model.optimizer adam",
    "--model.preset gpt2-smal",
    "--model.head_map Own",
    "--model.recipe narow",
    "--model.learning_rate -1",
    "--model.dropout 1",
    "--model.compression 0.5",
    "--model.rank 0",
    "--model.rank 1.5",
    "--model.embedding_rank -1",
    "--model.warmup 1.5",
    "--model.cooldown 0",
    "--model.teacher_weight 2",
    "--model.teacher_temperature 0",
    "--trainer.accumulate_grad_batches 0",
    "--trainer.limit_val_batches 1.5",
    "--trainer.val_check_interval 0",
    "--trainer.gradient_clip_val -1",
    "--trainer.max_steps -2",
    "--seed_everything -1",
    "--last_checkpoint.every_n_train_steps 0",
    "--model fingpt_lightning.modules.LowRankPretrainig",
    "--data.batch_sze 1",
    "--data.batch_size 1.5",
    "--data.batch_size 0",
    "--data.val_share 1.5",
    "--data.seed 4294967296",
    "--data.train_files none.jsonl",
    "--data.train_files none/*.jsonl",
    "--data.val_files [none.jsonl,value.yaml]",
    "--data.tokenizer ./none",
    "--data.tokenizer nobody/nothing",
    "--data.cache_dir news.csv",
    "--ckpt_path run",
    "--ckpt_path bestt",
    "--trainer.check_val_every_n_epoch null --trainer.val_check_interval 0.5",
    "--data.tokenizer key.yaml",
    "--model.teacher ./none",
    "--model.teacher nobody/nothing",
    "--model.init_from ./none --model.preset null",
    "--ckpt_path none.ckpt",
    "--ckpt_path last",
    "--config none.yaml",
    *(
        f"--config {name}"
        for name in _FILES
        if name.endswith(".yaml") and not name.startswith("inner")
    ),
)
WRONG_TUNINGS = (
    "--data.tasks [fpd]",
    "--data.tasks fpd",
    "--data.tasks own.yaml",
    "--data.chat_template non",
    "--data.tasks [fpb] --data.data_dir none",
    "--model.quantize nf5",
    "--model.rnk 5",
    "--model.base ./none",
    "--model.kl_positions 0",
    "--data.vocab_size 256",
)
WRONG = (
    *(" ".join((*_FIT, wrong)) for wrong in WRONG_FITS),
    *(" ".join((*_TUNE, wrong)) for wrong in WRONG_TUNINGS),
    "validate --config debug_quickstart --trainer.max_stps 3",
    "validate --config debug_quickstart --ckpt_path none.ckpt",
    "validate --config debug_quickstart",
    "test --config debug_quickstart --verbose maybe",
    "test --config debug_quickstart --model.rank many",
    "predict --config debug_quickstart",
    "predict --config debug_quickstart --predictions.pth x",
    "predict --config debug_quickstart --predictions.overwrite maybe",
    "predict --config debug_quickstart --ckpt_path none.ckpt",
    f"{_PREDICT} --predictions.path run/predictions.jsonl",
    f"{_PREDICT} --predictions.path out.csv",
    f"{_PREDICT} --predictions.path sets --predictions.overwrite true",
    f"{_PREDICT} --trainer.default_root_dir run",
    "plan --config debug_quickstart --trainer.max_stps 3",
    "plan --config debug_quickstart --no_calibrat",
    "plan --config debug_quickstart --jsn plan.json",
    "plan --config debug_quickstart --model.rank many",
    "plan --config none",
    "plan --config debug_quickstart --json none/plan.json",
    "plan --config debug_quickstart --json sets",
    "tokenize --config debug_quickstart --trainer.max_stps 3",
    "tokenize --config debug_quickstart --data.train_files none.jsonl",
    "tokenize --config debug_quickstart --shrad 1/2",
    "tokenize --config debug_quickstart --shard 0/8",
    "tokenize --config debug_quickstart --shard 1/8 --merge 8",
    "tokenize --config debug_quickstart --overwrite",
    "tokenize --config debug_quickstart --data.num_tokenizing_workers 2 --merge",
    "evaluate --model ./none --tasks fpb --data_dir none",
    "evaluate --model ./none --tasks fpd --data_dir none",
    "evaluate --model ./none --tasks own.yaml",
    "evaluate --model ./none --tasks fpb --data_dir sets --split train",
    "evaluate --model ./none --tasks fpb --data_dir sets",
    "evaluate --model ./none --tasks fpb --scoring wrong",
    "evaluate --model ./none --tasks fpb --limitt 3",
    "evaluate --model ./none --tasks fpb --shard 1/2",
    "evaluate --model ./none --tasks fpb --data_dir sets --output done",
    "evaluate --model ./none --tasks fpb --data_dir sets --output news.csv",
    "evaluate --model ./none --tasks fpb --data_dir sets --output news.csv/out",
    "evaluate --model ./none --tasks fpb --num_fewshot -1",
    "evaluate --model ./none --tasks fpb --num_fewshot 1 --fewshot_seed 4294967296",
    "evaluate --model ./none --tasks fpb --output out --shard 3/2",
    "evaluate --model ./none --tasks fpb --data_dir sets --output out --merge",
    "evaluate --model ./none --tasks fpb --output out --merge --dequantize never",
    "label --model ./none --output out.csv --task fpb --input none.csv",
    "label --model ./none --output out.csv --task fpd --input texts.csv",
    "label --model ./none --output out.csv --task fpb --input key.yaml",
    "label --model ./none --output out.csv --task fpb --input texts.csv --text_column body",
    "label --model ./none --output out.csv --task fpb --input texts.csv --separatr x",
    "label --model ./none --output texts.csv --task fpb --input news.csv",
    "label --model ./none --output ./news.csv --task fpb --input news.csv --overwrite",
    "label --model ./none --output out.xls --task fpb --input news.csv",
    "label --model ./none --output out.xls --task fpb --input news.csv --shard 1/2",
    "label --model ./none --output sets.csv --task fpb --input news.csv --overwrite",
    "label --model ./none --output news.csv/out.csv --task fpb --input news.csv",
    "label --model ./none --output out.csv --task fpb --input sets.csv",
    f"{_LABEL} --batch_tokens 2147483648",
    f"{_LABEL} --shard 0/8",
    f"{_LABEL} --shard 9/8",
    f"{_LABEL} --shard a/b",
    f"{_LABEL} --shard 1/8 --merge",
    f"{_LABEL} --merge 0",
    f"{_LABEL} --merge",
    f"{_LABEL} --merge 8",
    f"{_LABEL} --merge --device cpu",
    "generate --model ./none --prompt x",
    "generate --model none.gguf --prompt x",
    "generate --model ./none --prompts none.txt",
    "generate --model ./none --prompt x --max_new_tokens 0",
    "generate --model ./none --promt x",
    "generate --model ./none --prompt x --output news.csv",
    "generate --model ./none --prompt x --output sets --overwrite",
    "generate --model ./none --prompts texts.csv --output texts.csv --overwrite",
    "generate --model ./none --prompts sets --output out.jsonl",
    "generate --model ./none --prompts news.csv",
    "generate --model ./none --prompt x --output out.csv",
    "export --model ./none --format hf --output out --prompts news.csv",
    "generate --model ./none --prompt x --temperature 0",
    "generate --model ./none --prompt x --temperature inf",
    "generate --model ./none --prompt x --temperature 1 --top_p 1.5",
    "generate --model ./none --prompt x --temperature 1 --seed -1",
    "generate --model ./none --prompt x --top_k 3",
    "generate --model ./none --prompt x --adapter none",
    "chat --model ./none",
    "chat --model ./none --adapter none",
    "chat --model ./none --tokenizer ./none",
    "chat --model ./none --contxt 9",
    "chat --model ./none --dtype bf61",
    "decompose --model ./none --compression 2 --output out --device banana",
    "chat --model ./none --context 0",
    "chat --model ./none --temperature nan",
    "chat --model ./none --seed 3",
    "chat --model ./none --max_new_tokens many",
    "chat",
    "decompose --model ./none --rank_ratio .5 --output out",
    "decompose --model ./none --rank_ratio 5 --output out",
    "decompose --model ./none --rnk_ratio .5 --output out",
    "decompose --model ./none --rank_ratio .5 --output done",
    "decompose --model ./none --rank_ratio .5 --output sets",
    "decompose --model ./none --compression .5 --output out",
    "decompose --model ./none --compression 2 --allocation loss --output out",
    "decompose --model ./none --compression 2 --whitening both --output out",
    "decompose --model ./none --compression 2 --whitening bth --output out",
    "export --model ./none --format hf --output out",
    "export --model ./none --format hff --output out",
    "export --model ./none --format nf4 --output out --calibration none.jsonl",
    "export --model ./none --format hf --output done",
    "export --model ./none --format hf --output sets",
    "export --model ./none --format hf --output news.csv/out",
    "export --model ./none --format hf --output out --tolerance 0",
    "export --model ./none --format hf --output out --prompts none.txt",
    "export --model ./none --format hf --output out --push me/small",
    "export --model ./none --format hf --output out --push small",
    "export --model ./none --format hf --output out --private",
    "export --model ./none --format hf --output out --results sets",
    "report none",
    "serve --model ./none --prt 3",
    "serve --model ./none --port 0",
    "serve --model ./none --port many",
    "serve --model ./none --tasks fpd",
    "serve --model ./none --tasks piqa",
    "serve --model ./none --tasks own.yaml",
    "serve --model ./none --adapters none=folder",
    "serve --model ./none --adapters folder",
    "compare one other --outptu x",
    "compare one",
    "compare one other",
    "compare sets texts.csv",
    "compare sets one",
    "compare one other --output x.htm",
    "compare one other --output none/x.html",
    "compress --model ./none --outptu x",
    f"{_COMPRESS} --calibration texts.csv --size 2",
    f"{_COMPRESS} --calibration texts.csv --format nf5",
    f"{_COMPRESS} --calibration texts.csv --allocation los",
    f"{_COMPRESS} --calibration texts.csv --whitening bth",
    f"{_COMPRESS} --calibration texts.csv --limit 3",
    f"{_COMPRESS} --calibration texts.csv --precision 16-mixed",
    f"{_COMPRESS} --calibration texts.csv --heal 2 --teacher_weight 2",
    f"{_COMPRESS} --calibration texts.csv --heal_quantized 2",
    f"{_COMPRESS} --calibration none.jsonl",
    f"{_COMPRESS} --calibration texts.csv --output done",
    f"{_COMPRESS} --calibration texts.csv --output sets",
    f"{_COMPRESS} --calibration texts.csv --heal -1",
    f"{_COMPRESS} --calibration task:fpd",
    f"{_COMPRESS} --calibration task:fpb --texts none.txt",
    f"{_COMPRESS} --calibration task:fpb --tasks fpd",
    f"{_COMPRESS} --calibration task:fpb --tasks fpb --data_dir sets",
    "report texts.csv",
    "report none --outptu x",
    "report sets --output none/report.html",
    "report sets --output sets",
    "report sets --output page.pdf",
    "sweep none",
    "sweep quick_rank --output sets",
    "sweep quick_rank --output news.csv",
    "sweep --resume sets",
    "sweep quick_rank --cont 3",
    "sweep quick_rank --storage postgres://me@database/sweeps",
    "configs none",
    "configs quickstart --cpy x",
    "tasks fpd",
    "tasks fpb --date_dir x",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with wrong configs and a small data set."""
    for name, text in _FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "sets" / "fpb").mkdir(parents=True)
    row = {"sentence": "Shares rose.", "label": 2}
    (tmp_path / "sets" / "fpb" / "validation.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "sets.csv").mkdir()
    (tmp_path / "done").mkdir()
    for name in ("results.json", "decomposition.json", "compression.json"):
        (tmp_path / "done" / name).write_text("{}")
    (tmp_path / "done" / CARD).write_text(EXPORT_MARK)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "predictions.jsonl").write_text("{}")
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "best.ckpt").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _early(words: list[str]) -> tuple[int, str] | None:
    """Status and message of the early checks; None where they find nothing."""
    command, *rest = words
    _, options, _ = COMMANDS[command]
    try:
        if options is None:
            check_trainer_command(command, rest)
        else:
            check_command(command, importlib.import_module(options).parse_options(rest))
    except Exception as error:
        is_config = isinstance(error, ConfigError) or type(error).__name__ == "WrongOptions"
        return (2 if is_config else 1), one_line(error)
    return None


def _late(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Status and message of the command itself."""
    monkeypatch.setenv(OFF_VARIABLE, "1")
    with pytest.raises(SystemExit) as ended:
        main(words)
    errors = re.findall(r"^fingpt: error: (.*)$", capsys.readouterr().err, re.MULTILINE)
    assert len(errors) == 1, errors
    return int(str(ended.value.code)), errors[0]


@pytest.mark.parametrize("line", WRONG)
def test_a_mistake_is_named_early_in_the_words_of_the_command(
    line: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = line.split()
    early = _early(words)
    if words[0] not in ("configs", "tasks"):  # these import nothing heavy
        assert early is not None, "the early checks do not find it"
    late = _late(words, monkeypatch, capsys)
    assert early in (late, None)


@pytest.mark.parametrize(
    "command",
    ["chat", "evaluate --tasks fpb", "generate --prompt x", f"{_LABEL} --overwrite", "serve"],
)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            "--tokenizer nobody/nothing",
            "nobody/nothing is neither a local folder nor to be had fr",
        ),
        ("--tokenizer news.csv", "tokenizer: news.csv is a file; give its folder"),
        ("--chat_template non", "chat_template 'non' is neither auto, none nor a file; did you m"),
        (
            "--chat_template new.csv",
            "neither auto, none nor a file; the nearest name there is n",
        ),
    ],
)
def test_what_is_read_beside_a_model_is_looked_for_early(
    command: str, wrong: str, message: str, folder: Path
) -> None:
    status, found = _early([*command.split(), "--model", "run", *wrong.split()]) or (0, "")
    assert status == 1
    assert message in found


@pytest.mark.parametrize(
    "line",
    [
        "evaluate --model ./none --tasks fpb",
        _LABEL,
        "generate --model ./none --prompt x",
        "chat --model ./none",
        "serve --model ./none",
        "decompose --model ./none --compression 2 --output out",
        "export --model ./none --format hf --output out",
    ],
)
@pytest.mark.parametrize("device", ["banana", "meta", "tpu9", "cuda:x"])
def test_what_is_not_the_name_of_a_device_is_a_wrong_command_line(line: str, device: str) -> None:
    message = f"argument --device: {device!r} is not cpu, cuda or a name such as cuda:1"
    assert _early([*line.split(), "--device", device]) == (2, message)


@pytest.mark.parametrize(
    "line",
    [
        "evaluate --model run --tasks fpb --data_dir sets --output locked/out",
        "label --model run --task fpb --input news.csv --output locked/out.csv",
        "generate --model run --prompt x --output locked/new/out.jsonl",
        "decompose --model run --rank_ratio .5 --output locked/out",
        "compress --model run --size .5 --calibration task:fpb --output locked/out",
        "export --model run --format hf --output locked/out",
        "sweep quick_rank --output locked/out",
        "report run --output locked/out.html",
        "compare run run --output locked/out.md",
        "plan --config debug_quickstart --json locked/out.json",
        f"{_PREDICT} --predictions.path locked/out.jsonl",
    ],
)
def test_a_folder_that_cannot_be_written_to_is_named_before_the_work(
    line: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "locked").mkdir()
    access = os.access  # by which root may write everywhere
    monkeypatch.setattr(os, "access", lambda x, mode: x.name != "locked" and access(x, mode))
    status, found = _early(line.split()) or (0, "")
    assert status == 1
    assert re.fullmatch(r"\S+ locked/\S+: the folder (/\S*/)?locked cannot be written to", found)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--model.head_map Own", "head_map: expected shared, own or null, got 'Own'; did you m"),
        ("--model.recipe narow", "expected narrow or null, got 'narow'; did you mean narrow?"),
        ("--model.optimizer spectrom", "got 'spectrom'; did you mean spectron?"),
        ("--trainer.precision bf16-mixd", "got 'bf16-mixd'; did you mean bf16-mixed?"),
        ("--config run", "--config run is a folder, not a file"),
        (
            "--trainer.check_val_every_n_epoch null --trainer.val_check_interval 0.5",
            "val_check_interval 0.5 is a share of an epoch, and trainer.check_val_every_n_epoch nu",
        ),
    ],
)
def test_the_nearest_of_the_words_that_a_setting_takes_is_named(
    wrong: str, message: str, folder: Path
) -> None:
    status, found = _early([*_FIT, *wrong.split()]) or (0, "")
    assert status == 2
    assert message in found


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("tokenize --shrad 1/2", "no option --shrad; did you mean --shard?"),
        ("tokenize --shrad=1/2", "no option --shrad; did you mean --shard?"),
        ("tokenize --merg", "no option --merg; did you mean --merge?"),
        ("tokenize --overwrit", "no option --overwrit; did you mean --overwrite?"),
        ("tokenize --runs_dr x", "no option --runs_dr; did you mean --runs_dir?"),
        ("plan --jsn plan.json", "no option --jsn; did you mean --json?"),
        ("plan --devises 2", "no option --devises; did you mean --devices?"),
        ("plan --no_calibrat", "no option --no_calibrat; did you mean --no_calibrate?"),
        ("fit --shrad 1/2", "no option --shrad"),  # it has none such
    ],
)
def test_the_nearest_option_is_searched_among_those_of_the_command(
    wrong: str, message: str, folder: Path
) -> None:
    command, *words = wrong.split()
    assert _early([command, "--config", "debug_quickstart", *words]) == (2, message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--predictions.path run/predictions.jsonl",
            "run/predictions.jsonl is there already; predictions.overwrite repl",
        ),
        ("--predictions.path out.csv", "out.csv does not end in .jsonl"),
        (
            "--predictions.path sets --predictions.overwrite true",
            "sets is a folder, not a file",
        ),
        ("--trainer.default_root_dir run", "run/predictions.jsonl is there already"),
    ],
)
def test_predictions_that_are_there_are_named_before_anything_is_read(
    words: str, message: str, folder: Path
) -> None:
    status, found = _early([*_PREDICT.split(), *words.split()]) or (0, "")
    assert status == 1
    assert f"predictions.path {message}" in found


def test_every_command_is_walked() -> None:
    assert {line.split()[0] for line in WRONG} == set(COMMANDS)
    assert len(WRONG) > 90


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_shipped_configs_are_never_refused_early(command: str, folder: Path) -> None:
    files = shipped_files(CONFIGS)
    assert len(files) > 15
    table = read_table()
    assert table is not None
    for file in files:
        words = ["--config", str(file.path)]
        assert early_options.check_options(command, words, table) is not None, file.name


@pytest.mark.parametrize(
    "taken",
    [
        "--trainer.max_step 3",  # argparse takes the beginning of one option for it
        "--trainer.max_steps 1e1",  # wrong, and left to the parser, which reads YAML
        "--trainer.max_epochs null",
        "--trainer.max_epochs -1",
        "--trainer.devices auto",
        "--trainer.callbacks+ callbacks.MemoryMonitor",
        "--trainer.callbacks.every_n_steps 3",
        "--trainer.logger.project name",
        "--trainer.logger.init_args.project name",
        "--trainer.strategy ddp",
        "--model.rank 8 --model.embedding_rank null",
        "--model.rank .5",
        "--model.rank_overrides.attn null",
        "--model fingpt_lightning.modules.QuantizedFinetuning --model.base x",
        "--model own.module.Class --model.anything 3",
        "--model.preset null",
        "--model.learning_rate 1e-3",
        "--model.help",
        "--print_config",
        "--best_checkpoint.mode max",
    ],
)
def test_what_the_parser_may_take_is_left_to_it(taken: str, folder: Path) -> None:
    assert _early([*_FIT, *taken.split()]) is None


def test_every_number_of_our_classes_has_a_range_that_is_checked_early() -> None:
    table = read_table()
    assert table is not None
    numbers = 0
    for path, settings in table.classes.items():
        subject = "data" if ".data." in path else "model"
        for name, option in settings.items():
            for kind, value in {"int": "-1", "float": "-1.0"}.items():
                if kind in option.kinds:
                    words = [f"--{subject}", path, f"--{subject}.{name}", value]
                    status, message = _early(["fit", *words]) or (0, "")
                    assert (status, message.partition(" ")[0]) == (2, name), message
                    numbers += 1
    assert numbers > 60


def test_the_table_is_that_of_the_parser() -> None:
    """Remade with ``python -m fingpt_lightning.cli.option_table``."""
    table = option_table.make_table()
    assert len(table["options"]) > 30
    assert option_table.as_text(table) == TABLE.read_text(encoding="utf-8")


def test_a_class_that_has_changed_is_left_to_the_parser(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    wrong = [*_FIT, "--model.rnk", "3"]
    assert _early(wrong) is not None
    monkeypatch.setattr(early_options, "_digest_of", lambda file, name: "another")
    assert _early(wrong) is None


def test_other_versions_of_the_parser_are_left_to_it(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    wrong = [*_FIT, "--trainer.max_stps", "3"]
    assert _early(wrong) is not None
    monkeypatch.setattr(early_options, "version", lambda name: "0")
    assert _early(wrong) is None


def test_a_digest_follows_the_parameters_alone() -> None:
    one = "class A:\n    def __init__(self, x: int = 1) -> None:\n        self.x = x\n"
    assert signature_digest(one, "A") == signature_digest(one + "        self.y = 2\n", "A")
    assert signature_digest(one, "A") != signature_digest(one.replace("= 1", "= 2"), "A")
    assert signature_digest(one, "B") is None


@pytest.mark.parametrize(
    ("refusal", "taken", "refused"),
    [
        ("n {value} is below 1", (1, 7), (0, -3)),
        ("n {value} is not above 0", (0.1, 2.0), (0, -1.0)),
        ("n {value} is outside [0, 1)", (0, 0.9), (1, -0.1)),
        ("n {value} is outside (0, 1]", (0.1, 1), (0, 1.1)),
        ("n {value} is outside (0, 1] (a share of all)", (0.1, 1), (0, float("nan"))),
        ("n {value} is below 1 (dense over stored)", (1, float("inf")), (0.5, -1)),
        ("n {value} is outside [0, 2**32)", (0, 2**32 - 1), (2**32, -1)),
    ],
)
def test_ranges_are_read_from_the_message(
    refusal: str, taken: tuple[float | int, ...], refused: tuple[float | int, ...]
) -> None:
    option = Option("int or float", ("int", "float"), refusal=refusal)
    assert [option.refused("n", value) for value in taken] == [None, None]
    assert [option.refused("n", value) for value in refused] == [
        refusal.format(value=value) for value in refused
    ]


def test_the_hub_is_asked_once_about_a_model(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked = []

    def model_info(self: object, name: str, **_: object) -> None:
        asked.append(name)
        raise OSError("it does not know it")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    inputs._reason_of_hub.cache_clear()
    words = ["generate", "--model", "nobody/none", "--prompt", "x"]
    found = [_early(words), _early(words)]
    assert found == [(1, "model nobody/none: no such file or folder, and not to be had from the"
                      " Hugging Face hub (it does not know it)")] * 2  # fmt: skip
    assert asked == ["nobody/none"]
    inputs._reason_of_hub.cache_clear()


def test_early_checks_import_nothing_heavy(folder: Path) -> None:
    code = (
        "import sys\n"
        "from fingpt_lightning.cli.main import main\n"
        "for words in [\n"
        "    ['fit', '--config', 'quickstart', '--trainer.max_stps', '3'],\n"
        "    ['fit', '--config', 'quickstart', '--data.train_files', 'none.jsonl'],\n"
        "    ['evaluate', '--model', './none', '--tasks', 'fpb'],\n"
        "    ['sweep', 'none'], ['report', 'none'], ['plan', '--config', 'none'],\n"
        "]:\n"
        "    try:\n"
        "        main(words)\n"
        "    except SystemExit as error:\n"
        "        assert error.code\n"
        "heavy = {'torch', 'lightning', 'transformers', 'wandb', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("fingpt: error: ") == 6
