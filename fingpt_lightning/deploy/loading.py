"""The model that a command's options name, with its adapter or a bank of them."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fingpt_lightning.deploy.adapter_bank import AdapterBank
from fingpt_lightning.models.device import find_device
from fingpt_lightning.models.formats.peft_adapter import trained_quantization
from fingpt_lightning.models.formats.tokenizer import (
    stored_chat_template,
    tokenizer_of_checkpoint,
    use_chat_template,
)
from fingpt_lightning.models.loading import AUTO, NONE, LoadedModel, build_model
from fingpt_lightning.models.sources import find_adapter, resolve_source
from fingpt_lightning.tasks.chat import choose_chat_template


class ReadyModel(NamedTuple):
    """A network ready for use; its bank is None where there is no ``--adapters``.

    ``remark`` says which chat template is in use, in which dtype products are and whether weights
    were dequantized, where there is something to tell.
    """

    loaded: LoadedModel
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    bank: AdapterBank | None
    dtype: str = "float32"
    remark: str | None = None


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
    loaded = build_model(
        source,
        dtype=options.dtype,
        device=device,
        quantize=quantize,
        dequantize=options.dequantize,
    )
    network, tokenizer, bank = loaded.network, loaded.require_tokenizer(), None
    if options.adapters:
        bank = AdapterBank(network)
        for name, path in options.adapters.items():
            bank.load(name, find_adapter(path))
    use_template_of_adapters(tokenizer, options)
    remark = choose_chat_template(tokenizer, options.chat_template, options.model, source.base.path)
    lines = [line for line in (remark, *loaded.remarks) if line is not None]
    dtype = str(loaded.network.config.dtype).removeprefix("torch.")
    return ReadyModel(loaded, network, tokenizer, bank, dtype, "\n".join(lines) or None)


def use_template_of_adapters(
    tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace
) -> None:
    """Puts in use the chat template that the adapters of a bank were trained with.

    Args:
        tokenizer: Tokenizer of the base.
        options: Options as in `load_with_adapters`; ``--chat_template`` but auto decides itself.

    Raises:
        ValueError: They were trained with different ones.
    """
    if options.chat_template != AUTO or not options.adapters:
        return
    stored = {name: _template_of(path) for name, path in options.adapters.items()}
    found = {name: template for name, template in stored.items() if template is not None}
    if len(set(found.values())) > 1:
        raise ValueError(
            f"--adapters {', '.join(found)} were trained with different chat templates; name the"
            " one to use by --chat_template"
        )
    for template in found.values():
        use_chat_template(tokenizer, template or None)


def _template_of(path: Path) -> str | None:
    place = find_adapter(path)
    folder = place if place.is_dir() else tokenizer_of_checkpoint(place)
    return None if folder is None else stored_chat_template(folder)


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
            f"--adapters share one base, but theirs were quantized otherwise ({listed}): choose"
            " one by --quantize"
        )
    return next(iter(found.values()))
