"""What each command that reads a model makes of numbers that are not finite."""

import json
import math
from pathlib import Path

import pytest
import torch

from fingpt_lightning.cli.main import main
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer, write_rows

_WORDS = {
    "evaluate": "evaluate --tasks fpb --data_dir {data} --output {out}",
    "evaluate, calibrated": "evaluate --tasks fpb --data_dir {data} --output {out} --calibrate",
    "evaluate, choices": "evaluate --tasks piqa --data_dir {data} --output {out}",
    "evaluate, generated": "evaluate --tasks fpb --data_dir {data} --output {out}"
    " --scoring generate",
    "label": "label --task fpb --input {data}/fpb/validation.jsonl --output {out}.csv",
    "generate": "generate --prompts {prompts} --output {out}.jsonl",
    "generate, drawn": "generate --prompts {prompts} --output {out}.jsonl --temperature 1",
}
_ROWS = {"evaluate": "task fpb, row ", "label": "task fpb, row ", "generate": "prompt "}


@pytest.fixture
def words(tmp_path: Path, request: pytest.FixtureRequest) -> list[str]:
    for task in ("fpb", "piqa"):
        write_rows(tmp_path / "data", task)
    rows = [{"text": "Profit rose"}, {"text": "Profit fell"}]
    (tmp_path / "data/fpb/validation.jsonl").write_text(
        "".join(json.dumps(row | {"label": "neutral"}) + "\n" for row in rows)
    )
    (tmp_path / "prompts.txt").write_text("Shares of Foo\nGold\n")
    places = {
        "data": tmp_path / "data",
        "out": tmp_path / "out",
        "prompts": tmp_path / "prompts.txt",
    }
    given = _WORDS[request.node.callspec.params["command"]].format(**places)
    return [*given.split(), "--model", str(tmp_path / "model"), "--device", "cpu"]


def _save(folder: Path, value: float) -> None:
    network = tiny_network("llama")
    weight = network.get_parameter("model.layers.1.mlp.up_proj.weight")
    with torch.no_grad():
        if math.isfinite(value):
            weight.fill_(value)
        else:
            weight[3, 4] = value
    network.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def _error(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    status = 0
    try:
        main(words)
    except SystemExit as ended:
        status = int(ended.code or 0)
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "dtype", "cause"),
    [
        (
            math.nan,
            "float32",
            "the tensor model.layers.1.mlp.up_proj.weight holds a NaN or an infinity; its file is"
            " damaged, or the training that wrote it diverged",
        ),
        (
            6e4,
            "float16",
            "all weights are finite, but activations overflow float16; take bfloat16 or float32",
        ),
        (
            1e6,
            "float16",
            "the tensor model.layers.1.mlp.up_proj.weight holds a NaN or an infinity; it was beyond"
            " float16 (take bfloat16 or float32), or its file is damaged",
        ),
    ],
)
@pytest.mark.parametrize("command", _WORDS)
def test_a_command_ends_with_one_line_and_leaves_no_result(
    command: str,
    value: float,
    dtype: str,
    cause: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _save(tmp_path / "model", value)
    status, error = _error([*words, "--dtype", dtype], capsys)
    assert status == 1
    (line,) = error.splitlines()
    verb = command.partition(",")[0]
    row = "task piqa, row " if "choices" in command else _ROWS[verb]
    assert line.startswith(f"fingpt: error: {row}")
    numbers = "logits" if "generate" in command else "scores"
    assert line.endswith(f": the {numbers} are not finite: {cause}")
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert not left & {"out.csv", "out.jsonl", "results.json", "predictions.jsonl"}


@pytest.mark.parametrize("command", _WORDS)
def test_float32_and_bfloat16_are_indeed_the_way_out(
    command: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _save(tmp_path / "model", 6e4)
    assert _error([*words, "--dtype", "bfloat16"], capsys)[0] == 0
