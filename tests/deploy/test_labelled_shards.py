"""Shards of a labeled file: merged, they are the bytes of one run."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fingpt_lightning.cli.early_checks import OFF_VARIABLE
from fingpt_lightning.cli.main import main
from fingpt_lightning.deploy import label_command, labelling
from fingpt_lightning.deploy.labelling import Labeller
from fingpt_lightning.files import owned
from fingpt_lightning.models.formats.peft_adapter import adapter_digest
from tests.deploy.tiny_clients import save_clients
from tests.evaluation.tiny_language import ROWS, tiny_network, tiny_tokenizer
from tests.support.sharded_command import ShardedCommand

NUM_ROWS = 11


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_network("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def label(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> ShardedCommand:
    """``fingpt label`` on 11 rows, 2 at a time."""
    monkeypatch.chdir(tmp_path)
    for module in (labelling, label_command):
        monkeypatch.setattr(module, "CHUNK_ROWS", 2)
    texts = [row["text"] for row in ROWS["fpb"]] * 3
    rows = [{"id": f"0{index}", "text": text} for index, text in enumerate(texts[:NUM_ROWS])]
    Path("in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = {
        "--model": str(model),
        "--task": "fpb",
        "--input": "in.jsonl",
        "--output": "out.jsonl",
    }
    return ShardedCommand("label", given, capsys)


def _whole(label: ShardedCommand, *words: str, ending: str = ".jsonl") -> bytes:
    assert label("--output", f"whole{ending}", *words)[0] == 0
    return Path(f"whole{ending}").read_bytes()


@pytest.mark.parametrize(
    ("ending", "count"), [(".jsonl", 4), (".csv", 3), (".parquet", 3), (".jsonl", 8), (".csv", 1)]
)
def test_merged_shards_are_the_bytes_of_one_run(
    label: ShardedCommand, ending: str, count: int
) -> None:
    whole = _whole(label, ending=ending)
    out = Path(f"out{ending}")
    label.run_shards(count, "--output", str(out))
    assert not out.exists()
    assert len(list(Path().glob(f"out{ending}.shard-*-of-{count}"))) == count
    status, output, error = label("--output", str(out), "--merge")
    assert status == 0, error
    assert out.read_bytes() == whole
    assert f"out{ending}: merged from {count} shards\n" in output
    assert re.search(r"11 rows: negative \d+, neutral \d+, positive \d+", output)
    assert sorted(path.name for path in Path().glob("out*")) == [out.name]


def test_a_shard_labels_its_own_rows_alone(
    label: ShardedCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, asked = Labeller.label, list[int]()

    def noted(self: Labeller, rows: Any, first: int) -> Any:
        asked.append(first)
        return own(self, rows, first)

    monkeypatch.setattr(Labeller, "label", noted)
    _, output, _ = label("--shard", "2/4")
    assert asked == [3, 11]
    assert output == "out.jsonl.shard-2-of-4: 3 of 11 rows\n"


def test_rows_of_several_adapters_are_merged(
    label: ShardedCommand, model: Path, tmp_path: Path
) -> None:
    first, second = save_clients(model, tmp_path / "clients", 2)
    rows = [json.loads(line) for line in Path("in.jsonl").read_text().splitlines()]
    for index, row in enumerate(rows):
        row["client"] = ("ann", "bob", None)[index % 3]
    Path("in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = ("--adapters", f"ann={first},bob={second}", "--adapter_column", "client")
    whole = _whole(label, *words)
    label.run_shards(2, *words)
    assert label(*words, "--merge", "2")[0] == 0
    assert Path("out.jsonl").read_bytes() == whole


def test_a_shard_that_was_killed_goes_on_where_it_was(
    label: ShardedCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _whole(label)
    own, asked = Labeller.label, list[int]()

    def die_at_fifth_row(self: Labeller, rows: Any, first: int) -> Any:
        asked.append(first)
        if first == 5 and asked.count(5) == 1:
            raise KeyboardInterrupt
        return own(self, rows, first)

    monkeypatch.setattr(Labeller, "label", die_at_fifth_row)
    assert label("--shard", "1/2")[0] == 130
    status, _, error = label("--merge")
    assert status == 1
    assert "2 of the 2 shards of out.jsonl are not whole: 1 (unfinished), 2 (missing)" in error
    _, output, _ = label("--shard", "1/2")
    assert "going on after 2 of 6 rows" in output
    assert asked == [1, 5, 5, 9]
    _, output, _ = label("--shard", "1/2")
    assert output == "out.jsonl.shard-1-of-2: 6 rows, whole already\n"
    assert len(asked) == 4
    assert label("--shard", "2/2")[0] == 0
    assert label("--merge")[0] == 0
    assert Path("out.jsonl").read_bytes() == whole


def test_missing_shards_are_named_with_the_commands_that_make_them(
    label: ShardedCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _whole(label)
    status, _, error = label("--merge")
    assert status == 1
    assert "there is no shard of out.jsonl; the first of N jobs runs: fingpt label --model" in error
    assert label("--shard", "2/3")[0] == 0
    part = Path("out.jsonl.shard-2-of-3/0000001.part")
    part.write_bytes(part.read_bytes()[:-1])
    for off in ("0", "1"):
        monkeypatch.setenv(OFF_VARIABLE, off)
        status, _, error = label("--overwrite", "--merge", "3")
        assert status == 1
        said, _, commands = error.strip().partition("; run: ")
        assert re.search(
            r"3 of the 3 shards of out.jsonl are not whole: 1 \(missing\), 2 \(damaged:"
            r" 0000001.part is not of \d+ bytes\), 3 \(missing\)$",
            said,
        )
    for command in commands.split("; "):
        program, *words = shlex.split(command)
        assert program == "fingpt"
        main(words)
    assert label("--merge", "3")[0] == 0
    assert Path("out.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (("--no_calibrate",), "calibrate False, shard 1/2 of True"),
        (("--batch_tokens", "99"), "batch_tokens 99, shard 1/2 of None"),
        (("--dtype", "float64"), "dtype 'float64', shard 1/2 of 'float32'"),
    ],
)
def test_shards_of_different_settings_are_not_merged(
    label: ShardedCommand, words: tuple[str, ...], changed: str
) -> None:
    assert label("--shard", "1/2")[0] == 0
    assert label("--shard", "2/2", *words)[0] == 0
    status, _, error = label("--merge")
    assert status == 1
    assert f"shard 2/2 of out.jsonl is of {changed}; run one of them again with" in error
    assert not Path("out.jsonl").exists()
    status, _, error = label("--shard", "2/2")
    assert status == 1
    assert "out.jsonl.shard-2-of-2 is of an earlier run with " in error
    assert label("--shard", "2/2", "--overwrite")[0] == 0
    assert label("--merge")[0] == 0


def test_shards_of_another_input_or_model_are_not_merged(
    label: ShardedCommand, model: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    label.run_shards(2)
    status, _, error = label("--merge", "--model", str(other))
    assert status == 1
    assert f"the shards of out.jsonl are of model '{model}', --merge of '{other}'" in error
    text = Path("in.jsonl").read_text()
    Path("in.jsonl").write_text(text.replace("rose", "fell"))
    status, _, error = label("--merge")
    assert status == 1
    assert "the shards of out.jsonl are of input_sha256 " in error
    Path("in.jsonl").write_text(text)  # at another time, as on another machine
    assert label("--merge")[0] == 0


def test_an_option_beside_a_merge_is_that_of_the_shards_or_refused(
    label: ShardedCommand, model: Path, tmp_path: Path
) -> None:
    first, second = (str(path) for path in save_clients(model, tmp_path / "clients", 2))
    label.run_shards(2, "--adapter", first, "--dtype", "float32")
    own = ("--adapter", first)
    digest = adapter_digest(Path(first))
    others = [
        ((*own, "--dtype", "float64"), "of dtype 'float32', --merge of 'float64'"),
        ((*own, "--chat_template", "none"), "of chat_template 'auto', --merge of 'none'"),
        (("--adapter", second), f"of adapter '{digest}', --merge of '"),
        ((), f"of adapter '{digest}', --merge of None"),
    ]
    label.assert_merge_refuses(own, others)
    assert label("--merge", *own, "--dtype", "float32")[0] == 0


def test_a_model_that_was_trained_on_meanwhile_is_noticed(
    label: ShardedCommand, model: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(model, tmp_path / "own")
    assert label("--model", str(own), "--shard", "1/2")[0] == 0
    network = tiny_network("llama")
    with torch.no_grad():
        next(network.parameters())[0] += 1
    network.save_pretrained(own)
    assert label("--model", str(own), "--shard", "2/2")[0] == 0
    status, _, error = label("--model", str(own), "--merge")
    assert status == 1
    assert "shard 2/2 of out.jsonl is of revision " in error


def test_shards_of_two_counts_ask_for_the_one(label: ShardedCommand) -> None:
    whole = _whole(label)
    assert label("--shard", "1/3")[0] == 0
    label.run_shards(2)
    status, _, error = label("--merge")
    assert status == 1
    assert "there are shards of 2 and of 3 of out.jsonl; name the number, such as --merge" in error
    assert label("--merge", "2")[0] == 0
    assert Path("out.jsonl").read_bytes() == whole


def test_two_processes_do_not_work_on_one_shard(label: ShardedCommand) -> None:
    label.run_shards(2)
    with owned(Path("out.jsonl.shard-1-of-2")):
        for words in (("--shard", "1/2"), ("--shard", "1/2", "--overwrite"), ("--merge",)):
            status, _, error = label(*words)
            assert status == 1
            assert f"out.jsonl.shard-1-of-2 is in use by process {os.getpid()} on " in error
    assert label("--merge")[0] == 0


def test_an_output_is_replaced_on_request_alone_and_whole(
    label: ShardedCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _whole(label)
    Path("out.jsonl").write_text("old")
    label.run_shards(2)
    status, _, error = label("--merge")
    assert status == 1
    assert "output out.jsonl is there already; --overwrite replaces it" in error

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fingpt_lightning.deploy.labelled_file.shutil.copyfileobj", killed)
        assert label("--merge", "--overwrite")[0] == 130
    assert Path("out.jsonl").read_text() == "old"
    assert label("--merge", "--overwrite")[0] == 0
    assert Path("out.jsonl").read_bytes() == whole


def test_different_devices_are_told(label: ShardedCommand) -> None:
    label.run_shards(2)
    record = Path("out.jsonl.shard-2-of-2/shard.json")
    record.write_text(record.read_text().replace('"cpu"', '"Other GPU"'))
    _, output, _ = label("--merge")
    assert output.startswith("the shards were computed on Other GPU and cpu: the last digits may")
