import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel

from fingpt_lightning.low_rank import LowRankEmbedding, LowRankLinear, RankRule
from fingpt_lightning.models import (
    PRESETS,
    GPT2Shape,
    build_gpt2,
    lay_out_gpt2,
    model_budget,
    recompute_blocks,
)
from fingpt_lightning.models.gpt2 import preset_shape

TINY = GPT2Shape(num_layers=2, width=12, num_heads=3, num_positions=11)
VOCABULARY = 23


def _ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))


def test_the_dense_baseline_is_transformers_own_network() -> None:
    network = build_gpt2(TINY, VOCABULARY, seed=1)
    theirs = GPT2LMHeadModel(network.config).eval()
    theirs.load_state_dict(network.state_dict())
    torch.testing.assert_close(network.eval()(_ids()).logits, theirs(_ids()).logits)


def test_full_rank_pairs_give_the_dense_logits_and_gradients() -> None:
    dense = build_gpt2(TINY, VOCABULARY, seed=1).double()
    pairs = build_gpt2(TINY, VOCABULARY, seed=1).double()
    for name, layer in list(pairs.named_modules()):
        if name.rpartition(".")[2] in ("c_attn", "c_proj", "c_fc"):
            weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
            rank = min(weight.shape)
            pairs.set_submodule(name, LowRankLinear.from_dense(weight.T, bias, rank))
    losses = [network(_ids(), labels=_ids()).loss for network in (dense, pairs)]
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-12)
    gradients = []
    for network, loss in zip((dense, pairs), losses, strict=True):
        loss.backward()
        gradients.append(network.get_parameter("transformer.wpe.weight").grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-10)


def test_every_linear_of_the_blocks_is_a_pair_and_the_embedding_is_tied() -> None:
    network = build_gpt2(TINY, VOCABULARY, RankRule(3), embedding_rank=4)
    pairs = [m for m in network.modules() if isinstance(m, LowRankLinear)]
    assert [pair.rank for pair in pairs] == [3] * 8
    embedding = network.get_submodule("transformer.wte")
    assert isinstance(embedding, LowRankEmbedding)
    assert network.get_parameter("lm_head.table") is embedding.table
    logits = network(_ids()).logits
    assert logits.shape == (2, 11, VOCABULARY)


def test_the_seed_and_the_name_alone_decide_a_layers_weights() -> None:
    whole = build_gpt2(TINY, VOCABULARY, RankRule(3), seed=4)
    shorter = build_gpt2(GPT2Shape(1, 12, 3, 11), VOCABULARY, RankRule(3), seed=4)
    name = "transformer.h.0.attn.c_attn.up"
    assert torch.equal(whole.get_parameter(name), shorter.get_parameter(name))
    other = build_gpt2(TINY, VOCABULARY, RankRule(3), seed=5)
    assert not torch.equal(whole.get_parameter(name), other.get_parameter(name))


def test_initial_weights_have_the_spread_of_gpt2() -> None:
    shape = GPT2Shape(num_layers=2, width=64, num_heads=4, num_positions=64)
    network = build_gpt2(shape, 500, seed=1)
    into_residual = network.get_parameter("transformer.h.0.mlp.c_proj.weight")
    assert into_residual.std().item() == pytest.approx(0.02 / 4**0.5, rel=0.05)
    assert network.get_parameter("transformer.wte.weight").std().item() == pytest.approx(0.02, 0.05)
    assert network.get_parameter("transformer.h.1.ln_1.weight").eq(1).all()


def test_recomputing_blocks_gives_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        network = build_gpt2(TINY, VOCABULARY, RankRule(3), embedding_rank=4, seed=2).double()
        if recompute:
            recompute_blocks(network)
        network.train()(_ids(), labels=_ids()).loss.backward()
        gradients.append([p.grad for p in network.parameters()])
    assert gradients[0]
    for recomputed, kept in zip(*reversed(gradients), strict=True):
        assert torch.equal(nn.Parameter(recomputed), nn.Parameter(kept))


def test_gpt2_small_at_rank_224_is_2_6_times_smaller_in_total() -> None:
    network = lay_out_gpt2(PRESETS["gpt2-small"], 50257, RankRule(224), embedding_rank=256)
    assert all(p.is_meta for p in network.parameters())
    budget = model_budget(network, sequence_length=1024)
    assert budget.dense_total_parameters == 124_439_808
    assert budget.total_compression_ratio >= 2.6
    assert budget.block_compression_ratio >= 2.5


@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_twin_in_the_budget_is_the_network_without_ranks(preset: str) -> None:
    shape = PRESETS[preset]
    low_rank = model_budget(lay_out_gpt2(shape, 50257, RankRule(0.25), embedding_rank=0.25), 128)
    dense = model_budget(lay_out_gpt2(shape, 50257), 128)
    assert low_rank.dense_total_parameters == dense.total_parameters
    assert low_rank.dense_block_parameters == dense.block_parameters
    assert low_rank.dense_forward_flops_per_token == dense.forward_flops_per_token
    assert dense.total_compression_ratio == 1


def test_linear_layers_hold_99_percent_of_the_xl_network_and_take_80_percent_of_its_time() -> None:
    budget = model_budget(lay_out_gpt2(PRESETS["gpt2-xl"], 50257), sequence_length=1024)
    assert budget.total_parameters == 1_557_611_200
    assert budget.linear_parameter_share > 0.99
    assert budget.linear_flop_share > 0.80


def test_flops_are_those_counted_by_hand() -> None:
    network = lay_out_gpt2(TINY, VOCABULARY, RankRule(3), embedding_rank=4)
    budget = model_budget(network, sequence_length=10)
    layers = 3 * (12 + 36) + 3 * (12 + 12) + 2 * 3 * (12 + 48)
    head = 4 * (12 + VOCABULARY) + 4 * 12
    assert budget.forward_flops_per_token == 2 * (2 * layers + head) + 2 * 4 * 10 * 12


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean gpt2-medium"):
        preset_shape("gpt2-medum")


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="width 10 is no multiple of num_heads 3"):
        GPT2Shape(num_layers=1, width=10, num_heads=3)
