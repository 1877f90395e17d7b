from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.low_rank import LowRankLinear, RankRule
from fingpt_lightning.models import GPT2Shape, build_network
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.models.quantization.layers import quantized_layer
from fingpt_lightning.profiling import LiveTensorBytes, module_memory
from tests.models.tiny_models import ids, save, save_low_rank, tiny_gpt2, tiny_llama

# Errors of random weights: half the widest step of the 16 levels, and of 254.
RELATIVE_ERROR = {"nf4": 0.13, "int8": 0.02}
CPU = torch.device("cpu")


def _layers() -> list[nn.Module]:
    torch.manual_seed(1)
    conv = Conv1D(96, 64)
    nn.init.normal_(conv.bias)
    return [nn.Linear(64, 96), nn.Linear(64, 96, bias=False), conv, LowRankLinear(64, 96, 32)]


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("layer", _layers(), ids=lambda layer: type(layer).__name__)
def test_a_quantised_layer_is_the_same_map_and_frozen(layer: nn.Module, quantize: str) -> None:
    x = torch.randn(5, 64)
    made = quantized_layer(layer, quantize, CPU)
    expected = layer(x)
    error = (made(x) - expected).norm() / expected.norm()
    pairs = 2 if isinstance(layer, LowRankLinear) else 1
    assert error < RELATIVE_ERROR[quantize] * pairs
    assert error > RELATIVE_ERROR[quantize] / 100
    weights = {name for name, p in made.named_parameters() if p.requires_grad}
    assert all(name.endswith("bias") for name in weights)
    assert module_memory(made).weights < module_memory(layer).weights / 3.5 + 96 * 4


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_the_linear_layers_of_the_blocks_are_quantised_and_no_other(
    tmp_path: Path, make: Callable[[], PreTrainedModel], quantize: str
) -> None:
    network = make()
    loaded = load_model(save(network, tmp_path, "20KB"), quantize=quantize)
    dense = {
        name for name, module in network.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name != "lm_head"
    }  # fmt: skip
    stored = {"nf4": torch.uint8, "int8": torch.int8}[quantize]
    quantised = {
        name.removesuffix(".weight")
        for name, parameter in loaded.network.named_parameters()
        if parameter.dtype == stored
    }
    assert quantised == dense
    assert loaded.description.endswith(f"{network.config.model_type}, {quantize})")
    logits, expected = loaded.network(ids()).logits, network(ids()).logits
    assert (logits - expected).norm() / expected.norm() < 4 * RELATIVE_ERROR[quantize]


def test_a_low_rank_network_is_quantised_pair_by_pair(tmp_path: Path) -> None:
    shape = GPT2Shape(num_layers=1, width=64, num_heads=2, num_positions=11)
    network = build_network(shape, 23, RankRule(16), embedding_rank=8, seed=1).eval()
    save_low_rank(network, tmp_path)
    loaded = load_model(tmp_path, quantize="nf4").network
    names = dict(loaded.named_parameters())
    assert names["transformer.h.0.mlp.c_fc.down.weight"].dtype == torch.uint8
    assert names["transformer.wte.table"].dtype == torch.float32
    logits, expected = loaded(ids()).logits, network(ids()).logits
    assert (logits - expected).norm() / expected.norm() < 0.2


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_gradients_flow_through_also_after_an_evaluation(tmp_path: Path, quantize: str) -> None:
    dense = tiny_llama()
    quantised = load_model(save(dense, tmp_path), quantize=quantize).network

    def gradient(network: PreTrainedModel) -> torch.Tensor:
        embedded = network.get_input_embeddings()(ids()).detach().requires_grad_()
        network.train()(inputs_embeds=embedded).logits.square().sum().backward()
        assert isinstance(embedded.grad, torch.Tensor)
        return embedded.grad

    before, expected = gradient(quantised), gradient(dense)
    assert (before - expected).norm() / expected.norm() < 8 * RELATIVE_ERROR[quantize]
    with torch.no_grad():
        quantised.eval()(ids())
    assert torch.equal(gradient(quantised), before)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_at_most_one_layer_is_dense_while_loading(tmp_path: Path, quantize: str) -> None:
    network = tiny_llama()
    save(network, tmp_path)
    load_model(tmp_path, quantize=quantize)  # imports, and their tensors
    with LiveTensorBytes() as count:
        loaded = load_model(tmp_path, quantize=quantize)
    dense_layers = [m.weight.nbytes for m in network.modules() if isinstance(m, nn.Linear)]
    assert count.peak_bytes < count.live_bytes + 3 * max(dense_layers)
    assert count.live_bytes + 3 * max(dense_layers) < module_memory(network).weights
    assert loaded.network.config.dtype == torch.float32
