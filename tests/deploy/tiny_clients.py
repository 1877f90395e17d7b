"""Adapters of made-up clients, and a low-rank model with its tokenizer."""

import copy
from pathlib import Path

import torch
from torch import nn

from fingpt_lightning.low_rank.adapters import AdapterOptions
from fingpt_lightning.models.adapting import adapt, adapted_layers, save_adapter
from fingpt_lightning.models.loading import load_model
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer
from tests.models.tiny_models import save_low_rank

KINDS = (
    AdapterOptions(3, 5.0),
    AdapterOptions(4, rslora=True),
    AdapterOptions(2, dora=True),
)


def save_clients(
    base: Path, folder: Path, number: int, quantize: str | None = None, first: int = 0
) -> list[Path]:
    """Folders of adapters for a saved base, of different ranks and kinds in turn."""
    folders = []
    plain = load_model(base, quantize=quantize).network
    for index in range(first, first + number):
        network = copy.deepcopy(plain)
        adapt(network, KINDS[index % len(KINDS)], seed=index)
        torch.manual_seed(index)
        with torch.no_grad():
            for layer in adapted_layers(network).values():
                nn.init.normal_(layer.lora_B, std=0.3)
                if layer.lora_magnitude_vector is not None:
                    layer.lora_magnitude_vector.mul_(1.2)
        folders.append(folder / f"client{index}")
        save_adapter(network, folders[-1], str(base))
    return folders


def save_low_rank_model(folder: Path) -> Path:
    """A low-rank GPT-2 in a Hugging Face folder that `load_model` reads."""
    save_low_rank(tiny_network("low_rank"), folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
