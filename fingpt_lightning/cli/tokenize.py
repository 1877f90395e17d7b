"""``fingpt tokenize``: the token cache of a run, by one process or by many jobs."""

import argparse

from fingpt_lightning.cli.early_checks import WITHOUT_LOGGERS
from fingpt_lightning.cli.errors import ConfigError
from fingpt_lightning.cli.trainer import build_data
from fingpt_lightning.data import TextBlocks
from fingpt_lightning.data.corpus import Corpus
from fingpt_lightning.data.token_cache import TokenFile, build_token_file
from fingpt_lightning.data.token_shards import build_token_shard, merge_token_shards


def run(options: argparse.Namespace) -> None:
    """Tokenizes the text of a run, or a shard of it, or merges shards, and prints the caches.

    Args:
        options: Result of `tokenize_options.parse_options`.

    Raises:
        ConfigError: The command line or a config is wrong, or its data are not text.
        OSError: A file or a shard is missing.
        ValueError: The text cannot be read.
    """
    data = build_data(["fit", *options.words, *WITHOUT_LOGGERS], options.own_options)
    if not isinstance(data, TextBlocks):
        raise ConfigError(
            f"data {type(data).__name__} has no cache of tokens; fingpt tokenize takes TextBlocks"
        )
    tokenizer = data.prepare_tokenizer()

    def whole(corpus: Corpus) -> TokenFile:
        if options.merge is None:
            return build_token_file(corpus, tokenizer, data.cache_dir, data.num_tokenizing_workers)
        return merge_token_shards(
            corpus, tokenizer, data.cache_dir, options.merge, options.shard_command
        )

    for corpus in data.all_corpora():
        if options.shard is None:
            file = whole(corpus)
            counted = f"{file.num_tokens:,} tokens of {file.num_documents:,} documents"
            print(f"{corpus}: {counted} in {file.path}")
            continue
        place = build_token_shard(
            corpus,
            tokenizer,
            data.cache_dir,
            options.shard,
            data.num_tokenizing_workers,
            options.overwrite,
        )
        print(f"{corpus}: shard {options.shard} in {place}")
