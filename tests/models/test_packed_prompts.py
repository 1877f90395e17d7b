import pytest
import torch

from fingpt_lightning.models.decoding import run_prompts
from fingpt_lightning.models.key_value_cache import PreallocatedLayer, preallocated_cache
from fingpt_lightning.models.packed_attention import use_packed_attention
from fingpt_lightning.models.packed_prompts import packed_order, run_packed_prompts
from tests.models.tiny_models import TINY, VOCABULARY


@pytest.mark.parametrize("family", sorted(TINY))
def test_packed_prompts_have_the_states_keys_and_values_of_prompts_alone(family: str) -> None:
    network = TINY[family]().double().eval()
    torch.manual_seed(0)
    prompts = [torch.randint(VOCABULARY, (size,)).tolist() for size in (4, 1, 6, 4, 2)]
    alone = []
    with torch.no_grad():
        for prompt in prompts:
            cache = preallocated_cache(network.config, len(prompt))
            alone.append((run_prompts(network, [prompt], cache)[0], cache))
        use_packed_attention(network)
        made = run_packed_prompts(network, prompts)
    assert made.lengths == [4, 1, 6, 4, 2]
    for place, (hidden, cache) in enumerate(alone):  # norms round to float32
        torch.testing.assert_close(made.hidden[place], hidden, rtol=0, atol=1e-5)
        layers = made.keys_and_values(place)
        for layer, (keys, values) in zip(cache.layers, layers, strict=True):
            assert isinstance(layer, PreallocatedLayer)
            assert layer.keys is not None
            assert layer.values is not None
            torch.testing.assert_close(keys, layer.keys[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(values, layer.values[0], rtol=0, atol=1e-5)


def test_prompts_lie_in_the_order_of_their_lengths() -> None:
    assert packed_order([[1, 2], [3], [4, 5], []]) == [3, 1, 0, 2]
