"""Networks without some of their blocks: the same as the whole one with those passed over."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fingpt_lightning.models.block_calls import blocks_of
from fingpt_lightning.models.depth import blocks_to_drop, drop_blocks, num_trials
from tests.models.tiny_models import TINY, ids


@contextmanager
def _passed_over(network: PreTrainedModel, indices: Collection[int]) -> Iterator[None]:
    """Blocks run, and then their output is replaced by their input."""
    _, blocks = blocks_of(network)

    def replaced(_: object, args: tuple[Tensor, ...], kwargs: object, out: object) -> object:
        return (args[0], *out[1:]) if isinstance(out, tuple) else args[0]

    hooks = [blocks[i].register_forward_hook(replaced, with_kwargs=True) for i in indices]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _deep(num_blocks: int = 5) -> PreTrainedModel:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=num_blocks,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.4,
    )  # fmt: skip
    network: PreTrainedModel = LlamaForCausalLM(config).eval()
    return network


@torch.no_grad()
def _loss(network: PreTrainedModel, tokens: Tensor) -> float:
    logits = network(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    return float(functional.cross_entropy(logits, tokens[:, 1:].flatten()))


@pytest.mark.parametrize("family", sorted(TINY))
@pytest.mark.parametrize("dropped", [0, 1])
def test_a_shorter_network_is_the_whole_one_with_a_block_passed_over(
    family: str, dropped: int
) -> None:
    network, tokens = TINY[family](), ids()
    with torch.no_grad(), _passed_over(network, [dropped]):
        expected = network(input_ids=tokens).logits
    drop_blocks(network, [dropped])
    assert network.config.num_hidden_layers == 1
    with torch.no_grad():
        torch.testing.assert_close(network(input_ids=tokens).logits, expected)
        again: Any = type(network)(type(network.config).from_dict(network.config.to_dict()))
        again.eval()
        again.load_state_dict(network.state_dict())
        torch.testing.assert_close(again(input_ids=tokens).logits, expected)
        whole = network(input_ids=tokens, use_cache=True)  # keys under the new numbers
        begun = network(input_ids=tokens[:, :-1], use_cache=True)
        ended = network(input_ids=tokens[:, -1:], past_key_values=begun.past_key_values)
    torch.testing.assert_close(ended.logits[:, -1], whole.logits[:, -1], rtol=1e-4, atol=1e-4)


def test_the_choice_is_that_of_trying_each_block() -> None:
    network = _deep()
    tokens = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(0))
    kept = list(range(5))
    for _ in range(2):
        losses = {}
        for index in kept:
            with _passed_over(network, {*range(5)} - {*kept} | {index}):
                losses[index] = _loss(network, tokens)
        kept.remove(min(losses, key=lambda index: losses[index]))
    shown: list[int] = []
    chosen = blocks_to_drop(network, tokens, 2, show=shown.append)
    assert chosen == sorted({*range(5)} - {*kept})
    assert shown == [*range(1, num_trials(5, 2) + 1)]
    assert network.config.num_hidden_layers == len(blocks_of(network)[1]) == 5, "it stays as it is"


@pytest.mark.parametrize("number", [-1, 5])
def test_a_number_of_blocks_that_cannot_be_dropped_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=rf"drop_blocks {number} of 5 blocks is outside \[0, 4\]"):
        blocks_to_drop(_deep(), torch.zeros(1, 4, dtype=torch.long), number)


def test_blocks_that_all_make_nan_are_named() -> None:
    network = _deep(2)
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss on the calibration text is not finite"):
        blocks_to_drop(network, torch.zeros(1, 4, dtype=torch.long), 1)
