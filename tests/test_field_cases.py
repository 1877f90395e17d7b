"""What people met elsewhere: the folders of ``../shared/field_cases`` and their ``expected.txt``.

Tests of the whole kinds, with inputs of their own, lie beside the code; these walk the folders.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fingpt_lightning.cli.main import main
from fingpt_lightning.data import FinancialInstructions
from fingpt_lightning.data.text_files import find_text_files
from fingpt_lightning.models.formats.peft_adapter import read_adapter
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.sweeping.sweep_file import WrongSweep, read_sweep
from fingpt_lightning.sweeping.sweep_runner import num_trials
from fingpt_lightning.tasks import find_task, read_rows
from fingpt_lightning.tasks.encoding import encode_conversations
from tests.tasks.chat_templates import CHATML, chat_tokenizer

CASES = Path(__file__).parents[2] / "shared" / "field_cases"
ROOT = Path(__file__).parents[1]


class Place(NamedTuple):
    """A case's folder, a folder to write to, and what the terminal shows."""

    case: Path
    out: Path
    terminal: pytest.CaptureFixture[str]

    def run(self, line: str) -> tuple[int, str]:
        """Exit status and standard error of a command, whose line may name ``case`` and ``out``."""
        self.terminal.readouterr()
        status = 0
        try:
            main(line.format(case=self.case, out=self.out).split())
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, self.terminal.readouterr().err


def _largest_logits(place: Place) -> None:
    text = (place.case / "expected.txt").read_text()
    (ids,) = re.findall(r"Token ids \[(.*?)\]", text)
    expected = {int(token): float(x) for token, x in re.findall(r"id (\d+): ([-\d.]+)", text)}
    assert len(expected) == 5
    for network in (
        load_model(place.case / "adapter").network,
        load_model(place.case / "base", adapter=place.case / "adapter").network,
    ):
        logits = network(torch.tensor([[int(token) for token in ids.split(",")]])).logits[0, -1]
        found = logits.topk(5)
        assert found.indices.tolist() == list(expected)
        assert found.values.tolist() == pytest.approx(list(expected.values()), abs=1e-4)


def _pissa(place: Place) -> None:
    (place.out / "prompts.txt").write_text("The mill\n")
    for line in (
        "generate --prompts {out}/prompts.txt --output {out}/made.jsonl",
        "export --format merged --output {out}/made",
    ):
        status, error = place.run(f"{line} --model {{case}}/adapter")
        assert status == 1
        assert "adapter_config.json: init_lora_weights 'pissa' is not supported" in error
        assert len(error.splitlines()) == 1


def _pickled(place: Place) -> None:
    with pytest.raises(ValueError, match=r"PeftModel\.from_pretrained\(AutoModelForCausalLM\."):
        load_model(place.case / "adapter")
    copy = place.out / "copy"
    shutil.copytree(place.case, copy)
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    base = AutoModelForCausalLM.from_pretrained(copy / "base")
    PeftModel.from_pretrained(base, str(copy / "adapter")).save_pretrained(str(place.out / "new"))
    adapter = load_model(copy / "base", adapter=place.out / "new")
    assert len(read_adapter(place.out / "new").layers) > 0
    assert adapter.source.adapter == place.out / "new"


def _long_input(place: Place) -> None:
    data = FinancialInstructions(
        "alpaca", str(place.case / "data"), batch_size=2, max_length=200, vocab_size=400
    )
    data.prepare_data()
    data.setup()
    assert re.search(
        r"alpaca: 1 of 31 rows were cut to 200 tokens", place.terminal.readouterr().out
    )
    texts = [
        str(data.tokenizer.decode(list(row.tokens)))
        for p in ("train", "val")
        for row in data._of(p)
    ]
    (cut,) = [text for text in texts if "Line 1 of the report" in text]
    last = json.loads((place.case / "data/alpaca/train.jsonl").read_text().splitlines()[-1])
    assert last["instruction"] in cut
    assert last["output"] in cut
    assert "Line 39 of the report" not in cut


def _json_array(place: Place) -> None:
    assert len(read_rows(find_task("alpaca"), place.case / "data", "train").examples) == 30


def _chat_messages(place: Place) -> None:
    tokenizer = chat_tokenizer(CHATML)
    examples = read_rows(find_task("alpaca"), place.case / "data", "train").examples
    rows = encode_conversations(tokenizer, examples, 400)
    assert len(rows) == 3
    for row in rows:
        assert row is not None
        whole = str(tokenizer.decode(list(row.tokens)))
        assert "Be brief." in whole
        answers = zip(row.tokens, row.are_answers, strict=True)
        learned = str(tokenizer.decode([token for token, is_answer in answers if is_answer]))
        assert learned.startswith("Yes.")
        assert "mill" not in learned


def _context_target(place: Place) -> None:
    for name in ("tfns", "nwgi"):
        examples = read_rows(find_task(name), place.case / "data", "train").examples
        assert len(examples) == 2
        assert all(example.gold is not None for example in examples)
        assert "Instruction" not in examples[0].text


def _output_list(place: Place) -> None:
    with pytest.raises(ValueError, match=r"alpaca/train\.jsonl:1: .*output"):
        read_rows(find_task("alpaca"), place.case / "data", "train")


def _float_labels(place: Place) -> None:
    task = find_task("tfns")
    rows = read_rows(task, place.case / "data", "train", strict=False).examples
    golds = [None if row.gold is None else task.labels[row.gold] for row in rows]
    assert golds == ["positive", "negative", "neutral", None]


def _nonfinite(place: Place) -> None:
    (place.out / "prompts.txt").write_text("The mill\n")
    before = set(place.out.rglob("*"))
    for line in (
        "label --task fpb --input {case}/news.csv --output {out}/made.csv",
        "generate --prompts {out}/prompts.txt --output {out}/made.jsonl",
        "decompose --energy 0.9 --output {out}/made",
        "decompose --rank_ratio 0.5 --output {out}/other",
    ):
        status, error = place.run(f"{line} --model {{case}}/base --device cpu")
        assert status == 1, line
        assert len(error.splitlines()) == 1
        assert "the tensor model.layers.1.mlp.up_proj.weight holds a NaN" in error
    left = {path for path in set(place.out.rglob("*")) - before if path.is_file()}
    assert all(".partial" in str(path) for path in left)


def _unused_keys(place: Place) -> None:
    with pytest.raises(WrongSweep, match="uniform takes min and max, not q; did you mean distrib"):
        read_sweep(place.case / "quantised.yaml")
    metric = read_sweep(place.case / "target.yaml").compared_by
    assert (metric.is_reached(2.4), metric.is_reached(2.6)) == (True, False)


def _no_metric(place: Place) -> None:
    sweep = read_sweep(place.case / "grid.yaml")
    assert sweep.metric == "val/loss"
    assert num_trials(sweep, 1) == 1


def _mixed_folder(place: Place) -> None:
    with pytest.warns(
        UserWarning, match=r"2 of the 4 files in .*texts are not read: 1 \.csv, 1 \.j"
    ):
        found = find_text_files(str(place.case / "texts"), "data.train_files")
    assert [path.name for path in found] == ["a.jsonl", "d.jsonl.zst"]


def _one_token_more(place: Place) -> None:
    (place.out / "prompts.txt").write_text("The mill made a profit.\n")
    line = "generate --model {case}/base --device cpu --max_new_tokens 3 --output {out}/made.jsonl"
    status, error = place.run(f"{line} --prompts {{out}}/prompts.txt")
    assert status == 0, error
    (place.out / "prompts.txt").write_text("The [PAD] mill\n")
    status, error = place.run(f"{line} --prompts {{out}}/prompts.txt --overwrite")
    assert status == 1
    assert "the token '[PAD]', id 512" in error


def _averaging(place: Place) -> None:
    configs = f"--config {ROOT}/configs/debug_quickstart.yaml --config {{case}}/averaged.yaml"
    status, error = place.run(
        f"fit {configs} --trainer.default_root_dir {{out}} --trainer.max_steps 2"
        " --trainer.logger false"
    )
    assert status == 0, error
    state = torch.load(place.out / "checkpoints" / "last.ckpt", weights_only=True)
    assert "current_model_state" in state


CHECKS: dict[str, Callable[[Place], None]] = {
    "adapter_layers_to_transform": _largest_logits,
    "adapter_pickled": _pickled,
    "adapter_pissa": _pissa,
    "adapter_rank_pattern": _largest_logits,
    "alpaca_json_array": _json_array,
    "alpaca_long_input": _long_input,
    "chat_messages": _chat_messages,
    "context_target_other_tasks": _context_target,
    "instructions_output_list": _output_list,
    "labels_as_floats_csv": _float_labels,
    "nonfinite_weight": _nonfinite,
    "sweep_keys_unused": _unused_keys,
    "sweep_without_metric": _no_metric,
    "text_folder_mixed": _mixed_folder,
    "tokenizer_one_more": _one_token_more,
    "weight_averaging": _averaging,
}


@pytest.fixture
def cases() -> Path:
    if not CASES.is_dir():
        pytest.skip("../shared/field_cases, the folders of what people met, is absent")
    return CASES


def test_every_folder_has_a_check(cases: Path) -> None:
    assert {path.parent.name for path in cases.glob("*/expected.txt")} == CHECKS.keys()


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")
@pytest.mark.parametrize("case", CHECKS)
def test_a_folder_is_as_expected(
    case: str, cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CHECKS[case](Place(cases / case, tmp_path, capsys))
