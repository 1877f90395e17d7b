import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fingpt_lightning.low_rank import LowRankEmbedding, LowRankLinear, RankRule
from fingpt_lightning.low_rank.embedding import OwnLowRankHead
from fingpt_lightning.models import (
    PRESETS,
    GPT2Shape,
    LlamaShape,
    block_layers,
    build_network,
    lay_out_network,
    model_budget,
    recompute_blocks,
    vocabulary_loss,
)
from fingpt_lightning.models.expansion import expand
from fingpt_lightning.models.families import FAMILIES, head_of
from fingpt_lightning.models.formats.hf_folder import write_network
from fingpt_lightning.models.from_scratch import (
    check_ranks,
    narrow_shape,
    rank_ratio_of,
    same_size_dense,
)
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.models.shapes import (
    LLAMA_PRESETS,
    AnyShape,
    StoredShape,
    of_width,
    preset_shape,
    resized,
    stored_shape,
)
from tests.models.tiny_models import TINY as TINY_NETWORKS

TINY = GPT2Shape(num_layers=2, width=12, num_heads=3, num_positions=11)
VOCABULARY = 23


def _ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))


def test_the_dense_baseline_is_transformers_own_network() -> None:
    network = build_network(TINY, VOCABULARY, seed=1)
    config = network.config
    assert isinstance(config, GPT2Config)
    theirs = GPT2LMHeadModel(config).eval()
    theirs.load_state_dict(network.state_dict())
    torch.testing.assert_close(network.eval()(_ids()).logits, theirs(_ids()).logits)


def test_full_rank_pairs_give_the_dense_logits_and_gradients() -> None:
    dense = build_network(TINY, VOCABULARY, seed=1).double()
    pairs = build_network(TINY, VOCABULARY, seed=1).double()
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
    network = build_network(TINY, VOCABULARY, RankRule(3), embedding_rank=4)
    pairs = [m for m in network.modules() if isinstance(m, LowRankLinear)]
    assert [pair.rank for pair in pairs] == [3] * 8
    embedding = network.get_submodule("transformer.wte")
    assert isinstance(embedding, LowRankEmbedding)
    assert network.get_parameter("lm_head.table") is embedding.table
    logits = network(_ids()).logits
    assert logits.shape == (2, 11, VOCABULARY)


def test_the_seed_and_the_name_alone_decide_a_layers_weights() -> None:
    whole = build_network(TINY, VOCABULARY, RankRule(3), seed=4)
    shorter = build_network(GPT2Shape(1, 12, 3, 11), VOCABULARY, RankRule(3), seed=4)
    name = "transformer.h.0.attn.c_attn.up"
    assert torch.equal(whole.get_parameter(name), shorter.get_parameter(name))
    other = build_network(TINY, VOCABULARY, RankRule(3), seed=5)
    assert not torch.equal(whole.get_parameter(name), other.get_parameter(name))


def test_initial_weights_have_the_spread_of_gpt2() -> None:
    shape = GPT2Shape(num_layers=2, width=64, num_heads=4, num_positions=64)
    network = build_network(shape, 500, seed=1)
    into_residual = network.get_parameter("transformer.h.0.mlp.c_proj.weight")
    assert into_residual.std().item() == pytest.approx(0.02 / 4**0.5, rel=0.05)
    assert network.get_parameter("transformer.wte.weight").std().item() == pytest.approx(0.02, 0.05)
    assert network.get_parameter("transformer.h.1.ln_1.weight").eq(1).all()


def test_recomputing_blocks_gives_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        network = build_network(TINY, VOCABULARY, RankRule(3), embedding_rank=4, seed=2).double()
        if recompute:
            recompute_blocks(network)
        network.train()(_ids(), labels=_ids()).loss.backward()
        gradients.append([p.grad for p in network.parameters()])
    assert gradients[0]
    for recomputed, kept in zip(*reversed(gradients), strict=True):
        assert torch.equal(nn.Parameter(recomputed), nn.Parameter(kept))


def test_gpt2_small_at_rank_224_is_2_6_times_smaller_in_total() -> None:
    network = lay_out_network(PRESETS["gpt2-small"], 50257, RankRule(224), embedding_rank=256)
    assert all(p.is_meta for p in network.parameters())
    budget = model_budget(network, sequence_length=1024)
    assert budget.dense_total_parameters == 124_439_808
    assert budget.total_compression_ratio >= 2.6
    assert budget.block_compression_ratio >= 2.5


@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_twin_in_the_budget_is_the_network_without_ranks(preset: str) -> None:
    shape = PRESETS[preset]
    low_rank = model_budget(lay_out_network(shape, 50257, RankRule(0.25), embedding_rank=0.25), 128)
    dense = model_budget(lay_out_network(shape, 50257), 128)
    assert low_rank.dense_total_parameters == dense.total_parameters
    assert low_rank.dense_block_parameters == dense.block_parameters
    assert low_rank.dense_forward_flops_per_token == dense.forward_flops_per_token
    assert dense.total_compression_ratio == 1


def test_linear_layers_hold_99_percent_of_the_xl_network_and_take_80_percent_of_its_time() -> None:
    budget = model_budget(lay_out_network(PRESETS["gpt2-xl"], 50257), sequence_length=1024)
    assert budget.total_parameters == 1_557_611_200
    assert budget.linear_parameter_share > 0.99
    assert budget.linear_flop_share > 0.80


def test_flops_are_those_counted_by_hand() -> None:
    network = lay_out_network(TINY, VOCABULARY, RankRule(3), embedding_rank=4)
    budget = model_budget(network, sequence_length=10)
    layers = 3 * (12 + 36) + 3 * (12 + 12) + 2 * 3 * (12 + 48)
    head = 4 * (12 + VOCABULARY) + 4 * 12
    assert budget.forward_flops_per_token == 2 * (2 * layers + head) + 2 * 4 * 10 * 12


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean gpt2-medium"):
        preset_shape("gpt2-medum")


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="width 10 is not a multiple of num_heads 3"):
        GPT2Shape(num_layers=1, width=10, num_heads=3)


LLAMA = LlamaShape(num_layers=2, width=12, num_heads=3, mlp_width=20, num_positions=11)


def _written(folder: Path, model_type: str, **changes: Any) -> StoredShape:
    """A shape of another family, from its tiny config."""
    config = TINY_NETWORKS[model_type]().config.to_diff_dict() | changes
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    return stored_shape(str(folder))


def test_a_dense_llama_is_transformers_own_network() -> None:
    network = build_network(LLAMA, VOCABULARY, seed=1)
    config = LLAMA.config(VOCABULARY)
    assert isinstance(config, LlamaConfig)
    theirs = LlamaForCausalLM(config).eval()
    theirs.load_state_dict(network.state_dict())
    torch.testing.assert_close(network.eval()(_ids()).logits, theirs(_ids()).logits)
    assert not network.config.tie_word_embeddings


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_network_of_any_family_is_made_low_rank_and_comes_back_from_a_checkpoint_and_a_folder(
    model_type: str, tmp_path: Path
) -> None:
    family = FAMILIES[model_type]
    shape = _written(tmp_path, model_type)
    embedding_rank = None if family.scaled_embedding else 7
    network = build_network(shape, VOCABULARY, RankRule(3), embedding_rank, seed=1)
    layers = {name: m for name, m in network.named_modules() if isinstance(m, LowRankLinear)}
    assert set(layers) == set(block_layers(shape))
    assert {layer.rank for layer in layers.values()} == {3}
    logits = network.eval()(_ids()).logits
    assert logits.isfinite().all()
    folder = tmp_path / "saved"
    folder.mkdir()
    write_network(network, folder, torch.float32)
    again = load_model(folder).network
    torch.testing.assert_close(again(_ids()).logits, logits)
    expand(again)
    torch.testing.assert_close(again(_ids()).logits, logits)
    kinds = {type(m) for m in again.modules()}
    assert not kinds & {LowRankLinear, LowRankEmbedding, OwnLowRankHead}
    assert type(network.config)(**again.config.to_dict()).tie_word_embeddings == (
        shape.config(VOCABULARY).tie_word_embeddings
    )


def test_an_untied_head_has_factors_of_its_own_and_the_loss_takes_them() -> None:
    network = build_network(LLAMA, VOCABULARY, RankRule(3), embedding_rank=5, seed=1).double()
    head = head_of(network)
    assert isinstance(head, OwnLowRankHead)
    assert head.table is not network.get_parameter("model.embed_tokens.table")
    dense = build_network(LLAMA, VOCABULARY, RankRule(3), embedding_rank=5, seed=1).double()
    expand(dense)
    losses = []
    for one in (network, dense):
        hidden = one.base_model(_ids(), use_cache=False).last_hidden_state
        losses.append(vocabulary_loss(head_of(one), hidden, _ids(), 4).loss_sum)
    torch.testing.assert_close(losses[0], losses[1])
    losses[0].backward()
    assert head.table.grad is not None
    budget = model_budget(network, 11)
    (of_head,) = (layer for layer in budget.layers if layer.name == "lm_head")
    assert (of_head.kind.value, of_head.rank) == ("head", 5)
    assert of_head.dense_parameters == VOCABULARY * 12
    assert budget.dense_total_parameters == sum(
        p.numel() for p in build_network(LLAMA, VOCABULARY, seed=1).parameters()
    )


@pytest.mark.parametrize("preset", list(LLAMA_PRESETS))
def test_a_total_compression_is_met_with_an_untied_head(preset: str) -> None:
    shape = LLAMA_PRESETS[preset]
    ratio = rank_ratio_of(2.5, shape, 32000, embedding_rank=shape.width // 4)
    network = lay_out_network(shape, 32000, RankRule(ratio), embedding_rank=shape.width // 4)
    assert model_budget(network, 128).total_compression_ratio == pytest.approx(2.5, rel=0.01)


def test_presets_of_llamas_have_the_published_sizes() -> None:
    sizes = {
        name: round(sum(p.numel() for p in lay_out_network(shape, 32000).parameters()) / 1e6)
        for name, shape in LLAMA_PRESETS.items()
    }
    assert sizes == {"llama-60m": 58, "llama-130m": 134, "llama-350m": 368, "llama-1b": 1339}


def test_wrong_shapes_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"architecture lama-60m .* did you mean llama-60m"):
        stored_shape("lama-60m")
    with pytest.raises(ValueError, match=r"width 9 over num_heads 3 is odd, and a rotation turns"):
        LlamaShape(num_layers=1, width=9, num_heads=3, mlp_width=4)
    with pytest.raises(
        ValueError, match=r"architecture 'mamba' is not supported; gpt2, llama, mistral"
    ):
        _written(tmp_path, "llama").__class__(tmp_path, '{"model_type": "mamba"}').config(3)
    with pytest.raises(ValueError, match=r"dropout 0.1: a Llama has no dropout; set 0.0"):
        LLAMA.config(VOCABULARY, dropout=0.1)
    with pytest.raises(ValueError, match=r"the embedding of a Gemma 3 is scaled"):
        check_ranks(_written(tmp_path, "gemma3_text"), RankRule(3), 4)


@pytest.mark.parametrize(
    ("preset", "vocab_size", "rank", "embedding_rank"),
    [("gpt2-small", 50257, 224, 256), ("llama-130m", 32000, 208, 256)],
)
def test_the_dense_network_of_the_same_size_is_the_nearest_of_all_widths(
    preset: str, vocab_size: int, rank: int, embedding_rank: int
) -> None:
    shape = PRESETS[preset]
    low_rank = model_budget(lay_out_network(shape, vocab_size, RankRule(rank), embedding_rank), 128)
    found = same_size_dense(shape, vocab_size, low_rank.total_parameters, 128)
    assert found is not None
    assert found.parameters == pytest.approx(low_rank.total_parameters, rel=0.03)
    sizes = {}
    for width in (found.width - 16, found.width, found.width + 16):
        narrow = resized(shape, width=width, num_heads=1)
        network = lay_out_network(narrow, vocab_size)
        sizes[width] = sum(p.numel() for p in network.parameters())
        if width == found.width:
            of_it = model_budget(network, 128)
            assert of_it.total_parameters == found.parameters
            assert of_it.forward_flops_per_token == found.forward_flops_per_token
    distances = {w: abs(n - low_rank.total_parameters) for w, n in sizes.items()}
    assert min(distances, key=lambda width: distances[width]) == found.width


def test_a_network_narrower_than_all_has_no_dense_one_of_its_size() -> None:
    assert same_size_dense(TINY, VOCABULARY, 100, 8) is None


def _stored(**settings: Any) -> StoredShape:
    return StoredShape(Path("config.json"), json.dumps(settings))


NARROWED: dict[str, AnyShape] = {
    "gpt2": GPT2Shape(num_layers=3, width=42, num_heads=3, num_positions=11),
    "llama": LlamaShape(num_layers=3, width=48, num_heads=3, mlp_width=101, num_positions=11),
    "a stored gpt2": _stored(
        model_type="gpt2", n_layer=3, n_embd=42, n_head=3, n_positions=11, n_inner=77
    ),
    "a stored, tied llama": _stored(
        model_type="llama", num_hidden_layers=3, hidden_size=48, intermediate_size=101,
        num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=11,
        tie_word_embeddings=True,
    ),
    "wide heads, windows": _stored(
        model_type="qwen3", num_hidden_layers=3, hidden_size=48, intermediate_size=101,
        num_attention_heads=3, num_key_value_heads=1, head_dim=24, max_position_embeddings=11,
        tie_word_embeddings=True, use_sliding_window=True, sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NARROWED)
@pytest.mark.parametrize("embedding_rank", [0.875, 7])
def test_the_narrow_network_is_the_widest_that_is_small_enough(
    name: str, embedding_rank: int | float
) -> None:
    shape, vocab_size = NARROWED[name], 331
    config = shape.config(vocab_size)
    is_tied = bool(config.tie_word_embeddings)
    dense = sum(p.numel() for p in lay_out_network(shape, vocab_size).parameters())
    stored: dict[int, int] = {}
    step = 3 if config.model_type == "gpt2" else 6
    for width in range(step, config.hidden_size + 1, step):
        if isinstance(embedding_rank, int) and embedding_rank > width:
            continue
        network = lay_out_network(
            of_width(shape, width), vocab_size, None, embedding_rank, has_own_head_map=is_tied
        )
        if isinstance(network.get_input_embeddings(), LowRankEmbedding):
            stored[width] = sum(p.numel() for p in network.parameters())
        assert network.config.hidden_size == width
    assert len(stored) > 4
    for compression in (1.0, 1.5, 2.64, 3.0):
        narrow = narrow_shape(compression, shape, vocab_size, embedding_rank, is_tied)
        fit = [width for width, number in stored.items() if number * compression <= dense]
        assert narrow.config(1).hidden_size == max(fit)
        assert narrow.config(1).num_hidden_layers == 3
        assert narrow.config(1).num_attention_heads == 3
    with pytest.raises(ValueError, match=r"compression 99.0 is out of reach: width \d+, the sma"):
        narrow_shape(99.0, shape, vocab_size, embedding_rank, is_tied)


def test_a_rank_of_one_is_not_the_share_one() -> None:
    shape = NARROWED["gpt2"]
    assert narrow_shape(2.0, shape, 331, 1).config(1).hidden_size == 30
    with pytest.raises(ValueError, match=r"embedding_rank 1\.0 makes the embedding of 331 tokens"):
        narrow_shape(2.0, shape, 331, 1.0)


def test_another_width_keeps_the_proportions_of_a_stored_config() -> None:
    found = of_width(NARROWED["wide heads, windows"], 24).config(1)
    assert (found.hidden_size, found.intermediate_size, found.head_dim) == (24, 50, 12)
    assert found.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    gpt2 = of_width(NARROWED["a stored gpt2"], 21).config(1)
    assert (gpt2.n_embd, gpt2.n_inner) == (21, 38)
    partial = _stored(
        model_type="phi3", rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.75}
    )
    with pytest.raises(ValueError, match="its rotary embedding is laid out for heads of one size"):
        of_width(partial, 32)
