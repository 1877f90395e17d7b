import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fingpt_lightning.data import tokenizers
from fingpt_lightning.data.corpus import SyntheticCorpus
from fingpt_lightning.data.synthetic_news import synthetic_news
from fingpt_lightning.data.tokenizers import (
    cached_tokenizer_folder,
    load_tokenizer,
    train_cached_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from fingpt_lightning.models.formats.tokenizer import tokenizer_sha256


def _train(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    return train_tokenizer((item.text for item in synthetic_news(60, seed=1)), vocab_size)


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return _train()


def test_training_twice_gives_one_tokenizer(trained: PreTrainedTokenizerFast) -> None:
    assert tokenizer_sha256(_train()) == tokenizer_sha256(trained)
    assert tokenizer_sha256(_train(401)) != tokenizer_sha256(trained)
    assert vocabulary_size(trained) == len(trained) == 400
    assert trained.eos_token == "<|endoftext|>"


@given(text=st.text())
def test_a_trained_tokenizer_covers_all_text(trained: PreTrainedTokenizerFast, text: str) -> None:
    assert trained.decode(trained(text)["input_ids"]) == text


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size 256 is below 257"):
        train_tokenizer(["x"], 256)


def test_a_tokenizer_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = SyntheticCorpus(20, seed=1)
    first = train_cached_tokenizer(corpus, 300, tmp_path)
    monkeypatch.delattr(tokenizers, "train_tokenizer")
    second = train_cached_tokenizer(corpus, 300, tmp_path)
    assert tokenizer_sha256(first) == tokenizer_sha256(second)
    assert second.eos_token_id == first.eos_token_id is not None
    assert [path.name for path in tmp_path.iterdir()] == [
        cached_tokenizer_folder(corpus, 300, tmp_path).name
    ]
    others = [
        cached_tokenizer_folder(corpus, 301, tmp_path),
        cached_tokenizer_folder(SyntheticCorpus(21, seed=1), 300, tmp_path),
    ]
    assert not any(folder.exists() for folder in others)


def test_of_two_that_train_at_once_the_first_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = SyntheticCorpus(20, seed=1)
    train = tokenizers.train_tokenizer

    def train_while_another_finishes(*args: object) -> object:
        monkeypatch.setattr(tokenizers, "train_tokenizer", train)
        train_cached_tokenizer(corpus, 300, tmp_path)
        return train_tokenizer(["other"], 300)

    monkeypatch.setattr(tokenizers, "train_tokenizer", train_while_another_finishes)
    assert len(train_cached_tokenizer(corpus, 300, tmp_path)) == 300
    assert len(list(tmp_path.iterdir())) == 1


def test_training_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        train_cached_tokenizer(SyntheticCorpus(20, seed=1), 300, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_real_tokenizer_loads(shared_data: Path) -> None:
    gpt2 = load_tokenizer(str(shared_data / "tokenizers/gpt2"))
    assert vocabulary_size(gpt2) == 50257
    assert gpt2.eos_token_id == 50256


def test_truncation_and_padding_of_the_file_are_off(
    trained: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path)
    rows = json.loads((tmp_path / "tokenizer.json").read_text())
    limit = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(rows | {"truncation": limit}))
    loaded = load_tokenizer(str(tmp_path))
    assert tokenizer_sha256(loaded) == tokenizer_sha256(trained)


def test_a_tokenizer_without_an_end_is_refused(
    trained: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"names no eos_token in its tokenizer_config\.json"):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(
        ValueError,
        match=r"holds none of tokenizer.json, tokenizer.model, vocab.json; found readme.txt",
    ) as raised:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_missing_folder_names_its_neighbour(
    trained: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path / "news")
    message = re.escape(f"tokenizer: no folder {tmp_path}/nwes; the nearest name there is news")
    with pytest.raises(FileNotFoundError, match=message):
        load_tokenizer(str(tmp_path / "nwes"))


def test_a_hub_name_without_network_ends_in_one_line() -> None:
    with pytest.raises(
        FileNotFoundError, match="nobody/nothing is neither a local folder nor"
    ) as raised:
        load_tokenizer("nobody/nothing")
    assert "\n" not in str(raised.value)


def test_a_tokenizer_in_the_hub_cache_needs_no_network(
    trained: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_pretrained(name: str, **settings: bool) -> PreTrainedTokenizerFast:
        assert settings == {"local_files_only": True, "trust_remote_code": False}
        return trained

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    assert load_tokenizer("some/name") is trained


def test_a_copy_of_a_folder_is_the_same_tokenizer(
    trained: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = (load_tokenizer(str(tmp_path / name)) for name in "ab")
    assert tokenizer_sha256(first) == tokenizer_sha256(second)
