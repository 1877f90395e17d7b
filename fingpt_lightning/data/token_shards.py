"""A token cache that many jobs build: each tokenizes its share of the batches of documents.

The batches are those of one process, so that the merged cache has its bytes.
"""

import importlib.metadata
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from fingpt_lightning.data.corpus import Corpus
from fingpt_lightning.data.token_cache import TokenFile, TokenPlace, find_or_none, write_token_file
from fingpt_lightning.data.tokenizing import EncodedBatch, encoded_batches
from fingpt_lightning.files import read_json, write_json, written_whole
from fingpt_lightning.shards.folders import (
    FinishedShard,
    begun_shard,
    finish_shard,
    merged_shards,
    shard_folder,
)
from fingpt_lightning.shards.options import Shard
from fingpt_lightning.terminal.progress import SoFar, shown_tokenizing

_IDS, _BATCHES = "ids.bin", "batches.json"


def build_token_shard(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: Path,
    shard: Shard,
    num_workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Tokenizes a share of a corpus, unless that or the whole has been done before.

    All of the corpus is read, for that is how its batches are known; a share is tokenized.

    Args:
        corpus: Corpus to read.
        tokenizer: Tokenizer that makes the ids.
        cache_dir: Folder of the caches.
        shard: Share of the batches.
        num_workers: Threads, as in `fingpt_lightning.data.token_cache.build_token_file`.
        overwrite: Whether a shard that is there is made anew.

    Returns:
        Folder of the shard, or file of the whole.

    Raises:
        InUseError: Another process works on this shard.
        ValueError: As `build_token_file`, or the shard is of other settings.
    """
    place = TokenPlace(corpus, tokenizer, cache_dir)
    if find_or_none(place) is not None:
        return place.path
    cache_dir.mkdir(parents=True, exist_ok=True)
    folder = shard_folder(place.path, shard)
    with begun_shard(folder, _settings(place), overwrite) as was_finished:
        if was_finished:
            return folder
        facts: list[dict[str, Any]] = []
        batches = encoded_batches(corpus, tokenizer, place.dtype, num_workers, shard)
        so_far = SoFar()
        with (
            written_whole(folder / _IDS) as aside,
            aside.open("wb") as file,
            closing(batches),
            shown_tokenizing(f"{corpus}, shard {shard}", corpus.num_bytes()) as show,
        ):
            for batch in batches:
                file.write(batch.ids.data)
                facts.append(batch._asdict() | {"ids": len(batch.ids)})
                so_far = SoFar(
                    so_far.num_documents + batch.num_documents,
                    so_far.num_tokens + len(batch.ids),
                    batch.bytes_read,
                )
                show(so_far)
        write_json(folder / _BATCHES, {"batches": facts}, indent=None)
        finish_shard(folder, so_far._asdict())
    return folder


def merge_token_shards(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: Path,
    num_shards: int,
    command: str,
) -> TokenFile:
    """Writes the cache of a corpus from all of its shards, which are removed then.

    Args:
        corpus: Corpus that was read.
        tokenizer: Tokenizer that made the ids.
        cache_dir: Folder of the caches.
        num_shards: Number of the shards, or `fingpt_lightning.shards.options.ANY_COUNT`.
        command: Command line of a shard, but for ``I/N`` at its end.

    Raises:
        FileNotFoundError: A shard is not whole.
        InUseError: Another process works on one.
        ValueError: The shards are of different settings, or the corpus has no text.
    """
    place = TokenPlace(corpus, tokenizer, cache_dir)
    if (whole := find_or_none(place)) is not None:
        return whole
    with merged_shards(place.path, num_shards, command, _settings(place)) as shards:
        return write_token_file(place, _batches_of(shards, place.dtype))


def _settings(place: TokenPlace) -> dict[str, Any]:
    # Ids of another version of the library need not be the same.
    return {"tokens": place.path.stem, "tokenizers": importlib.metadata.version("tokenizers")}


def _batches_of(shards: Sequence[FinishedShard], dtype: str) -> Iterator[EncodedBatch]:
    """The batches of all shards, in the order of the corpus."""
    facts = [read_json(shard.folder / _BATCHES)["batches"] for shard in shards]
    files = [(shard.folder / _IDS).open("rb") for shard in shards]
    try:
        for index in range(sum(map(len, facts))):
            own, at = facts[index % len(shards)], index // len(shards)
            num_ids = own[at]["ids"]
            num_bytes = num_ids * np.dtype(dtype).itemsize
            ids = np.frombuffer(files[index % len(shards)].read(num_bytes), dtype)
            yield EncodedBatch(**own[at] | {"ids": ids})
    finally:
        for file in files:
            file.close()
