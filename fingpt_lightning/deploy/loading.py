"""The model that a command's options name, with its adapter or a bank of them."""

import argparse
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fingpt_lightning.deploy.adapter_bank import AdapterBank
from fingpt_lightning.models.device import find_device
from fingpt_lightning.models.loading import LoadedModel, load_model


class ReadyModel(NamedTuple):
    """A network that answers; its bank is None where it has no ``--adapters``."""

    loaded: LoadedModel
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    bank: AdapterBank | None


def load_with_adapters(options: argparse.Namespace) -> ReadyModel:
    """Loads what ``--model``, ``--adapter`` and ``--adapters`` name.

    Raises:
        FileNotFoundError: A path leads nowhere.
        ValueError: A model or adapter is not as it must be.
    """
    loaded = load_model(
        options.model,
        dtype=options.dtype,
        device=find_device(options.device),
        quantize=options.quantize,
        adapter=options.adapter,
        tokenizer=options.tokenizer,
    )
    tokenizer, bank = loaded.require_tokenizer(), None
    if loaded.adapter is not None and options.adapters:
        raise ValueError(f"--adapters need a base; {options.model} has an adapter already")
    network = loaded.adapted()
    if options.adapters:
        bank = AdapterBank(network)
        for name, folder in options.adapters.items():
            bank.load(name, folder)
    return ReadyModel(loaded, network, tokenizer, bank)
