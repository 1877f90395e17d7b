import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from typing_extensions import override

from fingpt_lightning.data import tokenizing
from fingpt_lightning.data.batch import IGNORED_LABEL
from fingpt_lightning.data.blocks import ResumableDataLoader
from fingpt_lightning.data.synthetic_news import synthetic_news
from fingpt_lightning.data.text_blocks import TextBlocks
from fingpt_lightning.data.text_sources import MixturePart
from fingpt_lightning.data.token_cache import TokenFile


class _Recorder(LightningModule):
    """Keeps the batches it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.train_batches: list[list[list[int]]] = []
        self.num_eval_labels = 0

    @override
    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        self.train_batches.append(batch["input_ids"].tolist())
        return self.weight * 1.0

    @override
    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.num_eval_labels += int((batch["labels"] != IGNORED_LABEL).sum())

    @override
    def test_step(self, batch: dict[str, Tensor]) -> None:
        self.validation_step(batch)

    @override
    def predict_step(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["labels"]

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _data(cache_dir: Path, **settings: Any) -> TextBlocks:
    defaults: dict[str, Any] = {
        "vocab_size": 300,
        "block_length": 16,
        "batch_size": 3,
        "cache_dir": str(cache_dir),
        "num_synthetic_items": 12,
        "val_share": 0.2,
    }
    return TextBlocks(**(defaults | settings))


def _trainer(folder: Path, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
    }
    return Trainer(**(defaults | settings))


def _ready(data: TextBlocks) -> TextBlocks:
    data.prepare_data()
    data.setup()
    return data


def _write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def _decoded(data: TextBlocks, split: str) -> list[str]:
    """The documents of a split, read back from its blocks."""
    tokens: list[int] = []
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    for batch in loader:
        tokens += batch["labels"][batch["labels"] != IGNORED_LABEL].tolist()
    return _documents(data, tokens)


def _documents(data: TextBlocks, tokens: list[int]) -> list[str]:
    text = data.tokenizer.decode(tokens)
    assert isinstance(text, str)
    return text.split("<|endoftext|>")[:-1]


def test_null_trains_on_synthetic_news(tmp_path: Path) -> None:
    data = _ready(_data(tmp_path))
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 16)
    assert data.vocabulary_size == len(data.tokenizer) == 300
    assert data.num_train_tokens > 1000
    assert int(batch["input_ids"].max()) < 300


def test_bytes_per_token_are_those_of_the_text(tmp_path: Path) -> None:
    texts = ["Umsatz stieg um 5 € auf 12 €.", "x" * 700, "", "日本銀行は金利を据え置いた。" * 90]
    path = _write_jsonl(tmp_path / "train.jsonl", texts)
    data = _ready(_data(tmp_path, train_files=path, val_files=path, block_length=4))
    num_bytes = sum(len(text.encode()) for text in texts)
    for split in ("train", "val", "test"):
        (file,) = data._opened(split)
        assert file.num_bytes == num_bytes
        assert data.bytes_per_token(split) == num_bytes / file.num_tokens
    again = _ready(_data(tmp_path, train_files=path, val_files=path, block_length=4))
    assert again.bytes_per_token("val") == data.bytes_per_token("val")


def test_bytes_of_a_mixture_count_by_its_weights_and_old_caches_know_none(tmp_path: Path) -> None:
    data = _ready(_data(tmp_path))
    counts = [(100, 400), (300, 600)]
    data._token_files["train"] = tuple(
        TokenFile(tmp_path / "x.bin", "uint16", tokens, 1, 0, num_bytes)
        for tokens, num_bytes in counts
    )
    assert data.bytes_per_token("train") == pytest.approx(1000 / 400)
    parts: list[MixturePart] = [
        {"name": "a", "files": "a.txt", "weight": 3.0},
        {"name": "b", "files": "b.txt", "weight": 1.0},
    ]
    data.sources = replace(data.sources, mixture=parts)
    assert data.bytes_per_token("train") == pytest.approx(0.75 * 4 + 0.25 * 2)
    data._token_files["val"] = (TokenFile(tmp_path / "x.bin", "uint16", 10, 1, 0),)
    assert data.bytes_per_token("val") is None


def test_the_tokenizer_reference_knows_its_tokenizer_again(tmp_path: Path) -> None:
    reference = _ready(_data(tmp_path)).tokenizer_reference()
    loaded = _ready(_data(tmp_path, tokenizer=str(reference["name_or_path"])))
    assert loaded.tokenizer_reference() == reference
    assert reference["vocabulary_size"] == 300
    assert loaded.eos_token_id == loaded.tokenizer.eos_token_id


def test_held_out_documents_are_not_trained_on(tmp_path: Path) -> None:
    texts = [f"document {index} ends here." for index in range(80)]
    path = _write_jsonl(tmp_path / "train.jsonl", texts)
    data = _ready(_data(tmp_path, train_files=path))
    # The very first token of a split is never a label, so its first document lacks it.
    held_out = _decoded(data, "val")
    assert 5 < len(held_out) < 30
    kept = _documents(data, data._opened("train")[0].open().tolist())
    assert not set(held_out[1:]) & set(kept)
    assert len(kept) + len(held_out) == len(texts)


def test_val_and_test_files_are_read_whole(tmp_path: Path) -> None:
    train = _write_jsonl(tmp_path / "train.jsonl", ["the train"] * 50)
    val = _write_jsonl(tmp_path / "val.jsonl", ["the first", "the second"])
    test = _write_jsonl(tmp_path / "test.jsonl", ["the third", "the fourth"])
    data = _ready(_data(tmp_path, train_files=train, val_files=[val], test_files=test))
    assert _decoded(data, "val")[1:] == ["the second"]
    assert _decoded(data, "test")[1:] == ["the fourth"]
    assert _decoded(_ready(_data(tmp_path, train_files=train, val_files=val)), "test")[1:] == [
        "the second"
    ]


def test_nothing_is_tokenized_or_trained_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _ready(_data(tmp_path))
    monkeypatch.delattr(tokenizing, "_encode")
    second = _ready(_data(tmp_path, block_length=7, batch_size=2))
    assert second.num_train_tokens == first.num_train_tokens


def test_skipped_rows_are_counted_and_a_cache_keeps_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = _write_jsonl(tmp_path / "a.jsonl", ["shares rose"] * 100)
    lines = Path(path).read_text().splitlines()
    lines[1::2] = ["{broken"] * 50  # among them documents that are held out
    Path(path).write_text("\n".join(lines))
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: no JSON")):
        _ready(_data(tmp_path, train_files=path))
    data = _ready(_data(tmp_path, train_files=path, on_bad_row="skip"))
    number, first = data.skipped_rows()
    kept, held_out = data._opened("train")[0], data._opened("val")[0]
    assert kept.bad_rows.number + held_out.bad_rows.number == number == 50
    assert held_out.bad_rows.number > 0
    assert kept.num_documents + held_out.num_documents == 50
    assert kept.num_skipped == held_out.num_skipped == 0
    assert first == kept.bad_rows.first
    assert f"{path}:2: no JSON" in str(first)
    logged = f"train text: skipped {kept.bad_rows.number} bad rows, first {path}:2: no JSON"
    assert caplog.text.count(logged) == 1
    monkeypatch.delattr(tokenizing, "_encode")
    again = _ready(_data(tmp_path, train_files=path, on_bad_row="skip"))
    assert again.skipped_rows() == (number, first)
    assert caplog.text.count(logged) == 2
    with pytest.raises(ValueError, match="no JSON"):  # not the cache of the other rule
        _ready(_data(tmp_path, train_files=path))


def test_text_of_bad_rows_alone_is_refused_with_the_first(tmp_path: Path) -> None:
    path = _write_jsonl(tmp_path / "a.jsonl", ["shares rose"] * 100)
    data = _data(tmp_path, train_files=path, text_field="body", on_bad_row="skip")
    with pytest.raises(
        ValueError, match=r"no text in any of \d+ documents \(\d+ bad rows, first .*:2:"
    ):
        data.prepare_data()


def test_setup_without_prepare_data_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="prepare_data has to run first"):
        _data(tmp_path).setup()
    with pytest.raises(RuntimeError, match="the train text is not open: setup has to run first"):
        _data(tmp_path).train_dataloader()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_share": 0.0}, "val_share 0.0 is outside (0, 1)"),
        ({"val_share": 1.0}, "val_share 1.0 is outside (0, 1)"),
        ({"vocab_size": 256}, "vocab_size 256 is below 257"),
        ({"block_length": 0}, "block_length 0 is below 1"),
        ({"batch_size": 0}, "batch_size 0 is below 1"),
        ({"num_workers": -1}, "num_workers -1 is below 0"),
        ({"num_tokenizing_workers": 0}, "num_tokenizing_workers 0 is below 1"),
        ({"num_synthetic_items": 0}, "num_synthetic_items 0 is below 1"),
        ({"seed": -1}, "seed -1 is outside [0, 2**32)"),
    ],
)
def test_a_setting_outside_its_range_is_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        _data(tmp_path, **settings)


@pytest.mark.parametrize("key", ["train_files", "val_files", "test_files"])
def test_a_missing_file_is_named_with_its_key(key: str, tmp_path: Path) -> None:
    data = _data(tmp_path, **{key: str(tmp_path / "no.txt")})
    with pytest.raises(FileNotFoundError, match=f"{key}: .*no.txt does not exist"):
        data.prepare_data()


def test_text_below_one_batch_is_refused_with_the_numbers(tmp_path: Path) -> None:
    data = _data(tmp_path, block_length=1000, batch_size=4)
    message = (
        r"has [23]\d\d\d tokens, [23] blocks of 1000, but one batch takes 4 "
        r"\(batch_size 4 x 1 ranks\): give more text, or lower block_length or batch_size"
    )
    with pytest.raises(ValueError, match=message):
        data.prepare_data()
    data.setup()  # the cache is there, and another process may have built it
    with pytest.raises(ValueError, match=message):
        data.train_dataloader()


def test_ranks_come_from_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _ready(_data(tmp_path))
    data.trainer = trainer = _trainer(tmp_path)
    one = data.train_dataloader()
    assert isinstance(one, ResumableDataLoader)
    assert (one.block_sampler.num_replicas, one.block_sampler.rank) == (1, 0)
    kwargs = {"num_replicas": 2, "rank": 1}
    monkeypatch.setattr(type(trainer), "distributed_sampler_kwargs", kwargs)
    other = data.train_dataloader()
    assert isinstance(other, ResumableDataLoader)
    assert (other.block_sampler.num_replicas, other.block_sampler.rank) == (2, 1)
    assert len(other) == len(one) // 2
    assert not other.pin_memory


class _Saver(Callback):
    """Saves a checkpoint after each step, and one after the validation at the end of an epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")

    @override
    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"epoch={trainer.current_epoch}.ckpt")


def _fit(
    folder: Path, run: str, ckpt_path: Path | None = None, max_epochs: int = 2, **settings: Any
) -> list[list[list[int]]]:
    """The batches of a run that leaves its checkpoints in ``folder / run``."""
    module = _Recorder()
    trainer = _trainer(folder, max_epochs=max_epochs, callbacks=_Saver(folder / run))
    data = _data(folder / "cache", **settings)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module.train_batches


_MIXTURE = [
    {"name": "news", "files": None, "weight": 0.7},
    {"name": "archive", "files": None, "weight": 0.3},
]


def test_a_mixture_draws_its_shares_and_counts_all_its_tokens(tmp_path: Path) -> None:
    data = _ready(_data(tmp_path, mixture=_MIXTURE))
    loader = data.train_dataloader()
    assert isinstance(loader, ResumableDataLoader)
    news, archive = (set(file.open().tolist()) for file in data._opened("train"))
    assert news
    assert archive
    sizes = [len(data._blocks(file)) for file in data._opened("train")]
    drawn = [int(index) < sizes[0] for index in loader.block_sampler]
    assert abs(sum(drawn) - 0.7 * len(drawn)) < 1
    assert data.num_train_tokens == sum(file.num_tokens for file in data._opened("train"))
    assert len(_decoded(data, "val")) > 1


def test_bad_rows_of_a_mixture_are_skipped_and_change_no_share(tmp_path: Path) -> None:
    parts: list[MixturePart] = []
    for name, weight, num_bad in (("a", 0.75, 40), ("b", 0.25, 10)):
        texts = [f"{name} " * 20 + f"number {index}" for index in range(100)]
        path = Path(_write_jsonl(tmp_path / f"{name}.jsonl", texts))
        lines = path.read_text().splitlines()
        for index in range(num_bad):
            lines[2 * index] = ("{broken", '{"text": 7}')[index % 2]
        path.write_text("\n".join(lines))
        parts.append({"name": name, "files": str(path), "weight": weight})
    with pytest.raises(ValueError, match=r"a.jsonl:1: no JSON"):
        _ready(_data(tmp_path, mixture=parts))
    data = _ready(_data(tmp_path, mixture=parts, on_bad_row="skip"))
    number, first = data.skipped_rows()
    assert number == 50
    assert f"{parts[0]['files']}:" in str(first)
    kept = data._opened("train")
    assert all(file.bad_rows.number > 0 for file in kept)
    (held_out,) = data._opened("val")
    assert sum(file.bad_rows.number for file in kept) + held_out.bad_rows.number == 50
    assert sum(file.num_documents for file in kept) + held_out.num_documents == 150
    # The shares of the blocks are the weights, in every prefix to within one block.
    loader, size_of_a = data.train_dataloader(), len(data._blocks(kept[0]))
    assert isinstance(loader, ResumableDataLoader)
    are_of_a = [int(index) < size_of_a for index in loader.block_sampler]
    assert len(are_of_a) > 100
    for number in range(1, len(are_of_a) + 1):
        assert abs(sum(are_of_a[:number]) - 0.75 * number) <= 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_on_a_mixture_is_resumed_exactly(num_workers: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"mixture": _MIXTURE, "batch_size": 8, "num_workers": num_workers}
    whole = _fit(tmp_path, "whole", None, **settings)
    num_batches = len(whole) // 2
    for step in (2, num_batches + 1):
        resumed = _fit(tmp_path, f"from_{step}", tmp_path / f"whole/step={step}.ckpt", **settings)
        assert resumed == whole[step:], step


def test_a_checkpoint_of_a_mixture_holds_plain_types(tmp_path: Path) -> None:
    _fit(tmp_path, "run", mixture=_MIXTURE)
    checkpoint = torch.load(tmp_path / "run/step=2.ckpt", weights_only=True)
    assert checkpoint["datamodule_hyper_parameters"]["mixture"] == _MIXTURE


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(
    num_workers: int, tmp_path: Path
) -> None:
    settings = {"batch_size": 8, "num_workers": num_workers}
    whole = _fit(tmp_path, "whole", None, **settings)
    num_batches = len(whole) // 2
    assert whole[:num_batches] != whole[num_batches:]
    for step in (2, num_batches, num_batches + 1):
        checkpoint = tmp_path / f"whole/step={step}.ckpt"
        resumed = _fit(tmp_path, f"from_{step}", checkpoint, **settings)
        assert resumed == whole[step:], step


def test_a_run_resumed_at_the_end_of_an_epoch_begins_the_next(tmp_path: Path) -> None:
    whole = _fit(tmp_path, "whole")
    first = _fit(tmp_path, "first", max_epochs=1)
    second = _fit(tmp_path, "second", tmp_path / "first/epoch=0.ckpt")
    assert first + second == whole
    assert len(first) == len(second) > 0


def test_a_run_on_other_data_is_not_resumed(tmp_path: Path) -> None:
    texts = [item.text for item in synthetic_news(12, seed=1)]
    news = _write_jsonl(tmp_path / "news.jsonl", texts)
    _fit(tmp_path, "first", train_files=news)
    with pytest.raises(ValueError, match="the checkpoint stopped in data with seed 1, but here"):
        _fit(tmp_path, "second", tmp_path / "first/step=3.ckpt", train_files=news, seed=2)


def test_trainer_overfits_the_first_batches_in_order(tmp_path: Path) -> None:
    module = _Recorder()
    _trainer(tmp_path, max_epochs=2, overfit_batches=2).fit(module, datamodule=_data(tmp_path))
    assert len(module.train_batches) == 4
    assert module.train_batches[:2] == module.train_batches[2:]


def test_evaluation_sees_each_label_once_and_tokenises_its_split_alone(tmp_path: Path) -> None:
    data = _data(tmp_path, tokenizer=str(_ready(_data(tmp_path)).tokenizer.name_or_path))
    data.cache_dir = tmp_path / "evaluation"
    module = _Recorder()
    trainer = _trainer(tmp_path)
    trainer.test(module, datamodule=data)
    assert len(list(data.cache_dir.glob("*.bin"))) == 1
    num_tokens = data._opened("test")[0].num_tokens
    assert module.num_eval_labels == num_tokens - 1
    trainer.validate(module, datamodule=data)
    assert module.num_eval_labels == 2 * (num_tokens - 1)
    predictions = trainer.predict(module, datamodule=data)
    assert predictions is not None
    labels = torch.cat([part for part in predictions if isinstance(part, Tensor)])
    assert int((labels != IGNORED_LABEL).sum()) == num_tokens - 1


def test_real_text_goes_through_and_comes_back(shared_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "wikitext.txt"
    path.write_text((shared_data / "wikitext2/validation.txt").read_text()[:100_000])
    gpt2 = str(shared_data / "tokenizers/gpt2")
    data = _ready(_data(tmp_path, train_files=str(path), val_files=str(path), tokenizer=gpt2))
    ids = data.tokenizer.backend_tokenizer.encode(path.read_text()).ids
    assert _decoded(data, "val") == [data.tokenizer.decode(ids[1:])]
    assert data.vocabulary_size == 50257
