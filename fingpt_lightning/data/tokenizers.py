"""Tokenizers: load one from a folder or the hub, or train a byte-level BPE on the text at hand."""

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fingpt_lightning.data.corpus import Corpus
from fingpt_lightning.data.documents import short_pieces
from fingpt_lightning.files import scratch_folder, sync_files, sync_folder
from fingpt_lightning.models.formats.tokenizer import (
    check_added_tokens,
    not_loaded,
    read_tokenizer,
    try_out,
)
from fingpt_lightning.terminal.inputs import refuse_missing_tokenizer
from fingpt_lightning.terminal.progress import announced

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257
"""The 256 bytes and the end of text."""

_log = logging.getLogger(__name__)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """Loads a fast tokenizer from a local folder or GGUF file, or by name from the hub.

    Truncation and padding that its file requests are switched off: documents stay whole.

    Raises:
        FileNotFoundError: A path is not a folder, or the hub cannot be reached or does not know the
            name.
        ValueError: The folder holds no tokenizer, or the tokenizer has no end-of-text token or no
            fast implementation.
    """
    folder = Path(name_or_path).expanduser()
    tokenizer: object
    if folder.suffix == ".gguf" and folder.is_file():
        tokenizer = read_tokenizer(folder.parent, folder.name)
    elif not folder.is_dir():
        tokenizer = _load_from_hub(name_or_path)
    else:
        tokenizer = _load_from_folder(folder)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer: {name_or_path} has no fast implementation")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer: {name_or_path} names no eos_token in its tokenizer_config.json, so "
            "documents cannot be told apart"
        )
    try_out(tokenizer, Path(name_or_path))
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE; the same texts give the same tokenizer.

    It covers all text, has ``<|endoftext|>`` as its one special token, and ends smaller than
    ``vocab_size`` where the texts have too few pairs to merge.

    Raises:
        ValueError: ``vocab_size`` is too small for the 256 bytes and the end of text.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size {vocab_size} is below {MIN_VOCAB_SIZE}, the bytes and the end"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def cached_tokenizer_folder(corpus: Corpus, vocab_size: int, cache_dir: Path) -> Path:
    """The folder of the tokenizer that ``train_cached_tokenizer`` makes, there or not."""
    key = hashlib.sha256(f"bpe 1, {vocab_size} entries, {corpus.fingerprint()}".encode())
    return cache_dir / f"tokenizer-{key.hexdigest()[:24]}"


def train_cached_tokenizer(
    corpus: Corpus, vocab_size: int, cache_dir: Path
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer on a corpus, or loads it where that has been done before.

    The folder appears whole or not at all; of two processes that train at once, the first wins.
    """
    folder = cached_tokenizer_folder(corpus, vocab_size, cache_dir)
    if not folder.is_dir():
        _log.info("training a tokenizer of %d entries on %s", vocab_size, corpus)
        texts = (piece.text for piece in short_pieces(corpus.pieces()))
        with announced(f"training a tokenizer of {vocab_size:,} entries on {corpus}"):
            tokenizer = train_tokenizer(texts, vocab_size)
        with scratch_folder(folder) as made:
            tokenizer.save_pretrained(made)
            sync_files(made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was first
                    raise
        sync_folder(cache_dir)
    return load_tokenizer(str(folder))


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """The number of rows that an embedding needs; equal to ``len`` unless ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def _load_from_folder(folder: Path) -> object:
    check_added_tokens(folder)
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"tokenizer: {folder} {not_loaded(folder, error)}") from error


def _load_from_hub(name: str) -> object:
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception:
        _log.info("tokenizer %s is not in the local hub cache", name)
    refuse_missing_tokenizer(name)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"tokenizer: {name} {not_loaded(Path(name), error)}") from error
