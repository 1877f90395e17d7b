"""The model that a command's options name, with its adapter or a bank of them."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fingpt_lightning.deploy.adapter_bank import AdapterBank
from fingpt_lightning.models.device import find_device
from fingpt_lightning.models.formats.peft_adapter import trained_quantization
from fingpt_lightning.models.loading import AUTO, NONE, LoadedModel, build_model
from fingpt_lightning.models.sources import find_adapter, resolve_source


class ReadyModel(NamedTuple):
    """A network ready for use; its bank is None where there is no ``--adapters``."""

    loaded: LoadedModel
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    bank: AdapterBank | None


def load_with_adapters(options: argparse.Namespace) -> ReadyModel:
    """Loads what ``--model``, ``--adapter`` and ``--adapters`` name.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A model or adapter is not valid.
    """
    quantize = options.quantize
    if options.adapters and quantize == AUTO:
        quantize = common_quantization(options.adapters)
    source = resolve_source(options.model, adapter=options.adapter, tokenizer=options.tokenizer)
    if source.adapter is not None and options.adapters:
        raise ValueError(f"--adapters need a base; {options.model} has an adapter already")
    device = find_device(options.device)
    loaded = build_model(source, dtype=options.dtype, device=device, quantize=quantize)
    network, tokenizer, bank = loaded.network, loaded.require_tokenizer(), None
    if options.adapters:
        bank = AdapterBank(network)
        for name, path in options.adapters.items():
            bank.load(name, find_adapter(path))
    return ReadyModel(loaded, network, tokenizer, bank)


def common_quantization(adapters: Mapping[str, Path]) -> str:
    """The format to which the bases of some adapters were quantized when they were trained.

    Args:
        adapters: Paths of the adapters, as in `find_adapter`, by name.

    Raises:
        FileNotFoundError: A path has no adapter.
        ValueError: They were trained on bases with different formats.
    """
    found = {
        name: trained_quantization(find_adapter(path)) or NONE for name, path in adapters.items()
    }
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} {method}" for name, method in found.items())
        raise ValueError(
            f"--adapters share one base, but theirs were quantised otherwise ({listed}): choose"
            " one by --quantize"
        )
    return next(iter(found.values()))
