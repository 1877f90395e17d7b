"""A tokenizer may have entries that no ordinary text reaches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fingpt_lightning.cli.main import main
from fingpt_lightning.data.calibration_text import text_calibration
from fingpt_lightning.data.text_files import TextFiles
from fingpt_lightning.decomposition.source import open_source
from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.deploy.generation import Prompt, complete
from fingpt_lightning.evaluation.generation import generate
from fingpt_lightning.evaluation.scoring import score
from fingpt_lightning.models.formats.tokenizer import (
    check_vocabulary,
    num_rows_reached,
    read_tokenizer,
)
from fingpt_lightning.models.loading import LoadedModel, load_model
from tests.evaluation.tiny_language import examples_of, tiny_network, tiny_tokenizer


def _padded(begin: str | None = None) -> PreTrainedTokenizerFast:
    """With ``[PAD]`` as one more entry than the network has rows, as on Llama-2."""
    tokenizer = tiny_tokenizer(begin)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def _save(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    network = tiny_network("llama")
    num_rows = len(tiny_tokenizer())
    network.resize_token_embeddings(num_rows)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def padded(tmp_path: Path) -> LoadedModel:
    loaded = load_model(_save(tmp_path / "padded", _padded()))
    tokenizer = loaded.require_tokenizer()
    assert tokenizer.pad_token_id == loaded.network.config.vocab_size == len(tokenizer) - 1
    return loaded


def test_an_entry_that_no_text_reaches_changes_no_answer(
    padded: LoadedModel, tmp_path: Path
) -> None:
    plain = load_model(_save(tmp_path / "plain", tiny_tokenizer()))
    examples = examples_of(tmp_path, "fpb")
    found, expected = (
        score(loaded.network, loaded.require_tokenizer(), examples) for loaded in (padded, plain)
    )
    assert found == expected
    prompts = [Prompt("Shares of Foo")]
    texts, wanted = (
        list(complete(loaded.network, loaded.require_tokenizer(), prompts, 4))
        for loaded in (padded, plain)
    )
    assert texts == wanted
    assert open_source(tmp_path / "padded").tokenizer is not None
    export(padded, "hf", tmp_path / "out")
    assert load_model(tmp_path / "out").require_tokenizer().pad_token == "[PAD]"


def test_a_text_that_reaches_such_an_entry_is_an_error_that_names_it(
    padded: LoadedModel, tmp_path: Path
) -> None:
    network, tokenizer = padded.network, padded.require_tokenizer()
    examples = examples_of(tmp_path, "fpb")
    spelled = examples[2]._replace(prompts=tuple(f"{p}[PAD]" for p in examples[2].prompts))
    asked = [*examples[:2], spelled]
    message = rf"row {spelled.row} has the token '\[PAD\]', id {len(tokenizer) - 1}, and the net"
    for answer in (score, generate):
        with pytest.raises(ValueError, match=message):
            answer(network, tokenizer, asked)
    with pytest.raises(ValueError, match=r"prompt 2 has the token '\[PAD\]'"):
        list(complete(network, tokenizer, [Prompt("Foo"), Prompt("Foo [PAD]")], 2))
    (tmp_path / "text.txt").write_text("Shares of [PAD] Foo")
    with pytest.raises(ValueError, match=r"calibration has the token '\[PAD\]'"):
        text_calibration(TextFiles((tmp_path / "text.txt",)), tokenizer, network.config)
    with pytest.raises(ValueError, match=r"a text has the token '\[PAD\]'"):
        export(padded, "hf", tmp_path / "out", texts=["Foo [PAD]"])


@pytest.mark.parametrize("text", ["Shares of Foo fell", "Shares [PAD] fell"])
def test_training_takes_such_a_base_and_names_the_token_of_a_row_that_reaches_it(
    text: str, padded: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": text, "label": "negative"}, {"text": "Profit rose", "label": "positive"}] * 10
    for split in ("train", "validation"):
        file = tmp_path / "fpb" / f"{split}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "model": "fingpt_lightning.modules.QuantizedFinetuning",
        "model.base": padded.source.name, "model.quantize": "null", "model.dtype": "float32",
        "data": "fingpt_lightning.data.FinancialInstructions", "data.data_dir": str(tmp_path),
        "data.tasks": "[fpb]", "data.max_length": 200, "trainer.accelerator": "cpu",
        "trainer.max_steps": 1, "trainer.logger": "false",
        "trainer.default_root_dir": str(tmp_path / "run"),
        "trainer.enable_progress_bar": "false", "trainer.enable_model_summary": "false",
    }  # fmt: skip
    status = 0
    try:
        main(["fit", *(f"--{name}={value}" for name, value in settings.items())])
    except SystemExit as error:
        status = int(error.code or 0)
    told = capsys.readouterr().err
    if "[PAD]" in text:
        assert status == 1
        assert "a row of the data has the token '[PAD]'" in told
    else:
        assert status == 0, told
        assert torch.isfinite(
            load_model(tmp_path / "run").network(torch.arange(7)[None]).logits
        ).all()


def test_only_entries_that_must_be_spelled_are_left_out() -> None:
    size = len(tiny_tokenizer())
    assert num_rows_reached(tiny_tokenizer()) == size
    assert num_rows_reached(_padded()) == size
    ended = tiny_tokenizer()
    ended.add_special_tokens({"eos_token": "<later end>"})
    assert num_rows_reached(ended) == size + 1
    begun = tiny_tokenizer("<begin>")
    for tokenizer, rows in ((ended, size), (begun, num_rows_reached(begun) - 1), (_padded(), 9)):
        with pytest.raises(ValueError, match=rf"the tokenizer has \d+ tokens, the network {rows}"):
            check_vocabulary(tokenizer, rows)
    check_vocabulary(_padded(), size)


def test_too_many_added_tokens_are_refused_before_they_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path) is not None
    monkeypatch.setattr("fingpt_lightning.models.formats.tokenizer.MAX_ADDED_TOKENS", 0)
    with pytest.raises(ValueError, match=r"tokenizer.json: \d+ added tokens, more than 0"):
        read_tokenizer(tmp_path)
