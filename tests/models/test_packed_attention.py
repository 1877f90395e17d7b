import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fingpt_lightning.models.packed_attention import (
    _Masks,
    packed_group,
    run_packed,
    use_packed_attention,
)
from fingpt_lightning.models.recompute import recompute_blocks
from tests.models.tiny_models import VOCABULARY, ids, tiny_gpt2, tiny_llama
from tests.support.exact_llama import exact_norms
from tests.support.numerics import assert_no_worse

Group = tuple[int, list[int]]
groups_of_rows = st.lists(
    st.tuples(st.integers(0, 4), st.lists(st.integers(1, 6), min_size=1, max_size=4)),
    min_size=1,
    max_size=3,
)


def _plain(network: PreTrainedModel, rows: list[Tensor]) -> list[Tensor]:
    """Each row by itself, its beginning included."""
    return [network.base_model(row[None], use_cache=False).last_hidden_state[0] for row in rows]


def _check(network: PreTrainedModel, groups: list[Group]) -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(size: int) -> Tensor:
        return torch.randint(VOCABULARY, (size,), generator=generator)

    network.double().train()
    plain, packed = network, copy.deepcopy(network)
    use_packed_attention(packed)
    recompute_blocks(packed)
    tokens: list[Tensor] = []
    positions: list[Tensor] = []
    rows: list[list[Tensor]] = []
    packing = []
    for num_shared, lengths in groups:
        packing.append(packed_group(sum(len(t) for t in tokens), num_shared, lengths))
        shared, own = draw(num_shared), [draw(length) for length in lengths]
        tokens += [shared, *own]
        positions += [torch.arange(num_shared)]
        positions += [torch.arange(num_shared, num_shared + length) for length in lengths]
        rows.append([torch.cat([shared, row]) for row in own])
    hidden = run_packed(packed, torch.cat(tokens)[None], torch.cat(positions)[None], packing)[0]
    pieces = iter(hidden.split([len(piece) for piece in tokens]))
    ours, truth = [], []
    for (num_shared, _), whole in zip(groups, rows, strict=True):
        shared = next(pieces)
        found = _plain(plain, whole)
        torch.testing.assert_close(shared, found[0][:num_shared], rtol=0, atol=1e-10)
        ours += [next(pieces) for _ in whole]
        truth += [row[num_shared:] for row in found]
    for our_row, true_row in zip(ours, truth, strict=True):
        torch.testing.assert_close(our_row, true_row, rtol=0, atol=1e-10)
    torch.stack([row.square().sum() for row in ours]).sum().backward()
    torch.stack([row.square().sum() for row in truth]).sum().backward()
    for (name, our_p), true_p in zip(packed.named_parameters(), plain.parameters(), strict=True):
        assert (our_p.grad is None) == (true_p.grad is None), name
        if our_p.grad is not None and true_p.grad is not None:
            torch.testing.assert_close(our_p.grad, true_p.grad, rtol=1e-10, atol=1e-10)


@given(groups_of_rows)
def test_packed_rows_have_the_states_and_gradients_of_rows_by_themselves(
    groups: list[Group],
) -> None:
    _check(exact_norms(tiny_llama()), groups)


def test_gpt2_too() -> None:
    _check(tiny_gpt2(), [(3, [2, 5, 1]), (0, [4, 1])])


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_without_packing_a_network_computes_as_it_did(build: type) -> None:
    network, before = build(), build()(ids()).logits
    use_packed_attention(network)
    torch.testing.assert_close(network(ids()).logits, before)
    mask = torch.ones_like(ids())
    mask[0, :3] = 0
    torch.testing.assert_close(
        network(ids(), attention_mask=mask).logits, build()(ids(), attention_mask=mask).logits
    )


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_in_bfloat16_packed_rows_are_no_further_from_the_truth_than_rows_by_themselves(
    build: Callable[[], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [ids()[0], ids()[1, :5]]
    packing = [packed_group(0, 0, [len(row) for row in rows])]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    truth = torch.cat(_plain(exact_norms(build().double()), rows)).detach()
    plain = torch.cat(_plain(build().bfloat16(), rows)).detach()
    network = build().bfloat16()
    use_packed_attention(network)
    attend = torch.nn.functional.scaled_dot_product_attention
    dtypes = set[torch.dtype]()

    def watched(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtypes.add(query.dtype)
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    ours = run_packed(network, torch.cat(rows)[None], positions, packing)[0]
    assert dtypes == {torch.float32}
    assert_no_worse(ours.detach(), plain=plain, truth=truth)
    ours.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_what_cannot_be_packed_is_named() -> None:
    with pytest.raises(ValueError, match=r"not \[2, 0\]"):
        packed_group(0, 1, [2, 0])
    network = tiny_gpt2()
    for part in network.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.1
    use_packed_attention(network.train())
    with pytest.raises(ValueError, match=r"attention dropout 0\.1"):
        run_packed(network, ids()[:1], torch.arange(7)[None], [packed_group(0, 2, [2, 3])])
    network.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        use_packed_attention(network)


@pytest.mark.parametrize("window", [None, 1, 3, 6, 40])
@pytest.mark.parametrize("per_key", [1, 3])
def test_a_mask_hides_what_comes_after_a_token_and_what_is_beyond_its_window(
    window: int | None, per_key: int
) -> None:
    config = LlamaConfig(
        hidden_size=6, num_attention_heads=3, num_key_value_heads=3 // per_key, vocab_size=7,
        intermediate_size=2, num_hidden_layers=1,
    )  # fmt: skip
    groups = [packed_group(0, 4, [1, 2, 7]), packed_group(14, 0, [5]), packed_group(19, 9, [2, 3])]
    masks = _Masks(groups, LlamaForCausalLM(config), window)
    for num_tokens, num_shared in ((7, 4), (1, 4), (5, 0), (3, 9), (9, 0)):
        token = torch.arange(num_shared, num_shared + num_tokens)[:, None]
        behind = token - torch.arange(num_shared + num_tokens)
        hidden = (behind < 0) | (behind >= (window or 99))
        truth = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf).repeat(per_key, 1)
        mask = masks.of(num_tokens, num_shared)
        if mask is None:
            assert num_shared == 0
            assert per_key == 1
            assert window is None or num_tokens <= window
            continue
        assert torch.equal(mask, truth)
        assert mask.is_contiguous()


def test_on_a_gpu_rows_share_a_call_until_padding_costs_more_than_it() -> None:
    few, many = [3, 30, 60], [40] * 20 + [900] * 20
    sizes = {
        (device, len(rows)): [b.num_rows for b in packed_group(0, 20, rows, device).buckets]
        for device in ("cpu", "cuda")
        for rows in (few, many)
    }
    assert sizes == {
        ("cpu", 3): [3], ("cuda", 3): [3], ("cpu", 40): [20, 20], ("cuda", 40): [20, 20]
    }  # fmt: skip
    apart = [20] * 8 + [120] * 8
    assert [b.num_rows for b in packed_group(0, 20, apart).buckets] == [8, 8]
    assert [b.num_rows for b in packed_group(0, 20, apart, "cuda").buckets] == [16]
