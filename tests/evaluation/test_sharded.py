"""Shards of an evaluation: merged, they are the files of one run, but for times."""

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fingpt_lightning.cli.early_checks import OFF_VARIABLE
from fingpt_lightning.cli.main import main
from fingpt_lightning.evaluation import command, runner
from fingpt_lightning.evaluation.forward import run_trees
from fingpt_lightning.evaluation.sharded import merged_results
from fingpt_lightning.files import owned
from fingpt_lightning.models.formats.peft_adapter import adapter_digest
from tests.deploy.tiny_clients import save_clients
from tests.evaluation.tiny_language import ROWS, tiny_network, tiny_tokenizer, write_rows
from tests.support.sharded_command import ShardedCommand

TIMES = ("started_at", "seconds")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_network("gpt2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def evaluate(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> ShardedCommand:
    """``fingpt evaluate`` in batches of few rows."""
    monkeypatch.chdir(tmp_path)
    for task in ROWS:
        write_rows(tmp_path / "data", task)
    given = {
        "--model": str(model),
        "--data_dir": "data",
        "--tasks": "fpb,piqa",
        "--output": "results",
        "--batch_tokens": "40",
    }
    return ShardedCommand("evaluate", given, capsys)


def _files(folder: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """``results.json`` without times, and the bytes of all other files."""
    results = json.loads(Path(folder, "results.json").read_text())
    for key in TIMES:
        del results[key]
    for task in results["tasks"].values():
        del task["seconds"], task["prompts_per_s"]
    others = {
        path.name: path.read_bytes()
        for path in Path(folder).iterdir()
        if path.name != "results.json"
    }
    assert "predictions.jsonl" in others
    return results, others


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (2, ("--calibrate", "--num_fewshot", "1", "--split", "train")),
        (3, ("--tasks", "fpb,piqa,winogrande,lambada", "--scoring", "both")),
        (2, ("--scoring", "generate", "--tasks", "fpb", "--too_long", "drop")),
        (9, ("--calibrate", "--tasks", "fpb")),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else " ".join(value),
)
def test_merged_shards_are_the_files_of_one_run(
    evaluate: ShardedCommand, count: int, words: tuple[str, ...]
) -> None:
    for task in ROWS:
        rows = (ROWS[task] * 3)[:7]
        if task == "fpb":  # one that does not fit
            rows = [*rows, {"text": "Foo " * 500, "label": "neutral"}]
        for split in ("train", "validation"):
            text = "".join(f"{json.dumps(row)}\n" for row in rows)
            Path("data", task, f"{split}.jsonl").write_text(text)
    status, expected, error = evaluate(*words, "--output", "whole")
    assert status == 0, error
    evaluate.run_shards(count, *words)
    assert not Path("results").exists()
    status, output, error = evaluate(*words, "--merge")
    assert status == 0, error
    assert _files("results") == _files("whole")
    # The table too, but for the rates in its last column.
    lines = (re.sub(r" +[\d.]+$", "", line) for line in output.splitlines())
    own = (re.sub(r" +[\d.]+$", "", line) for line in expected.splitlines())
    assert list(lines)[:-1] == list(own)[:-1]
    assert sorted(path.name for path in Path().glob("results*")) == ["results"]


def test_times_are_those_of_all_shards_together(evaluate: ShardedCommand) -> None:
    seconds, started = [], []
    for number in (1, 2):
        assert evaluate("--shard", f"{number}/2")[0] == 0
        folder = Path(f"results.shard-{number}-of-2")
        file = folder / "fpb.answers.json"
        seconds.append(json.loads(file.read_text())["seconds"])
        started.append(json.loads((folder / "shard.json").read_text())["facts"]["head"])
    assert evaluate("--merge", "2")[0] == 0
    results = json.loads(Path("results/results.json").read_text())
    fpb = results["tasks"]["fpb"]
    assert fpb["seconds"] == pytest.approx(sum(seconds))
    assert fpb["prompts_per_s"] == pytest.approx(len(ROWS["fpb"]) / sum(seconds))
    assert results["seconds"] == pytest.approx(sum(head["seconds"] for head in started))
    assert results["started_at"] == min(head["started_at"] for head in started)


def test_each_shard_runs_its_own_batches_alone(
    evaluate: ShardedCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, sizes = run_trees, list[int]()

    def counted(network: Any, trees: Any, *rest: Any) -> Any:
        sizes.append(len(trees))
        return run(network, trees, *rest)

    monkeypatch.setattr("fingpt_lightning.evaluation.scoring.run_trees", counted)
    assert evaluate("--tasks", "fpb", "--output", "whole")[0] == 0
    whole = sizes.copy()
    assert len(whole) >= 3
    parts = []
    for number in (1, 2):
        sizes.clear()
        _, output, _ = evaluate("--tasks", "fpb", "--shard", f"{number}/2")
        assert sizes == whole[number - 1 :: 2]
        assert output == f"results.shard-{number}-of-2: {sum(sizes)} rows answered\n"
        parts += sizes
    assert sum(parts) == sum(whole) == len(ROWS["fpb"])


def test_a_shard_that_was_killed_goes_on_after_the_tasks_that_are_done(
    evaluate: ShardedCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate("--output", "whole")[0] == 0
    own, asked = runner.answers, list[str]()

    def die_at_piqa(network: Any, tokenizer: Any, run: Any, **rest: Any) -> Any:
        asked.append(run.task.name)
        if asked == ["fpb", "piqa"]:
            raise KeyboardInterrupt
        return own(network, tokenizer, run, **rest)

    monkeypatch.setattr(runner, "answers", die_at_piqa)
    assert evaluate("--shard", "1/2")[0] == 130
    for off in ("0", "1"):
        monkeypatch.setenv(OFF_VARIABLE, off)
        status, _, error = evaluate("--merge", "--model", "gone/from/here")
        assert status == 1
        said, _, commands = error.strip().partition("; run: ")
        assert said.endswith(
            "2 of the 2 shards of results are not whole: 1 (unfinished), 2 (missing)"
        )
    assert evaluate("--shard", "1/2")[0] == 0
    assert asked == ["fpb", "piqa", "piqa"]
    _, output, _ = evaluate("--shard", "1/2")
    assert output.endswith(" rows answered, whole already\n")
    assert asked == ["fpb", "piqa", "piqa"]
    assert commands.split("; ")[1].endswith(" --shard 2/2")
    status, _, error = evaluate("--merge")
    main([*shlex.split(error.strip().partition("; run: fingpt ")[2])])
    assert evaluate("--merge")[0] == 0
    assert _files("results") == _files("whole")


def test_shards_of_other_rows_models_or_settings_are_not_merged(evaluate: ShardedCommand) -> None:
    assert evaluate("--shard", "1/2")[0] == 0
    assert evaluate("--shard", "2/2", "--batch_tokens", "50")[0] == 0
    status, _, error = evaluate("--merge")
    assert status == 1
    assert "shard 2/2 of results is of batch_tokens 50, shard 1/2 of 40; run one of them" in error
    assert evaluate("--shard", "2/2", "--overwrite")[0] == 0
    for words, message in [
        (("--limit", "3"), "the shards of results are of limit None, --merge of 3"),
        (("--calibrate",), "the shards of results are of calibrate False, --merge of True"),
        (("--tasks", "fpb"), "are of tasks ['fpb', 'piqa'], --merge of ['fpb']"),
    ]:
        status, _, error = evaluate("--merge", *words)
        assert status == 1
        assert message in error
    file = Path("data/fpb/validation.jsonl")
    text = file.read_text()
    file.write_text(text.replace("fell", "rose", 1))
    status, _, error = evaluate("--merge")
    assert status == 1
    assert "the shards of results are of fpb.split_sha256 " in error
    file.write_text(text)
    assert evaluate("--merge")[0] == 0


def test_an_option_beside_a_merge_is_that_of_the_shards_or_refused(
    evaluate: ShardedCommand, model: Path, tmp_path: Path
) -> None:
    (client,) = save_clients(model, tmp_path / "clients", 1)
    (again,) = save_clients(model, tmp_path / "copy", 1)
    own = ("--tasks", "fpb", "--adapter", str(client))
    evaluate.run_shards(2, *own)
    digest = adapter_digest(client)
    others = [
        ((*own, "--dtype", "float64"), "of dtype 'float32', --merge of 'float64'"),
        ((*own, "--batch_tokens", "50"), "of batch_tokens 40, --merge of 50"),
        ((*own, "--chat_template", "none"), "of chat_template 'auto', --merge of 'none'"),
        (own[:2], f"of adapter '{digest}', --merge of None"),
    ]
    evaluate.assert_merge_refuses(own, others)
    # The adapter is the one of the same bytes, wherever it lies.
    status, _, error = evaluate("--merge", *own[:2], "--adapter", str(again), "--dtype", "float32")
    assert status == 0, error


def test_shards_that_dequantize_otherwise_are_merged(evaluate: ShardedCommand) -> None:
    words = ("--tasks", "fpb", "--quantize", "nf4")
    assert evaluate("--shard", "1/2", *words, "--dequantize", "always")[0] == 0
    assert evaluate("--shard", "2/2", *words, "--dequantize", "never")[0] == 0
    status, _, error = evaluate("--merge", *words)
    assert status == 0, error
    assert json.loads(Path("results/results.json").read_text())["settings"]["dequantize"] == (
        "always, never"
    )


def test_two_processes_do_not_work_on_one_shard(evaluate: ShardedCommand) -> None:
    with owned(Path("results.shard-1-of-2")):
        status, _, error = evaluate("--shard", "1/2")
    assert status == 1
    assert f"results.shard-1-of-2 is in use by process {os.getpid()} on " in error


def test_results_are_replaced_on_request_alone(evaluate: ShardedCommand) -> None:
    assert evaluate()[0] == 0
    assert evaluate("--shard", "1/1")[0] == 0
    status, _, error = evaluate("--merge")
    assert status == 1
    assert "output results holds results already; --overwrite replaces them" in error
    assert evaluate("--merge", "--overwrite")[0] == 0


def test_shards_need_an_output_to_lie_beside(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (("--shard", "1/2"), ("--merge",)):
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", "--model", str(model), "--tasks", "fpb", *words])
        assert ended.value.code == 2
        assert f"{words[0]} has an effect with --output alone" in capsys.readouterr().err


def test_a_row_without_an_answer_is_named(
    evaluate: ShardedCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate.run_shards(2)

    def without_the_last(shards: Any, named: Any) -> Any:
        return merged_results(shards[:1], named)

    monkeypatch.setattr(command, "merged_results", without_the_last)
    status, _, error = evaluate("--merge")
    assert status == 1
    assert re.search(r"row \d of fpb has no answer in any of the shards", error)
    assert not Path("results").exists()
