import random
from typing import Any

import pytest
import torch

from fingpt_lightning.models.decode_step import decode_step
from fingpt_lightning.models.decoding import decode
from fingpt_lightning.models.families import logits_of
from fingpt_lightning.models.key_value_cache import preallocated_cache
from fingpt_lightning.serving.slots import SlotCache
from tests.models.tiny_models import TINY, VOCABULARY


def _row(cache: Any, row: int, num_tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    own = (row, slice(None), slice(num_tokens))
    return [(layer.keys[own], layer.values[own]) for layer in cache.layers]


@pytest.mark.parametrize("family", sorted(TINY))
def test_rows_that_join_and_leave_are_written_as_alone(family: str) -> None:
    network = TINY[family]().double().eval()
    draw = random.Random(1)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(size)] for size in (2, 5, 1, 4, 3)]
    wanted = [decode(network, [prompt], 5)[0] for prompt in prompts]
    slots = SlotCache(network.config)
    texts: list[list[int]] = [[] for _ in prompts]
    running: list[int] = []

    def join(number: int) -> None:
        cache = preallocated_cache(network.config, len(prompts[number]))
        ids = torch.tensor([prompts[number]])
        hidden = network.base_model(input_ids=ids, past_key_values=cache).last_hidden_state[:, -1]
        slots.add(_row(cache, 0, len(prompts[number])))
        running.append(number)
        texts[number].append(int(logits_of(network, hidden).argmax()))

    with torch.no_grad():
        for step in range(12):
            # The second is longer than what is there; the first row leaves while others go on.
            for number in {0: (0,), 1: (1, 2), 3: (3,), 8: (4,)}.get(step, ()):
                join(number)
            if not running:
                continue
            position, allowed = slots.begin_step()
            token = torch.tensor([texts[number][-1] for number in running])
            logits = logits_of(network, decode_step(network, token, position, slots, allowed))
            slots.end_step()
            for row, number in enumerate(running):
                texts[number].append(int(logits[row].argmax()))
            for row in reversed(range(len(running))):
                if len(texts[running[row]]) == 5:
                    slots.remove(row)
                    last = running.pop()
                    if row < len(running):
                        running[row] = last
    assert texts == wanted
    assert slots.lengths == []


def test_memory_follows_the_longest_row_and_is_used_again() -> None:
    network = TINY["llama"]().eval()
    slots = SlotCache(network.config)
    cache = preallocated_cache(network.config, 4)
    with torch.no_grad():
        network.base_model(input_ids=torch.tensor([[1, 2, 3, 4]]), past_key_values=cache)
        sizes = []
        for _ in range(40):
            slots.add(_row(cache, 0, 4))
            for _ in range(10):
                position, allowed = slots.begin_step()
                token = torch.zeros_like(position)
                decode_step(network, token, position, slots, allowed)
                slots.end_step()
            slots.add(_row(cache, 0, 2))
            slots.remove(0)
            slots.remove(0)
            sizes.append(slots.num_bytes())
        # A row that is always there: its columns move to the front before memory ends.
        slots.add(_row(cache, 0, 4))
        for _ in range(60):
            slots.add(_row(cache, 0, 4))
            position, allowed = slots.begin_step()
            decode_step(network, torch.zeros_like(position), position, slots, allowed)
            slots.end_step()
            slots.remove(0)
            sizes.append(slots.num_bytes())
    assert len(set(sizes)) == 1
