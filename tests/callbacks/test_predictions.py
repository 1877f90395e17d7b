import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import DoublePrecision
from torch.utils.data import DataLoader
from typing_extensions import override

from callbacks.predictions import PredictionWriter
from fingpt_lightning.data import FinancialInstructions, TextBlocks
from fingpt_lightning.evaluation.results import prediction_rows
from fingpt_lightning.evaluation.runner import evaluate, read_tasks
from fingpt_lightning.modules import LowRankPretraining
from fingpt_lightning.strategies import PipelineStrategy
from tests.evaluation.tiny_language import ROWS, tiny_tokenizer, write_rows
from tests.support.lightning_ranks import RanksEnvironment
from tests.support.ranks import run_ranks
from tests.support.token_data import TokenData

SIZES: dict[str, Any] = {
    "preset": "gpt2-nano", "num_layers": 2, "width": 12, "num_heads": 3, "num_positions": 330,
    "rank": None, "vocab_size": 320,
}  # fmt: skip
TEXTS = ["Profit of Foo rose.", "The dividend was kept: 3 € per share.", "Shares fell " * 9]
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, texts and rows of tasks."""
    folder = tmp_path_factory.mktemp("predictions")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    for task in ("fpb", "piqa"):
        write_rows(folder / "data", task)
    own = [{"instruction": f"Add {i}", "input": "", "output": str(i)} for i in range(3)]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    turns = [{"role": role, "content": "Foo"} for role in ("user", "assistant") * 2]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    return folder


def _module() -> LowRankPretraining:
    torch.manual_seed(3)
    return LowRankPretraining(**SIZES)


def _texts(folder: Path) -> TextBlocks:
    text = str(folder / "texts.jsonl")
    return TextBlocks(
        text,
        text,
        tokenizer=str(folder / "tokenizer"),
        block_length=13,
        batch_size=2,
        cache_dir=str(folder / "cache"),
    )


def _tasks(folder: Path, **settings: Any) -> FinancialInstructions:
    given: dict[str, Any] = {
        "tasks": ["fpb", "piqa"], "data_dir": str(folder / "data"), "batch_size": 2,
        "tokenizer": str(folder / "tokenizer"), "max_length": 330,
    }  # fmt: skip
    return FinancialInstructions(**(given | settings))


def _predict(folder: Path, data: Any, module: LightningModule | None = None, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": folder, "enable_checkpointing": False,
        "plugins": [DoublePrecision()], "callbacks": [PredictionWriter()],
    }  # fmt: skip
    trainer = Trainer(**(settings | options))
    return trainer.predict(_module() if module is None else module, datamodule=data)


def _written(folder: Path) -> Rows:
    (file,) = folder.iterdir()
    assert file.name == "predictions.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_block_of_the_text_has_its_loss_and_bits_per_byte(
    folder: Path, tmp_path: Path
) -> None:
    data = _texts(folder)
    batches = _predict(tmp_path, data)
    rows = _written(tmp_path)
    assert rows == [row.fields for batch in batches for row in batch]
    assert [row["block"] for row in rows] == list(range(len(rows)))
    assert len(rows) % 2 == 1, "the last batch has a row less"
    tokens = data._opened("test")[0].open()
    assert sum(row["num_tokens"] for row in rows) == len(tokens) - 1
    decoded = tiny_tokenizer().decode(tokens[1:14].tolist(), skip_special_tokens=True)
    assert rows[0]["text"] == decoded
    for row in rows:
        assert row["num_bytes"] == len(row["text"].encode())
        bits = row["loss"] * row["num_tokens"] / math.log(2) / row["num_bytes"]
        assert row["bits_per_byte"] == pytest.approx(bits)
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, plugins=[DoublePrecision()],
    )  # fmt: skip
    (tested,) = trainer.test(_module(), datamodule=_texts(folder), verbose=False)
    loss = sum(row["loss"] * row["num_tokens"] for row in rows) / (len(tokens) - 1)
    assert loss == pytest.approx(tested["test/loss"], rel=1e-12)


def test_the_answers_to_tasks_are_those_of_evaluate(folder: Path, tmp_path: Path) -> None:
    module = _module()
    _predict(tmp_path, _tasks(folder), module)
    rows = _written(tmp_path)
    runs = read_tasks(["fpb", "piqa"], folder / "data", "validation")
    network = module.network.double()
    wanted = prediction_rows([evaluate(network, tiny_tokenizer(), run) for run in runs])
    assert [{**row, "scores": pytest.approx(row["scores"])} for row in wanted] == rows
    assert len(rows) == len(ROWS["fpb"]) + len(ROWS["piqa"])


def test_own_rows_are_answered_in_writing(folder: Path, tmp_path: Path) -> None:
    own = str(folder / "own.jsonl")
    data = _tasks(folder, tasks=None, train_files=own, validation_files=own, max_new_tokens=3)
    _predict(tmp_path, data)
    rows = _written(tmp_path)
    assert [(row["task"], row["row"], row["gold"]) for row in rows] == [
        ("train_files", number + 1, str(number)) for number in range(3)
    ]
    assert all(row["prediction"] in (None, row["answer"].strip()) for row in rows)
    assert any(row["answer"] for row in rows)


def test_conversations_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    chats = str(folder / "chats.jsonl")
    data = _tasks(folder, tasks=None, train_files=chats, validation_files=chats)
    with pytest.raises(ValueError, match="train_files: row 1 is a conversation of several turns"):
        _predict(tmp_path, data)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_not_replaced_unasked(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "out" / "rows.jsonl"
    _predict(tmp_path, _texts(folder), callbacks=[PredictionWriter(str(file))])
    before = file.read_text()
    with pytest.raises(FileExistsError, match=r"rows.jsonl is there already; predictions.overwr"):
        _predict(tmp_path, _texts(folder), callbacks=[PredictionWriter(str(file))])
    with pytest.raises(ValueError, match="out is a folder"):
        _predict(tmp_path, _texts(folder), callbacks=[PredictionWriter(str(file.parent))])
    file.write_text("old")
    _predict(tmp_path, _texts(folder), callbacks=[PredictionWriter(str(file), overwrite=True)])
    assert file.read_text() == before


class _Failing(LowRankPretraining):
    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            raise RuntimeError("no more")
        return super().predict_step(batch, batch_idx)


class _Foreign(LowRankPretraining):
    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch["labels"]


class _Unplaced(TokenData):
    @override
    def predict_dataloader(self) -> Any:
        rows: Any = [{"input_ids": ids, "labels": labels} for ids, labels in self.rows]
        return DataLoader(rows, batch_size=self.batch_size)


def test_a_prediction_that_fails_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no more"):
        _predict(tmp_path, _texts(folder), _Failing(**SIZES))
    assert not list(tmp_path.iterdir())


def test_what_is_not_rows_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"_Foreign.predict_step gives Tensor"):
        _predict(tmp_path, _texts(folder), _Foreign(**SIZES))
    module = LowRankPretraining(**(SIZES | {"vocab_size": 23}))
    with pytest.raises(ValueError, match=r"rows with a place, which .* of _Unplaced have not"):
        _predict(tmp_path, _Unplaced(2), module)


def test_a_loss_that_is_no_number_is_named(folder: Path, tmp_path: Path) -> None:
    module = _module()
    module.configure_model()
    with torch.no_grad():
        module.network.get_parameter("transformer.ln_f.weight")[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"block 0: the loss nan.*ln_f.weight holds a NaN"):
        _predict(tmp_path, _texts(folder), module)
    assert not list(tmp_path.iterdir())


def _on_ranks(process_rank: int, num_ranks: int, folder_name: str, out_name: str) -> str:
    folder, out = Path(folder_name), Path(out_name)
    plugins = [RanksEnvironment(), DoublePrecision()]
    ddp: dict[str, Any] = {"strategy": "ddp", "devices": num_ranks, "plugins": plugins}
    _predict(out / "texts", _texts(folder), **ddp)
    _predict(out / "tasks", _tasks(folder), **ddp)
    ddp["strategy"] = PipelineStrategy(num_microbatches=2)
    _predict(out / "pipeline", _texts(folder), **ddp)
    ddp["strategy"] = PipelineStrategy(num_microbatches=2)
    with pytest.raises(ValueError, match=r".") as refused:
        _predict(out / "refused", _tasks(folder), **ddp)
    return str(refused.value)


def test_several_processes_write_what_one_writes(folder: Path, tmp_path: Path) -> None:
    _predict(tmp_path / "one" / "texts", _texts(folder))
    _predict(tmp_path / "one" / "tasks", _tasks(folder))
    texts, tasks = (_written(tmp_path / "one" / name) for name in ("texts", "tasks"))
    # Of two ranks with two rows each, the last batch is not full on either.
    assert len(texts) % 4 not in (0, 2)
    per_rank = run_ranks(_on_ranks, 2, str(folder), str(tmp_path / "two"), timeout_s=200)
    assert _written(tmp_path / "two" / "tasks") == _close(tasks)
    assert _written(tmp_path / "two" / "texts") == _close(texts)
    assert _written(tmp_path / "two" / "pipeline") == _close(texts)
    for refused in per_rank:
        assert "answers no questions through a pipeline" in refused
    assert not list((tmp_path / "two" / "refused").glob("*"))


def _close(rows: Rows) -> Rows:
    """The rows, equal to those whose numbers differ in their last digits."""
    return [
        {key: pytest.approx(x) if isinstance(x, float | list) else x for key, x in row.items()}
        for row in rows
    ]
