"""Every command names the file that is damaged and the place, in one line, whatever the damage."""

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pytest
from pyarrow import parquet

# Lightning sets an environment variable when it is imported: not in a test.
import fingpt_lightning.cli.trainer  # noqa: F401
from fingpt_lightning.cli.main import main
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer, write_rows
from tests.reporting.folders import make_run

CONFIG = Path(__file__).parents[2] / "configs" / "debug_quickstart.yaml"
Damage = Callable[[Path], None]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    """Spoils what a Parquet file holds, and leaves its footer as it is."""
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 3] = b"\xff" * (len(data) // 3 - 4)
    path.write_bytes(data)


def _bytes(path: Path) -> None:
    path.write_bytes(b"text,label\nfine,neutral\n\xff\xfe\n" * 2)


def _binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 64)


def _prose(path: Path) -> None:
    path.write_text("Dear reader, this is a text of many lines.\n" * 500)


def _list(path: Path) -> None:
    path.write_text("- word\n" * 5000)


def _panic(path: Path) -> None:
    """A normalizer whose table points out of itself, at which the code in Rust panics."""
    table = (4096).to_bytes(4, "little") + b"\xff" * 4096
    content = json.loads(path.read_text())
    content["normalizer"] = {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode(table).decode(),
    }
    path.write_text(json.dumps(content))


MODEL = ("--model", "model", "--device", "cpu")
FIT = ("fit", "--config", str(CONFIG), "--trainer.logger", "false", "--runs_dir", "runs")
EVALUATE = ("evaluate", *MODEL, "--tasks", "fpb", "--data_dir", "data", "--output", "results")
LABEL = ("label", *MODEL, "--task", "fpb", "--output", "out.jsonl", "--input")
GENERATE = ("generate", *MODEL, "--prompts")
TRAIN_ON = ("--data.tokenizer", "model", "--data.cache_dir", "cache", "--data.train_files")
# What is damaged, how, the command, and what it says.
CASES: list[tuple[str, Damage, tuple[str, ...], str]] = [
    ("a.yaml", _prose, ("fit", "--config", "a.yaml"), "a.yaml is not a config: it holds a text, n"),
    ("a.yaml", _list, ("fit", "--config", "a.yaml"), "a.yaml is not a config: it holds a list, n"),
    ("a.yaml", _binary, ("fit", "--config", "a.yaml"), "a.yaml:2: no UTF-8 text at byte 128"),
    ("a.yaml", _prose, ("plan", "--config", "a.yaml"), "a.yaml is not a config: it holds a text,"),
    ("a.yaml", _binary, ("plan", "--config", "a.yaml"), "a.yaml:2: no UTF-8 text at byte 128"),
    ("a.yaml", _prose, ("sweep", "a.yaml", "--local"), "a.yaml: no sweep file"),
    ("a.yaml", _binary, ("sweep", "a.yaml", "--local"), "a.yaml"),
    ("a.ckpt", _binary, (*FIT, "--ckpt_path", "a.ckpt"), "ckpt_path a.ckpt is not a checkpoint"),
    ("a.parquet", _cut, (*FIT, *TRAIN_ON, "a.parquet"), "a.parquet: no parquet data"),
    ("a.parquet", _flip, (*FIT, *TRAIN_ON, "a.parquet"), "a.parquet"),
    ("model/tokenizer.json", _panic, (*FIT, *TRAIN_ON, "a.jsonl"), "its tokenizer is damaged"),
    ("a.txt", _binary, (*FIT, *TRAIN_ON, "a.txt"), "a.txt: "),
    ("data/fpb/validation.parquet", _cut, EVALUATE, "validation.parquet is not a whole Parquet"),
    ("data/fpb/validation.parquet", _flip, EVALUATE, "validation.parquet: damaged behind row 0"),
    (
        "data/fpb/validation.csv",
        _bytes,
        (*EVALUATE, "--encoding", "utf-8"),
        "validation.csv:3: no UTF-8 text at byte 24",
    ),
    # Without the word it is read as ISO-8859-1, in which this set is published.
    ("data/fpb/validation.csv", _bytes, EVALUATE, "validation.csv:3: no field 'label'"),
    ("model/tokenizer.json", _panic, EVALUATE, "model: its tokenizer is damaged"),
    ("model/tokenizer.json", _cut, EVALUATE, "model"),
    ("model/model.safetensors", _cut, EVALUATE, "model.safetensors"),
    ("model/config.json", _cut, EVALUATE, "config.json"),
    ("a.csv", _bytes, (*LABEL, "a.csv"), "a.csv:3: no UTF-8 text at byte 24"),
    ("a.parquet", _cut, (*LABEL, "a.parquet"), "a.parquet is not a whole Parquet file"),
    ("a.parquet", _flip, (*LABEL, "a.parquet"), "a.parquet: damaged behind row 0"),
    ("model/tokenizer.json", _panic, (*LABEL, "a.jsonl"), "model: its tokenizer is damaged"),
    ("prompts.txt", _bytes, (*GENERATE, "prompts.txt"), "prompts.txt:3: no UTF-8 text at byte 24"),
    ("run/metrics.csv", _bytes, ("report", "run"), "metrics.csv:3: no UTF-8 text at byte 24"),
    ("run/config.yaml", _binary, ("report", "run"), "config.yaml:2: no UTF-8 text at byte 128"),
    ("run/summary.json", _cut, ("report", "run"), "summary.json:"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "damage", "words", "message"),
    CASES,
    ids=[f"{words[0]}-{file}-{damage.__name__}" for file, damage, words, _ in CASES],
)
def test_the_message_names_the_file_and_the_place(
    file: str,
    damage: Damage,
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUST_BACKTRACE", "1")
    tiny_network("gpt2").save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    texts = [f"Shares of company {number} rose" for number in range(300)]
    Path("a.txt").write_text("\n".join(texts))
    Path("a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    path = Path(file)
    write_rows(Path("data"), "fpb")
    if path.parts[0] == "data":
        for other in path.parent.glob("validation.*"):
            other.unlink()
    if path.parts[0] == "run":
        make_run(Path("run"))
    if path.suffix == ".parquet":
        columns = {"text": texts, "label": ["neutral"] * len(texts)}
        parquet.write_table(pyarrow.table(columns), path, use_dictionary=False)
    damage(path)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    # The first line of `fit` says what is run, before anything is read.
    said = re.sub(r"\Afingpt: fit --.*\n", "", capfd.readouterr().err)
    assert ended.value.code in (1, 2), said
    assert len(said.splitlines()) == 1, said
    assert re.search(message, said), said
    assert said.startswith("fingpt: error: ")
    assert len(said) < 400


def test_the_cases_name_every_command_that_reads_files() -> None:
    commands = {words[0] for _, _, words, _ in CASES}
    assert commands == {"fit", "plan", "sweep", "evaluate", "label", "generate", "report"}
