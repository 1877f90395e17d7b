from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from fingpt_lightning.low_rank import RankRule
from fingpt_lightning.models import GPT2Shape, build_network
from fingpt_lightning.models.decode_step import decode_step
from fingpt_lightning.models.decoding import decode, end_tokens_of
from fingpt_lightning.models.key_value_cache import (
    PreallocatedLayer,
    cache_bytes_per_token,
    preallocated_cache,
)
from tests.models.tiny_models import VOCABULARY, tiny_gpt2, tiny_llama


def _low_rank() -> PreTrainedModel:
    network: PreTrainedModel
    shape = GPT2Shape(num_layers=2, width=22, num_heads=2, num_positions=32)
    network = build_network(shape, VOCABULARY, RankRule(5), embedding_rank=11, seed=3).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return network


NETWORKS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "low_rank": _low_rank,
}
PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5], [3]]


def _without_cache(network: PreTrainedModel, prompt: list[int], num_new: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(num_new):
            tokens.append(int(network(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_rows_of_any_length_are_written_as_alone_and_without_a_cache(
    kind: str, attention: str
) -> None:
    network = NETWORKS[kind]().double()
    network.config._attn_implementation = attention
    expected = [_without_cache(network, prompt, 7) for prompt in PROMPTS]
    assert decode(network, PROMPTS, 7) == expected
    assert [decode(network, [prompt], 7)[0] for prompt in PROMPTS] == expected
    grown = decode(network, PROMPTS, 7, cache=DynamicCache(config=network.config))
    assert grown == expected
    assert len(set(map(tuple, expected))) > 1


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_step_gives_the_hidden_state_of_the_whole_text(kind: str) -> None:
    network = NETWORKS[kind]().double()
    ids = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
    cache = preallocated_cache(network.config, 5)
    with torch.no_grad():
        expected = network.base_model(ids).last_hidden_state[:, -1]
        network.base_model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
        found = decode_step(network, ids[:, -1], torch.tensor([4, 4]), cache, None)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_step_calls_no_forward_pass_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (tiny_gpt2, tiny_llama):
        network: PreTrainedModel = make()
        cache = preallocated_cache(network.config, 3)
        first = torch.tensor([[1]])
        with torch.no_grad():
            network.base_model(input_ids=first, past_key_values=cache, use_cache=True)
            monkeypatch.setattr(type(network.base_model), "forward", None)
            decode_step(network, first[0], torch.tensor([1]), cache, None)


def test_a_text_ends_before_the_end_token() -> None:
    network = tiny_llama().double()
    (whole,) = decode(network, PROMPTS[:1], 9)
    end = whole[4]
    (cut,) = decode(network, PROMPTS[:1], 9, end_tokens=[end])
    assert cut == whole[: whole.index(end)]
    rows = decode(network, PROMPTS, 9, end_tokens=[end])
    assert rows == [_before(end, decode(network, [prompt], 9)[0]) for prompt in PROMPTS]


def _before(end: int, tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def test_tokens_are_chosen_from_the_logits_of_all_rows() -> None:
    seen: list[Tensor] = []

    def least(logits: Tensor) -> Tensor:
        seen.append(logits)
        return logits.argmin(1)

    network = tiny_gpt2().double()
    written = decode(network, PROMPTS[:2], 2, choose=least)
    assert [logits.shape for logits in seen] == [(2, VOCABULARY)] * 2
    assert written != decode(network, PROMPTS[:2], 2)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_the_cache_holds_the_bytes_a_token_that_are_told(
    make: Callable[[], PreTrainedModel],
) -> None:
    network = make()
    cache = preallocated_cache(network.config, 6)
    network.base_model(input_ids=torch.ones(2, 3, dtype=torch.long), past_key_values=cache)
    held = sum(_keys(layer).nbytes * 2 for layer in cache.layers)
    assert held == 2 * 6 * cache_bytes_per_token(network)
    with pytest.raises(ValueError, match="7 tokens do not fit a cache made for 6"):
        network.base_model(input_ids=torch.ones(2, 4, dtype=torch.long), past_key_values=cache)


def test_the_past_is_written_once_and_never_copied() -> None:
    network = tiny_llama()
    cache = preallocated_cache(network.config, 5)
    ids = torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad():
        network.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        places = [_keys(layer).data_ptr() for layer in cache.layers]
        for step in range(1, 5):
            decode_step(network, ids[0], torch.tensor([step]), cache, None)
    assert [layer.keys.data_ptr() for layer in cache.layers] == places  # type: ignore[union-attr]
    assert cache.get_seq_length() == 5


def _keys(layer: object) -> Tensor:
    assert isinstance(layer, PreallocatedLayer)
    assert layer.keys is not None
    return layer.keys


def test_end_tokens_are_those_of_config_and_tokenizer() -> None:
    network = tiny_llama()
    network.generation_config.eos_token_id = [0, 4]
    assert end_tokens_of(network, 7, None) == (0, 4, 7)
    network.generation_config.eos_token_id = None
    assert end_tokens_of(network, None) == ()
