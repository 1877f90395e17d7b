"""GPT-2's fused query, key and value with a rank and a ``down`` each, in every use of a network."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.low_rank import LowRankLinear, RankRule
from fingpt_lightning.low_rank.split import SplitLinear
from fingpt_lightning.models import GPT2Shape, block_layers, build_network, model_budget
from fingpt_lightning.models.decoding import decode
from fingpt_lightning.models.formats.hf_folder import write_network
from fingpt_lightning.models.from_scratch import check_ranks, rank_ratio_of
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.models.recompute import Recompute, recompute_blocks
from fingpt_lightning.modules import LowRankPretraining
from tests.deploy.tiny_clients import save_clients
from tests.evaluation.tiny_language import tiny_tokenizer

SHAPE = GPT2Shape(num_layers=2, width=36, num_heads=3, num_positions=64)
RANKS = RankRule(5, {"*.c_attn.[qk]": 2, "*.c_attn.v": 7, "*.h.1.attn.c_attn.k": None})
PROMPTS = [[5, 60, 7], [200, 31, 4, 99, 8]]


def _network() -> PreTrainedModel:
    network = build_network(SHAPE, len(tiny_tokenizer()), RANKS, embedding_rank=9, seed=1).double()
    with torch.no_grad():
        for p in network.parameters():  # biases and norms too
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    network.eval()
    return network


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "split"
    place.mkdir()
    write_network(_network(), place, torch.float64)
    tiny_tokenizer().save_pretrained(place)
    return place


def _logits(network: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = network(torch.tensor(PROMPTS[1])[None]).logits
    return logits


def test_each_part_has_its_rank_and_is_the_part_of_the_fused_layer() -> None:
    network = _network()
    layers = [network.get_submodule(f"transformer.h.{block}.attn.c_attn") for block in (0, 1)]
    assert all(isinstance(layer, SplitLinear) for layer in layers)
    ranks = [getattr(part, "rank", None) for layer in layers for _, part in layer.named_children()]
    assert ranks == [2, 2, 7, 2, None, 7]
    x = torch.randn(3, 36, dtype=torch.float64)
    parts = dict(layers[1].named_children())
    q, k, v = layers[1](x).chunk(3, -1)
    low, dense = parts["q"], parts["k"]
    assert isinstance(low, LowRankLinear)
    assert isinstance(dense, Conv1D)
    torch.testing.assert_close(q, x @ low.product().T + low.get_parameter("bias"))
    torch.testing.assert_close(k, x @ dense.weight + dense.bias)
    assert not torch.equal(q, v)


def test_the_budget_counts_the_parts() -> None:
    network = _network()
    budget = model_budget(network, 64)
    stored = sum(p.numel() for p in network.parameters())
    vocabulary = network.config.vocab_size
    dense = sum(p.numel() for p in build_network(SHAPE, vocabulary).parameters())
    assert (budget.total_parameters, budget.dense_total_parameters) == (stored, dense)
    ranks = {layer.name: layer.rank for layer in budget.layers}
    assert ranks["transformer.h.0.attn.c_attn.v"] == 7


def test_a_pattern_that_fits_the_whole_layer_too_splits_nothing() -> None:
    whole = {"transformer.h.0.attn.c_attn": (36, 108)}
    for overrides in ({}, {"*.attn.*": 3}, {"*": 3}, {"*.c_attn": 3}):
        assert whole.items() <= block_layers(SHAPE, RankRule(5, overrides)).items(), overrides
    parts = {f"transformer.h.0.attn.c_attn.{part}": (36, 36) for part in "qkv"}
    assert parts.items() <= block_layers(SHAPE, RANKS).items()


def test_a_pattern_for_the_whole_of_a_split_layer_is_refused() -> None:
    rule = RankRule(5, {"*.c_attn.q": 2, "*.c_attn": 3})
    with pytest.raises(ValueError, match=r"'\*\.c_attn' fits no layer; layers are named like .*q,"):
        check_ranks(SHAPE, rule, None)


def test_a_compression_is_reached_beside_ranks_of_parts() -> None:
    overrides = {"*.c_attn.[qk]": 2}
    ratio = rank_ratio_of(2.0, SHAPE, 260, overrides, 9)
    network = build_network(SHAPE, 260, RankRule(ratio, overrides), 9)
    budget = model_budget(network, 64)
    assert budget.dense_total_parameters / budget.total_parameters == pytest.approx(2.0, rel=0.05)


def test_recomputing_gives_the_gradients_of_plain_training() -> None:
    gradients = []
    for recompute in (Recompute.NONE, Recompute.LOW_RANK):
        network = _network().train()
        recompute_blocks(network, recompute)
        ids = torch.tensor(PROMPTS[1])[None]
        network(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in network.parameters()])
    for ours, truth in zip(*gradients, strict=True):
        assert torch.equal(ours, truth)


def test_it_is_read_decoded_and_exported_as_the_network_it_is(folder: Path, tmp_path: Path) -> None:
    truth = _logits(_network())
    source = load_model(folder, dtype="float64")
    torch.testing.assert_close(_logits(source.network), truth, rtol=0, atol=1e-12)
    ours = decode(source.network, PROMPTS, 20)
    export(source, "hf", tmp_path / "hf", "float64")
    dense: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)
    assert type(dense.transformer.h[0].attn.c_attn) is Conv1D
    assert "split" not in (tmp_path / "hf" / "config.json").read_text(encoding="utf-8")
    torch.testing.assert_close(_logits(dense), truth, rtol=0, atol=1e-10)
    for prompt, own in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        whole = dense.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert whole[0, len(prompt) :].tolist() == own


@pytest.mark.parametrize("form", ["low_rank", "gguf", "int8", "nf4"])
def test_every_format_is_read_again(form: str, folder: Path, tmp_path: Path) -> None:
    made = export(load_model(folder), form, tmp_path / "out")
    assert made.differences
    again = load_model(
        tmp_path / "out" if form != "gguf" else next((tmp_path / "out").glob("*.gguf"))
    )
    ours, truth = _logits(again.network).double(), _logits(_network())
    bound = {"int8": 0.1, "nf4": 0.5}.get(form, 1e-4)
    assert (ours - truth).norm() < bound * truth.norm()


def test_adapters_are_trained_merged_and_kept_beside_its_parts(
    folder: Path, tmp_path: Path
) -> None:
    for index, client in enumerate(save_clients(folder, tmp_path / "clients", 3)):
        adapted = load_model(folder, dtype="float64", adapter=client)
        truth = _logits(adapted.network)
        for form in ("merged", "low_rank", "hf"):
            place = tmp_path / f"{form}{index}"
            export(load_model(folder, dtype="float64", adapter=client), form, place, "float64")
            merged = load_model(place, dtype="float64").network
            torch.testing.assert_close(_logits(merged), truth, rtol=0, atol=1e-8)


def test_a_run_goes_on_from_a_network_with_split_layers(folder: Path) -> None:
    module = LowRankPretraining(init_from=str(folder))
    module.configure_model()
    torch.testing.assert_close(
        _logits(module.network.double()), _logits(_network()), atol=1e-4, rtol=0
    )
    assert module.budget(64).total_parameters == sum(p.numel() for p in _network().parameters())


def test_parts_are_modules_that_a_walk_finds() -> None:
    layer = SplitLinear({"a": nn.Linear(3, 2), "b": LowRankLinear(3, 5, 1)})
    assert [name for name, _ in layer.named_modules()] == ["", "a", "b"]
    assert layer(torch.randn(4, 3)).shape == (4, 7)
