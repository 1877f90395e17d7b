from collections.abc import Callable
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedModel as Network

from fingpt_lightning.low_rank import RankRule
from fingpt_lightning.low_rank.adapters import AdapterOptions, FrozenBase
from fingpt_lightning.models import GPT2Shape, build_network, lay_out_network
from fingpt_lightning.models.adapting import adapt, linear_names
from fingpt_lightning.models.from_scratch import materialize
from fingpt_lightning.models.layout import features_of
from fingpt_lightning.models.quantization.layers import BYTES_PER_NUMBER, quantized_layer
from fingpt_lightning.models.shapes import PRESETS
from fingpt_lightning.pipeline import (
    Span,
    Stage,
    Workload,
    keep_stages,
    network_costs,
    tied_parameters,
)
from fingpt_lightning.pipeline.partition import spans_of
from tests.models.tiny_models import tiny_llama

SHAPE = GPT2Shape(num_layers=5, width=12, num_heads=3, num_positions=16)


def _gpt2() -> Network:
    return build_network(SHAPE, 23, seed=3)


def _low_rank() -> Network:
    return build_network(SHAPE, 23, RankRule(3), embedding_rank=5, seed=3)


def _llama() -> Network:
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=23, hidden_size=12, intermediate_size=20, num_hidden_layers=5,
            num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=16,
            use_cache=False,
        )
    )  # fmt: skip


@pytest.mark.parametrize("build", [_gpt2, _low_rank, _llama])
@pytest.mark.parametrize("sizes", [[5], [2, 3], [1, 1, 3], [1, 1, 1, 1, 1]])
def test_the_stages_in_turn_compute_what_the_network_computes(
    build: Callable[[], Network], sizes: list[int]
) -> None:
    network = build()
    ids = torch.randint(23, (2, 7))
    positions = torch.arange(3, 10).expand(2, 7)
    expected = network.base_model(ids, position_ids=positions).last_hidden_state
    x: Tensor = ids
    for span in spans_of(sizes):
        x = Stage(network, span)(x, positions)
    assert torch.equal(x, expected)
    assert torch.equal(network.base_model(ids, position_ids=positions)[0], expected)


@pytest.mark.parametrize("rank", [None, 3])
def test_a_part_made_alone_equals_that_part_of_the_whole_under_its_full_names(
    rank: int | None,
) -> None:
    rule, embedding_rank = RankRule(rank), None if rank is None else 5
    whole = build_network(SHAPE, 23, rule, embedding_rank, seed=3).state_dict()
    seen: set[str] = set()
    for span in spans_of([2, 1, 2]):
        part = lay_out_network(SHAPE, 23, rule, embedding_rank)
        keep_stages(part, [span])
        assert all(p.is_meta for p in part.parameters())
        materialize(part, seed=3)
        for name, weight in part.state_dict().items():
            assert torch.equal(weight, whole[name]), name
        own = {name for name in part.state_dict() if ".h." in name}
        assert own.isdisjoint(seen)
        seen |= own
        held = {name.split(".")[1] for name in part.state_dict() if "transformer." in name}
        ends = {(True, False): {"wte", "wpe"}, (False, True): {"wte", "ln_f"}}
        assert held - {"h"} == ends.get((span.is_first, span.is_last), set())
        head = part.get_submodule("lm_head")
        for name in tied_parameters(part):
            assert any(part.get_parameter(name) is parameter for parameter in head.parameters())
    assert seen == {name for name in whole if ".h." in name}


def test_the_ends_of_an_untied_network_have_embedding_or_head() -> None:
    for span, missing in ((Span(0, 2, True, False), "head"), (Span(2, 5, False, True), "embed")):
        network = _llama()
        keep_stages(network, [span])
        assert not [name for name, _ in network.named_parameters() if missing in name]
        assert tied_parameters(network) == []


def test_the_costs_add_up_to_the_network() -> None:
    for build in (_gpt2, _low_rank, _llama):
        network = build()
        costs = network_costs(network, 16)
        whole = costs.stage(Span(0, 5, True, True)).parameters
        tied = sum(network.get_parameter(name).numel() for name in tied_parameters(network))
        assert whole == sum(p.numel() for p in network.parameters()) + tied
        sizes = [0, *accumulate([2, 3])]
        halves = [Span(a, b, a == 0, b == 5) for a, b in pairwise(sizes)]
        assert (
            sum(costs.stage(half).flops_per_token for half in halves)
            == costs.stage(Span(0, 5, True, True)).flops_per_token
        )


def test_the_head_of_gpt2_small_costs_as_much_as_five_blocks() -> None:
    costs = network_costs(lay_out_network(PRESETS["gpt2-small"], 50257), 128)
    assert costs.back.flops_per_token / costs.blocks[0].flops_per_token == pytest.approx(
        5.4, abs=0.1
    )


def test_a_frozen_base_counts_the_bytes_it_is_packed_in() -> None:
    """Told beforehand, on the meta device, as measured when it is quantised and adapted."""
    laid_out = tiny_llama()
    names = linear_names(laid_out)
    adapters = {}
    for name in names:
        in_features, out_features = features_of(laid_out.get_submodule(name))
        adapters[name] = 3 * (in_features + out_features)
    told = network_costs(laid_out, 16, FrozenBase(4, BYTES_PER_NUMBER["nf4"], adapters))
    quantised = tiny_llama()
    for name in names:
        layer = quantized_layer(quantised.get_submodule(name), "nf4", torch.device("cpu"))
        quantised.set_submodule(name, layer)
    adapt(quantised, AdapterOptions(3), seed=1)
    seen = network_costs(quantised, 16)
    for ours, truth in zip(told.blocks, seen.blocks, strict=True):
        assert ours.parameters == truth.parameters
        assert ours.frozen_parameters == truth.frozen_parameters
        assert ours.flops_per_token == truth.flops_per_token
        assert ours.frozen_bytes == pytest.approx(truth.frozen_bytes, rel=0.05)  # scales aside
    whole = Span(0, 2, True, True)
    dense = network_costs(tiny_llama(), 16).stage(whole)
    assert told.stage(whole).parameters == dense.parameters + sum(adapters.values())
    held = Workload(8).stage_bytes(told.stage(whole), 0.0)
    assert held == told.stage(whole).frozen_bytes + 16 * sum(adapters.values())
    assert held < Workload(8).stage_bytes(dense, 0.0) / 4


def test_where_only_inputs_are_kept_a_block_holds_its_width() -> None:
    for build in (_gpt2, _llama):
        kept = network_costs(build(), 16, keeps_inputs_alone=True)
        assert {block.activations_per_token for block in kept.blocks} == {12}


def test_a_family_that_cannot_be_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=12, n_head=3, vocab_size=7))
    monkeypatch.setattr(network.config, "model_type", "mamba")
    with pytest.raises(ValueError, match="architecture 'mamba' is not supported; gpt2, llama, "):
        network_costs(network, 16)
