import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import fingpt_lightning
from fingpt_lightning import tasks
from fingpt_lightning.cli.main import main
from fingpt_lightning.models.formats.tokenizer import use_chat_template
from fingpt_lightning.terminal import progress
from tests.evaluation.test_adapters import save_adapter
from tests.evaluation.tiny_language import ROWS, tiny_network, tiny_tokenizer, write_rows
from tests.tasks.chat_templates import ENDED

Evaluate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Runs ``fingpt evaluate`` on a tiny model and data; gives status, output and error."""
    tiny_network("gpt2").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for task in ROWS:
        write_rows(tmp_path / "data", task)

    def call(*words: str, names: str = "fpb") -> tuple[int, str, str]:
        given = {
            "--model": tmp_path / "model",
            "--data_dir": tmp_path / "data",
            "--tasks": names,
            "--output": tmp_path / "results",
            "--device": "cpu",
        }
        defaults = [str(x) for name, v in given.items() if name not in words for x in (name, v)]
        status = 0
        capsys.readouterr()  # of the fixtures
        try:
            main(["evaluate", *defaults, *words])
        except SystemExit as error:
            status = int(error.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.mark.parametrize("scoring", ["choices", "generate"])
def test_a_terminal_sees_how_many_rows_were_answered_and_a_log_nothing(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch, scoring: str
) -> None:
    monkeypatch.setattr(progress, "_QUIET_S", 0.0)
    words = ("--scoring", scoring, "--batch_tokens", "60")
    status, _, error = evaluate(*words)
    assert (status, error) == (0, "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    status, _, error = evaluate(*words, "--overwrite")
    assert status == 0, error
    assert "evaluating fpb" in error
    assert "5/5" in error
    assert "a second" not in error


def test_a_table_and_all_files_are_made(evaluate: Evaluate, tmp_path: Path) -> None:
    status, output, error = evaluate("--calibrate", names="fpb,piqa,winogrande,lambada,nwgi7")
    assert status == 0, error
    assert re.search(r"^fpb +0\.\d{3} \(0\.\d\d-[01]\.\d\d\).* 5 +\d+\.\d$", output, re.MULTILINE)
    for title in ("accuracy", "macro F1", "weighted F1", "MCC", "missing", "n", "prompts/s"):
        assert title in output
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert list(results["tasks"]) == ["fpb", "piqa", "winogrande", "lambada", "nwgi7"]
    fpb = results["tasks"]["fpb"]
    assert fpb["labels"] == ["negative", "neutral", "positive"]
    assert sum(map(sum, fpb["confusion"])) == fpb["n"] == 5
    for digest in ("split_sha256", "rows_sha256", "template_sha256"):
        assert re.fullmatch("[0-9a-f]{64}", fpb[digest]), digest
    assert fpb["split_sha256"] == fpb["rows_sha256"]
    assert (fpb["split"], fpb["split_rule"]) == ("validation", "all rows of validation.jsonl")
    assert fpb["kind"] == "labels"
    assert len(results["tokenizer_sha256"]) == len(results["revision"]) == 64
    assert results["adapter_sha256"] is None
    assert {"accuracy", "accuracy_norm"} <= results["tasks"]["piqa"].keys()
    assert "accuracy_norm" not in results["tasks"]["winogrande"]
    assert results["tasks"]["lambada"]["perplexity"] > 1
    assert results["settings"]["calibrate"] is True
    assert results["model"].endswith("model (gpt2)")
    assert "torch" in results["versions"]
    text = (tmp_path / "results" / "predictions.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 5 + 3 + 2 + 2 + 3
    assert rows[0]["text"] == "Shares of Foo fell"
    assert rows[0]["gold"] == "negative"
    assert {row["prediction"] for row in rows if row["task"] == "winogrande"} <= {"0", "1"}
    right = sum(row["is_right"] for row in rows if row["task"] == "fpb")
    assert right / 5 == pytest.approx(fpb["accuracy"])
    with Image.open(tmp_path / "results" / "confusion_nwgi7.png") as picture:
        assert min(picture.size) > 200
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {
        "results.json", "predictions.jsonl", "confusion_fpb.png", "confusion_nwgi7.png",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_settings_reach_the_evaluation(evaluate: Evaluate, tmp_path: Path) -> None:
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    words = (
        *("--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter")),
        *("--tokenizer", str(tmp_path / "model"), "--dtype", "bfloat16", "--quantize", "nf4"),
        *("--batch_tokens", "99", "--limit", "2", "--scoring", "generate", "--too_long", "drop"),
    )
    status, _, error = evaluate(*words)
    assert status == 0, error
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["adapter"] == str(tmp_path / "adapter")
    weights = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert results["adapter_sha256"] == hashlib.sha256(weights).hexdigest()
    fpb = results["tasks"]["fpb"]
    assert fpb["rows_sha256"] != fpb["split_sha256"], "the first two rows alone"
    assert results["model"].endswith("base (llama, nf4)")
    assert results["settings"] == {
        "dtype": "bfloat16", "quantize": "nf4", "dequantize": "auto", "scoring": "generate",
        "calibrate": False,
        "limit": 2, "too_long": "drop", "batch_tokens": 99, "device": "cpu",
        "chat_template_sha256": None, "num_fewshot": 0, "fewshot_seed": None,
    }  # fmt: skip
    assert results["tasks"]["fpb"]["n"] == 2
    lines = (tmp_path / "results" / "predictions.jsonl").read_text().splitlines()
    assert all("answer" in json.loads(line) for line in lines)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_answers_with_the_chat_template_that_it_was_trained_with(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    tokenizer = tiny_tokenizer()
    use_chat_template(tokenizer, ENDED)
    tokenizer.save_pretrained(tmp_path / "adapter")
    (tmp_path / "chat.jinja").write_text(ENDED)
    results: dict[str, Any] = {}
    for name, model, words in (
        ("auto", "adapter", ()),
        ("file", "base", ("--chat_template", str(tmp_path / "chat.jinja"))),
        ("none", "adapter", ("--chat_template", "none")),
        ("base", "base", ()),
    ):
        if model == "base":
            words = ("--adapter", str(tmp_path / "adapter"), *words)
        words = ("--model", str(tmp_path / model), "--output", str(tmp_path / name), *words)
        status, output, error = evaluate(*words)
        assert status == 0, error
        line = {
            "auto": f"chat template: the one that {tmp_path}/adapter was trained with",
            "file": f"chat template: {tmp_path}/chat.jinja",
            "none": "chat template: none, as set",
            "base": f"chat template: the one that {tmp_path}/base was trained with",
        }[name]
        assert line in output
        found = json.loads((tmp_path / name / "results.json").read_text())
        results[name] = found["settings"]["chat_template_sha256"]
        text = (tmp_path / name / "predictions.jsonl").read_text()
        results[f"{name} answers"] = text
    sha256 = hashlib.sha256(ENDED.encode()).hexdigest()
    assert results["auto"] == results["file"] == results["base"] == sha256
    assert results["none"] is None
    assert results["auto answers"] == results["file answers"] == results["base answers"]
    assert results["auto answers"] != results["none answers"]


def test_examples_before_the_questions_are_drawn_by_a_seed(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    write_rows(tmp_path / "data", "fpb", "train")
    found = {}
    for name, words in (
        ("0", ()),
        ("2", ("--num_fewshot", "2")),
        ("2 seed 1", ("--num_fewshot", "2", "--fewshot_seed", "1")),
        ("2 seed 4", ("--num_fewshot", "2", "--fewshot_seed", "4", "--calibrate")),
    ):
        status, _, error = evaluate(*words, "--overwrite")
        assert status == 0, error
        results = json.loads((tmp_path / "results" / "results.json").read_text())
        assert results["tasks"]["fpb"]["num_fewshot"] == (0 if name == "0" else 2)
        found[name] = (tmp_path / "results" / "predictions.jsonl").read_text()
    assert results["settings"]["fewshot_seed"] == 4
    assert found["2"] == found["2 seed 1"]
    assert len(set(found.values())) == 3


def test_examples_that_leave_no_room_are_told(evaluate: Evaluate, tmp_path: Path) -> None:
    write_rows(tmp_path / "data", "fpb", "train")
    with (tmp_path / "data" / "fpb" / "validation.jsonl").open("a") as file:
        file.write(json.dumps({"text": "rose " * 150, "label": "neutral"}))
    status, output, error = evaluate("--num_fewshot", "2", "--too_long", "drop")
    assert status == 0, error
    assert re.search(r"fpb: \d of 6 rows do not fit 330 tokens and were left out", output)
    assert "fpb: they have 2 examples before the question (num_fewshot); fewer leave" in output
    status, _, error = evaluate("--num_fewshot", "4", "--overwrite")
    assert status == 1
    assert "no row with a right answer fits the context of the network after 4 examples" in error


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--num_fewshot", "5"), 1, "fpb: num_fewshot 5 is above the 4 other rows of train with"),
        (("--num_fewshot", "-1"), 2, "--num_fewshot: -1 is below 0"),
        (("--fewshot_seed", "3"), 2, "--fewshot_seed has an effect with --num_fewshot alone"),
        (("--chat_template", "nine"), 1, "chat_template 'nine' is neither auto, none nor a file"),
        (("--separator", ";"), 1, "separator ';' has an effect on .csv and .tsv alone"),
    ],
)
def test_wrong_prompt_settings_are_one_line(
    evaluate: Evaluate, tmp_path: Path, words: tuple[str, ...], status: int, message: str
) -> None:
    write_rows(tmp_path / "data", "fpb", "train")
    found, _, error = evaluate(*words)
    assert found == status
    (line,) = error.strip().splitlines()
    assert message in line
    assert not (tmp_path / "results").exists()


def test_results_are_replaced_only_when_asked(evaluate: Evaluate, tmp_path: Path) -> None:
    assert evaluate()[0] == 0
    status, _, error = evaluate()
    assert status == 1
    assert "results holds results already; --overwrite replaces them" in error
    assert evaluate("--overwrite", "--limit", "1")[0] == 0
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["tasks"]["fpb"]["n"] == 1


def test_what_a_reader_must_know_is_said(evaluate: Evaluate, tmp_path: Path) -> None:
    file = tmp_path / "data" / "fpb" / "validation.jsonl"
    lines = [{"text": "rose " * 400, "label": "positive"}, {"text": " ", "label": "neutral"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    status, output, error = evaluate()
    assert status == 0, error
    assert "fpb: 1 of 1 rows were cut to 330 tokens" in output
    assert "fpb: 1 rows with an empty text left out" in output
    status, _, error = evaluate("--strict", "--overwrite")
    assert status == 1
    assert "validation.jsonl:2: the text is empty" in error


def test_rows_that_are_too_long_are_counted_or_refused(evaluate: Evaluate, tmp_path: Path) -> None:
    file = tmp_path / "data" / "fpb" / "validation.jsonl"
    lines = [{"text": "rose " * 400, "label": "positive"}]
    lines.append({"text": "Profit rose", "label": "positive"})
    file.write_text("\n".join(map(json.dumps, lines)))
    status, output, error = evaluate("--overwrite", "--too_long", "drop", "--calibrate")
    assert status == 0, error
    assert "fpb: 1 of 2 rows do not fit 330 tokens and were left out" in output
    results = json.loads((tmp_path / "results" / "results.json").read_text())["tasks"]["fpb"]
    assert (results["n"], results["num_cut"], results["num_dropped"]) == (1, 0, 1)
    predictions = (tmp_path / "results" / "predictions.jsonl").read_text().splitlines()
    dropped = json.loads(predictions[0])
    assert (dropped["prediction"], dropped["is_dropped"]) == (None, True)
    status, _, error = evaluate("--overwrite", "--too_long", "error")
    assert status == 1
    assert re.search(r"fpb: row 1: 1,271 tokens, which are more than 330; too_long cut", error)
    file.write_text(json.dumps(lines[0]))
    status, _, error = evaluate("--overwrite", "--too_long", "drop")
    assert status == 1
    assert "fpb: no row with a right answer fits the context" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tasks", "fpd"), "task 'fpd' .* did you mean fpb"),
        (("--tasks", "fpb", "--split", "tst"), "tst"),
        (("--tasks", "alpaca"), "task alpaca is there to train on"),
        (("--tasks", "piqa", "--calibrate"), "none of piqa has labels"),
        (("--tasks", "piqa", "--scoring", "generate"), "task piqa of kind choices has not"),
        (("--scoring", "generate", "--calibrate"), "no effect on generated answers"),
        (("--model", "no/such/model"), "model no/such/model: no such file or folder"),
        (("--device", "cuda:99"), "device 'cuda:99': there are"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[-1],
)
def test_bad_input_is_one_line_and_status_1(
    evaluate: Evaluate, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    status, _, error = evaluate(*words)
    assert status == 1, error
    (line,) = error.strip().splitlines()
    assert re.search(message, line)
    assert not (tmp_path / "results").exists()


def test_data_and_folders_that_are_wrong_are_one_line(evaluate: Evaluate, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()
    assert "has no tokenizer beside it" in evaluate()[2]
    (tmp_path / "results").write_text("")
    assert "results is a file, not a folder" in evaluate()[2]
    (tmp_path / "results").unlink()
    row = '{"text": "Foo", "label": "positiv"}'
    (tmp_path / "data" / "fpb" / "validation.jsonl").write_text(row)
    assert "validation.jsonl:1: label 'positiv'" in evaluate()[2]
    (tmp_path / "data" / "fpb" / "validation.jsonl").write_text('{"text": "Foo", "label": null}')
    assert "validation.jsonl: no row has a right answer" in evaluate()[2]
    own = tmp_path / "own" / "piqa.yaml"
    own.parent.mkdir()
    own.write_text((Path(tasks.__file__).parent / "piqa.yaml").read_text())
    assert "two tasks are named piqa" in evaluate(names=f"piqa,{own}")[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--taks", "fpb"), "--taks"),
        (("--dtype", "float8"), "float8"),
        (("--limit", "0"), "0 is below 1"),
        (("--batch_tokens", "many"), "'many' is not a whole number"),
        (("--tasks", ","), "no name is given"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[0],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    evaluate: Evaluate, words: tuple[str, ...], message: str
) -> None:
    status, _, error = evaluate(*words)
    assert status == 2
    (line,) = error.strip().splitlines()
    assert message in line


def test_python_and_the_command_line_find_the_same(
    evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--calibrate", "--limit", "4")
    assert evaluate(*words, names="fpb,piqa")[0] == 0
    told = json.loads((tmp_path / "results" / "results.json").read_text())
    capsys.readouterr()
    given: dict[str, Any] = {
        "data_dir": tmp_path / "data", "device": "cpu", "calibrate": True, "limit": 4,
    }  # fmt: skip
    before = set(tmp_path.rglob("*"))
    found = fingpt_lightning.evaluate(tmp_path / "model", ["fpb", "piqa"], **given)
    assert capsys.readouterr().out == "", "the table is the command's"
    assert set(tmp_path.rglob("*")) == before, "no output, no file"
    assert list(found.results) == ["fpb", "piqa"]
    for name, result in found.results.items():
        for key, value in result.metrics.items():
            assert json.loads(json.dumps(value)) == told["tasks"][name][key], key
    assert found.head["settings"] == told["settings"]
    output = tmp_path / "again"
    fingpt_lightning.evaluate(str(tmp_path / "model"), "fpb, piqa", **given, output=output)
    again = json.loads((output / "results.json").read_text())
    assert again["tasks"].keys() == told["tasks"].keys()
    assert again["tasks"]["fpb"]["accuracy"] == told["tasks"]["fpb"]["accuracy"]


def test_a_table_without_files_is_printed_where_no_output_is_named(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("")
    main_words = ["evaluate", "--model", str(tmp_path / "model"), "--tasks", "fpb"]
    main([*main_words, "--data_dir", str(tmp_path / "data"), "--device", "cpu", "--limit", "2"])
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"overwrite": True}, "^overwrite has an effect with output alone$"),
        ({"scoring": "choice"}, "scoring 'choice' is none of .*; did you mean choices"),
        ({"batch_tokens": 0}, "batch_tokens 0 is below 1"),
        ({"limit": 0}, "limit 0 is below 1"),
        ({"tasks": " , "}, "tasks: no name is given"),
        ({"tasks": []}, "tasks: no name is given"),
        ({"dtype": "float8"}, "dtype"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_argument_is_refused_by_its_name(
    evaluate: Evaluate, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    rest: dict[str, Any] = {"tasks": "fpb", "data_dir": tmp_path / "data"}
    with pytest.raises(ValueError, match=message):
        fingpt_lightning.evaluate(tmp_path / "model", **(rest | given))


def test_help_is_answered_without_torch() -> None:
    script = (
        "import sys; from fingpt_lightning.cli.main import main\n"
        "try: main(['evaluate', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--calibrate" in done.stdout
