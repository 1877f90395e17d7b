"""A factorized head with a map of its own beside the table that it shares with the embedding."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import fingpt_lightning  # noqa: F401, teaches transformers to read our folders
from fingpt_lightning.low_rank import RankRule
from fingpt_lightning.low_rank.embedding import OwnLowRankHead
from fingpt_lightning.low_rank.parameters import parameter_counts
from fingpt_lightning.models import GPT2Shape, build_network, model_budget, vocabulary_loss
from fingpt_lightning.models.expansion import dequantize, expand
from fingpt_lightning.models.families import head_of
from fingpt_lightning.models.formats.hf_folder import write_network, write_quantized
from fingpt_lightning.models.from_scratch import rank_ratio_of
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.models.quantization.quantized_embedding import QuantizedHead
from fingpt_lightning.modules import LowRankPretraining

SHAPE = GPT2Shape(num_layers=2, width=12, num_heads=3, num_positions=11)
VOCABULARY = 23
RANK = 5
OWN: dict[str, Any] = {"preset": "gpt2-nano", "embedding_rank": 8, "head_map": "own"}


def _ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))


def _network(*, is_own: bool = True) -> PreTrainedModel:
    network = build_network(SHAPE, VOCABULARY, RankRule(3), RANK, seed=1, has_own_head_map=is_own)
    network.eval()
    return network


@pytest.fixture
def trained() -> PreTrainedModel:
    """A network whose maps differ, as after some steps."""
    network = _network()
    with torch.no_grad():
        head_of(network).get_parameter("up").normal_(generator=torch.Generator().manual_seed(2))
    return network


def _shares(network: PreTrainedModel) -> bool:
    embedding, head = network.get_input_embeddings(), head_of(network)
    assert isinstance(head, OwnLowRankHead)
    is_one_map = head.up is embedding.get_parameter("up")
    return head.table is embedding.get_parameter("table") and not is_one_map


def test_it_starts_as_a_head_with_the_embeddings_map() -> None:
    own, shared = _network(), _network(is_own=False)
    assert _shares(own)
    assert torch.equal(own(_ids()).logits, shared(_ids()).logits)
    names = {name for name, _ in own.named_parameters()}
    assert names == {name for name, _ in shared.named_parameters()} | {"lm_head.up"}


def test_the_loss_moves_both_maps_and_the_one_table(trained: PreTrainedModel) -> None:
    network = copy.deepcopy(trained).double()
    hidden = network.base_model(_ids(), use_cache=False).last_hidden_state
    vocabulary_loss(head_of(network), hidden, _ids(), 4).loss_sum.backward()
    plain = copy.deepcopy(trained).double()
    expand(plain)
    embedding, head = plain.get_input_embeddings(), head_of(plain)
    for module in (embedding, head):
        module.requires_grad_(True)
    hidden = plain.base_model(_ids(), use_cache=False).last_hidden_state
    vocabulary_loss(head, hidden, _ids(), 4).loss_sum.backward()
    of_input, of_output = embedding.get_parameter("weight").grad, head.get_parameter("weight").grad
    assert of_input is not None
    assert of_output is not None
    ours: Any = network.get_input_embeddings()
    table, maps = ours.table.detach(), (ours.up.detach(), head_of(network).get_parameter("up"))
    torch.testing.assert_close(ours.table.grad, of_input @ maps[0] + of_output @ maps[1].detach())
    torch.testing.assert_close(ours.up.grad, of_input.T @ table)
    torch.testing.assert_close(maps[1].grad, of_output.T @ table)


def test_a_saved_network_is_the_same_and_has_each_parameter_once(
    trained: PreTrainedModel, tmp_path: Path
) -> None:
    write_network(trained, tmp_path, torch.float32)
    logits = trained(_ids()).logits
    for again in (load_model(tmp_path).network, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert _shares(again)
        assert torch.equal(again.eval()(_ids()).logits, logits)
    folder = tmp_path / "theirs"
    trained.save_pretrained(folder)
    assert torch.equal(load_model(folder).network(_ids()).logits, logits)


def test_it_expands_to_a_head_that_is_not_tied(trained: PreTrainedModel, tmp_path: Path) -> None:
    logits = trained(_ids()).logits
    expand(trained)
    torch.testing.assert_close(trained(_ids()).logits, logits)
    write_network(trained, tmp_path, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(_ids()).logits, logits)


@pytest.mark.parametrize("method", ["nf4", "int8"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_a_quantized_one_keeps_its_map(
    trained: PreTrainedModel, method: str, embeddings: bool, tmp_path: Path
) -> None:
    up = head_of(trained).get_parameter("up").detach().clone()
    write_quantized(trained, tmp_path, torch.float32, method, embeddings=embeddings)
    logits = trained(_ids()).logits
    again = load_model(tmp_path).network
    assert isinstance(head_of(again), QuantizedHead if embeddings else OwnLowRankHead)
    assert torch.equal(head_of(again).get_parameter("up"), up)
    torch.testing.assert_close(again(_ids()).logits, logits)
    dequantize(again)
    assert _shares(again)
    torch.testing.assert_close(again(_ids()).logits, logits)


def test_the_budget_counts_the_map_once_and_the_table_with_the_embedding() -> None:
    own, shared = _network(), _network(is_own=False)
    ours, theirs = model_budget(own, 11), model_budget(shared, 11)
    assert ours.total_parameters == theirs.total_parameters + RANK * SHAPE.width
    assert ours.dense_total_parameters == theirs.dense_total_parameters
    assert ours.forward_flops_per_token == theirs.forward_flops_per_token
    assert parameter_counts(own) == (ours.total_parameters, ours.dense_total_parameters)


def test_a_total_compression_counts_the_map() -> None:
    ratios = [
        rank_ratio_of(1.5, SHAPE, VOCABULARY, None, RANK, has_own_head_map=is_own)
        for is_own in (False, True)
    ]
    assert ratios[1] < ratios[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embedding_rank": None}, "head_map own is about a factorized embedding: set embeddi"),
        ({"preset": "llama-60m"}, "head_map own: the head of this architecture is not tied"),
        (
            {"optimizer": "spectron", "embedding_optimizer": "same"},
            "embedding_optimizer same moves pairs of factors, and with head_map own two",
        ),
    ],
)
def test_what_it_does_not_fit_is_named(settings: dict[str, Any], message: str) -> None:
    chosen: dict[str, Any] = OWN | settings
    with pytest.raises(ValueError, match=message):
        LowRankPretraining(**chosen)


def test_a_run_that_goes_on_from_one_does_not_move_its_pairs(
    trained: PreTrainedModel, tmp_path: Path
) -> None:
    write_network(trained, tmp_path, torch.float32)
    module = LowRankPretraining(
        init_from=str(tmp_path), optimizer="spectron", embedding_optimizer="same"
    )
    with pytest.raises(ValueError, match="embedding_optimizer same moves pairs of factors, and"):
        module.configure_model()
