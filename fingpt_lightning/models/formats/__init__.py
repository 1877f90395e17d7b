"""Reader and writer of each format of models, adapters and tokenizers."""
