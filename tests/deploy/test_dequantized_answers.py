"""Every command answers with dequantized weights as with quantized ones."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fingpt_lightning.cli.main import main
from fingpt_lightning.deploy import label_command
from fingpt_lightning.deploy.label_options import parse_options as parse_labeling
from fingpt_lightning.deploy.loading import load_with_adapters
from fingpt_lightning.models.quantization.frozen_matrix import quantization_of
from fingpt_lightning.serving.options import parse_options as parse_serving
from fingpt_lightning.tasks import find_task
from tests.deploy.tiny_clients import save_clients
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer, write_rows
from tests.models.tiny_models import ids

ADAPTERS = {"no adapter": None, "lora": 0, "dora": 2}
"""Place of each kind among those of the tiny clients."""
ONCE = re.compile(r"the (nf4|int8) weights are dequantized once: [\d.]+ KiB in float32, of ")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_network("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "data", "fpb")
    return folder / "model"


@pytest.fixture
def answer(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[list[object], str]]:
    """Runs a command; gives what it wrote, and what it printed."""
    data = base.parent / "data"

    def call(command: str, *words: str) -> tuple[list[object], str]:
        output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        own = {
            "label": ["--task", "fpb", "--input", f"{data}/fpb/validation.jsonl"],
            "evaluate": ["--tasks", "fpb", "--data_dir", str(data)],
            "generate": ["--prompt", "Shares of Foo", "--max_new_tokens", "5"],
        }
        if command != "evaluate":
            output = output.with_suffix(".jsonl")
        capsys.readouterr()
        main([command, "--model", str(base), "--device", "cpu", "--output", str(output),
              *own[command], *words])  # fmt: skip
        captured = capsys.readouterr()
        file = output / "predictions.jsonl" if command == "evaluate" else output
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return rows, captured.out + captured.err

    return call


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_every_command_gives_equal_answers_and_says_what_was_done(
    answer: Callable[..., tuple[list[object], str]],
    base: Path,
    quantize: str,
    adapter: str,
    tmp_path: Path,
) -> None:
    words, place = ["--quantize", quantize], ADAPTERS[adapter]
    if place is not None:
        (client,) = save_clients(base, tmp_path, 1, quantize=quantize, first=place)
        words += ["--adapter", str(client)]
    for command in ("label", "evaluate", "generate"):
        kept, silent = answer(command, *words, "--dequantize", "never")
        made, said = answer(command, *words)
        assert kept
        assert made == kept, command
        assert ONCE.search(silent) is None
        found = ONCE.search(said)
        assert (found and found[1]) == (None if quantize == "none" else quantize), command
    # `fingpt serve` loads an adapter as that of a client, on a base without one.
    if place is not None:
        words = ["--quantize", quantize, "--adapters", f"ann={client}"]
    logits = []
    for how in ("never", "auto"):
        options = parse_serving(["--model", str(base), "--device", "cpu", *words,
                                 "--dequantize", how])  # fmt: skip
        ready = load_with_adapters(options)
        is_kept = how == "never" and quantize != "none"
        assert quantization_of(ready.network) == (quantize if is_kept else None)
        assert bool(ONCE.search(ready.remark or "")) == (how == "auto" and quantize != "none")
        if ready.bank is not None:
            ready.bank.activate(["ann"])
        with torch.no_grad():
            logits.append(ready.network(input_ids=ids()).logits)
    assert torch.equal(*logits)


def test_a_labeled_file_is_continued_with_the_other_choice(base: Path) -> None:
    # Answers are equal, so a machine with less memory may finish what another began.
    task, settings = find_task("fpb"), []
    rows = base.parent / "data" / "fpb" / "validation.jsonl"
    for how in ("never", "always"):
        words = ["--model", str(base), "--task", "fpb", "--quantize", "nf4", "--dequantize", how]
        options = parse_labeling([*words, "--input", str(rows), "--output", "out.jsonl"])
        ready = load_with_adapters(options)
        settings.append(label_command._given(options, task) | label_command._found(options, ready))
    assert settings[0] == settings[1]
