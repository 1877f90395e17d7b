import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fingpt_lightning
from fingpt_lightning.cli.main import main
from fingpt_lightning.deploy import export_command
from fingpt_lightning.models.loading import load_model
from tests.deploy.tiny_clients import save_clients, save_low_rank_model
from tests.evaluation.tiny_language import write_rows

Export = Callable[..., tuple[int, str, str]]


@pytest.fixture
def export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Export:
    """Runs ``fingpt export`` on a tiny low-rank GPT-2; gives status, output and error."""
    save_low_rank_model(tmp_path / "model")

    def call(*words: str) -> tuple[int, str, str]:
        given = {"--model": tmp_path / "model", "--format": "hf", "--output": tmp_path / "out"}
        defaults = [str(x) for name, v in given.items() if name not in words for x in (name, v)]
        status = 0
        capsys.readouterr()  # of the fixtures
        try:
            main(["export", *defaults, *words])
        except SystemExit as error:
            status = int(error.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_the_differences_are_printed_and_stand_in_the_card(export: Export, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("Profit of Foo rose\n")
    words = ("--prompts", str(tmp_path / "own.txt"), "--dtype", "bfloat16")
    status, output, error = export(*words)
    assert status == 0, error
    found = re.findall(r"^(random|real) +(\d+) +(\S+) +(\S+) +([\d.]+) %$", output, re.MULTILINE)
    assert [row[0] for row in found] == ["random", "real"]
    assert int(found[1][1]) < 20  # of the one prompt that was given
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"| {row[2]} | {row[3]} | {row[4]} % |" in card for row in found)
    assert re.search(r"out: hf, [\d.]+ K parameters, [\d.]+ [KM]iB, .* within 0\.1$", output, re.M)
    assert load_model(tmp_path / "out").description.endswith("(gpt2)")


def test_an_adapter_given_apart_is_merged(export: Export, tmp_path: Path) -> None:
    (client,) = save_clients(tmp_path / "model", tmp_path / "clients", 1)
    status, _, error = export("--adapter", str(client), "--format", "merged")
    assert status == 0, error
    assert str(client) in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--format", "peft"), "format peft: it needs an adapter"),
        (("--model", "{}/modl"), "did you mean .*model"),
        (("--output", "{}"), "is there, and no export; name another folder"),
        (("--tolerance", "1e-12", "--dtype", "bfloat16"), "more than the tolerance 1e-12"),
        (("--prompts", "{}/none.txt"), "no file .*none.txt"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[0],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    export: Export, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    status, _, error = export(*[word.format(tmp_path) for word in words])
    assert status == 1, error
    (line,) = error.strip().splitlines()[-1:]
    assert re.search(message, line)
    assert not list(tmp_path.glob("out*"))


def test_a_gpu_is_refused(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_command, "find_device", torch.device)
    status, _, error = export("--device", "cuda")
    assert status == 1
    assert "device cuda: exports are made on the CPU" in error


def test_a_wrong_format_is_status_2(export: Export) -> None:
    status, _, error = export("--format", "onnx")
    assert status == 2
    assert "invalid choice: 'onnx'" in error


def test_an_adapter_is_not_stored_in_another_dtype(export: Export, tmp_path: Path) -> None:
    (client,) = save_clients(tmp_path / "model", tmp_path / "clients", 1)
    words = ("--adapter", str(client), "--format", "peft", "--dtype", "float16")
    status, _, error = export(*words)
    assert status == 1
    assert "dtype float16 has no effect" in error


@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize("kind", ["text", "task"])
def test_calibration_brings_a_quantised_export_nearer(
    export: Export, tmp_path: Path, form: str, kind: str
) -> None:
    (tmp_path / "text.txt").write_text("Profit of Foo rose. Sales of Bar fell to EUR 3 mn. " * 60)
    write_rows(tmp_path, "fpb", "train")
    asked = {
        "text": ("--calibration", str(tmp_path / "text.txt"), "--calibration_tokens", "256"),
        "task": ("--calibration_task", "fpb", "--data_dir", str(tmp_path)),
    }[kind]
    (tmp_path / "own.txt").write_text("Profit of Bar rose. Sales of Foo fell to EUR 3 mn.\n")
    errors = []
    for words in ((), asked):
        status, output, error = export(
            "--format", form, "--prompts", str(tmp_path / "own.txt"), "--overwrite",
            "--tolerance", "2", *words,
        )  # fmt: skip
        assert status == 0, error
        (found,) = re.findall(r"^real +\d+ +\S+ +(\S+) ", output, re.MULTILINE)
        errors.append(float(found))
    assert errors[1] < 0.9 * errors[0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"rounded on \d+ tokens of (train of fpb|.*text.txt), ", card)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--format", "hf", "--calibration", "{}/text.txt"), 2, "with --format int8 and nf4 alone"),
        (("--format", "nf4", "--calibration", "{}/none.txt"), 1, "none.txt does not exist"),
        (("--format", "nf4", "--calibration_task", "fpb"), 1, "give data_dir to read"),
        (("--format", "nf4", "--data_dir", "{}"), 2, "with --calibration_task alone"),
        (("--format", "nf4", "--calibration_tokens", "7"), 2, "--calibration_tokens has an effect"),
        (
            ("--format", "nf4", "--calibration_task", "fbp", "--data_dir", "{}"),
            1,
            "did you mean fpb",
        ),
        (
            ("--format", "nf4", "--calibration_task", "fpb", "--data_dir", "{}/gone"),
            1,
            "gone",
        ),
    ],
)
def test_calibration_that_cannot_be_is_one_line(
    export: Export, tmp_path: Path, words: tuple[str, ...], status: int, message: str
) -> None:
    found, _, error = export(*[word.format(tmp_path) for word in words])
    assert found == status, error
    assert message in error.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_python_and_the_command_line_write_the_same(
    export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export("--format", "int8", "--embeddings", "kept")[0] == 0
    made = fingpt_lightning.export(
        tmp_path / "model", "int8", str(tmp_path / "again"), embeddings="kept"
    )
    assert capsys.readouterr().out == "", "the table is the command's"
    assert made.format == "int8"
    assert max(found.relative_error for found in made.differences) < made.tolerance
    weights = list((tmp_path / "out").glob("*.safetensors"))
    assert weights
    for file in weights:
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": "hff"}, "format 'hff' is none of .*; did you mean hf"),
        ({"dtype": "float8"}, "dtype 'float8' is none of"),
        ({"format": "nf4", "embeddings": "keep"}, "did you mean kept"),
        ({"tolerance": 0.0}, "tolerance 0.0 is not above 0"),
        ({"calibration": "a.txt"}, "^calibration has an effect with format int8 and nf4 alone$"),
        ({"calibration_tokens": 7}, "^calibration_tokens has an effect with calibration or"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_argument_is_refused_by_its_name(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    rest: dict[str, Any] = {"format": "hf", "output": tmp_path / "out"}
    with pytest.raises(ValueError, match=message):
        fingpt_lightning.export(tmp_path / "no_model", **(rest | given))
