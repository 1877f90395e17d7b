"""Shards of a token cache: merged, they are the bytes of one process's."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from fingpt_lightning.data import tokenizing
from fingpt_lightning.data.corpus import CorpusShare, SyntheticCorpus
from fingpt_lightning.data.text_files import TextFiles
from fingpt_lightning.data.token_cache import build_token_file, find_token_file
from fingpt_lightning.data.token_shards import build_token_shard, merge_token_shards
from fingpt_lightning.data.tokenizers import train_tokenizer
from fingpt_lightning.files import InUseError, owned
from fingpt_lightning.shards.options import ANY_COUNT, Shard

CORPUS = SyntheticCorpus(60, 3)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer((piece.text for piece in CORPUS.pieces()), 300)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "_BATCH_PIECES", 7)


def _texts(folder: Path) -> TextFiles:
    """Two files, with blank documents and bad rows in several batches."""
    lines = [json.dumps({"text": piece.text}) for piece in CORPUS.pieces()]
    lines[9], lines[11], lines[40] = '{"text": " "}', "{", '{"txt": 1}'
    for name, part in (("a", lines[:33]), ("b", lines[33:])):
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in part))
    return TextFiles((folder / "a.jsonl", folder / "b.jsonl"), on_bad_row="skip")


@pytest.mark.parametrize("count", [1, 2, 4, 20])
def test_merged_shards_are_the_bytes_of_one_process(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, count: int
) -> None:
    corpus = _texts(tmp_path)
    whole = build_token_file(corpus, tokenizer, tmp_path / "whole")
    cache = tmp_path / "cache"
    for number in range(count, 0, -1):
        folder = build_token_shard(corpus, tokenizer, cache, Shard(number, count), 1 + number % 2)
        assert folder.name == f"{whole.path.name}.shard-{number}-of-{count}"
    merged = merge_token_shards(corpus, tokenizer, cache, ANY_COUNT, "fingpt tokenize --shard")
    assert merged == replace(whole, path=cache / whole.path.name)
    assert merged.num_skipped == 1
    assert merged.bad_rows.number == 2
    for suffix in (".bin", ".json"):
        own, other = (path.with_suffix(suffix) for path in (merged.path, whole.path))
        assert own.read_bytes() == other.read_bytes()
    assert sorted(path.suffix for path in cache.iterdir()) == [".bin", ".json"]
    assert find_token_file(corpus, tokenizer, cache) == merged


def test_a_share_of_the_documents_is_tokenized_in_each_shard(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, sizes = tokenizing._encode, list[int]()

    def counted(batch: list[object], *rest: object) -> object:
        sizes.append(len(batch))
        return encode(batch, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tokenizing, "_encode", counted)
    build_token_shard(CORPUS, tokenizer, tmp_path, Shard(2, 4))
    assert sizes == [7, 7]
    build_token_shard(CORPUS, tokenizer, tmp_path, Shard(2, 4))  # is there already
    assert sizes == [7, 7]
    build_token_shard(CORPUS, tokenizer, tmp_path, Shard(2, 4), overwrite=True)
    assert sizes == [7, 7, 7, 7]


def test_missing_shards_are_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    build_token_shard(CORPUS, tokenizer, tmp_path, Shard(1, 2))
    with pytest.raises(FileNotFoundError, match=r"1 of the 2 .* 2 \(missing\); run: fit --x 2/2$"):
        merge_token_shards(CORPUS, tokenizer, tmp_path, 2, "fit --x")
    assert not list(tmp_path.glob("*.bin"))


def test_a_cache_that_is_whole_needs_no_shards(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    whole = build_token_file(CORPUS, tokenizer, tmp_path)
    assert build_token_shard(CORPUS, tokenizer, tmp_path, Shard(1, 2)) == whole.path
    assert merge_token_shards(CORPUS, tokenizer, tmp_path, ANY_COUNT, "") == whole
    assert len(list(tmp_path.iterdir())) == 2


def test_two_processes_do_not_write_one_shard(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = build_token_shard(CORPUS, tokenizer, tmp_path, Shard(1, 1))
    with owned(folder), pytest.raises(InUseError, match=f"in use by process {os.getpid()}"):
        build_token_shard(CORPUS, tokenizer, tmp_path, Shard(1, 1))
    with owned(folder), pytest.raises(InUseError, match=f"in use by process {os.getpid()}"):
        merge_token_shards(CORPUS, tokenizer, tmp_path, 1, "")


def test_shards_of_another_library_are_not_merged(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_token_shard(CORPUS, tokenizer, tmp_path, Shard(1, 2))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.1")
    build_token_shard(CORPUS, tokenizer, tmp_path, Shard(2, 2))
    with pytest.raises(ValueError, match=r"are of tokenizers '.*', --merge of '0\.1'"):
        merge_token_shards(CORPUS, tokenizer, tmp_path, 2, "")


def test_a_corpus_without_text_is_refused_and_leaves_its_shards(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "none.jsonl").write_text('{"text": ""}\n')
    corpus = TextFiles((tmp_path / "none.jsonl",))
    build_token_shard(corpus, tokenizer, tmp_path, Shard(1, 1))
    with pytest.raises(ValueError, match="no text in any of 1 documents"):
        merge_token_shards(corpus, tokenizer, tmp_path, 1, "")
    assert not list(tmp_path.glob("*.bin"))


def test_both_parts_of_a_corpus_with_a_share_held_out_are_merged(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for part in ("kept", "held out"):
        corpus = CorpusShare(CORPUS, 0.3, part)
        for number in (1, 2):
            build_token_shard(corpus, tokenizer, tmp_path / "cache", Shard(number, 2))
        merged = merge_token_shards(corpus, tokenizer, tmp_path / "cache", 2, "")
        whole = build_token_file(corpus, tokenizer, tmp_path / "whole")
        assert merged.path.read_bytes() == whole.path.read_bytes()
