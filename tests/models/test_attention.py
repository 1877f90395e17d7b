import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fingpt_lightning.low_rank import RankRule
from fingpt_lightning.models import GPT2Shape, build_network
from fingpt_lightning.models.attention import causal_attention
from tests.evaluation.tiny_language import tiny_network
from tests.support.numerics import assert_no_worse

BLOCK = 8


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> object:
    module = sys.modules[causal_attention.__module__]
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "_BLOCK", BLOCK)
    yield
    patch.undo()


def _inputs(tokens: int, dtype: torch.dtype = torch.float64, head_dim: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    # As a network has them: slices of one product, heads not contiguous.
    qkv = torch.randn(2, tokens, 3, 3, head_dim, generator=generator, dtype=torch.float64)
    grad = torch.randn(2, 3, tokens, head_dim, generator=generator, dtype=torch.float64)
    leaf = qkv.to(dtype).requires_grad_()
    return [leaf, *leaf.permute(2, 0, 3, 1, 4), grad.to(dtype)]


@settings(max_examples=20)
@given(tokens=st.integers(1, 3 * BLOCK + 1))
def test_result_and_gradients_equal_torchs_attention(tokens: int) -> None:
    found = []
    for ours in (True, False):
        leaf, query, key, value, grad = _inputs(tokens)
        if ours:
            out = causal_attention(query, key, value, 0.3)
        else:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
        out.backward(grad)
        assert leaf.grad is not None
        found.append((out.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-13)


def test_bfloat16_is_as_near_the_truth_as_the_plain_way() -> None:
    gradients = []
    for way in ("truth", "plain", "ours"):
        dtype = torch.float64 if way == "truth" else torch.bfloat16
        leaf, query, key, value, grad = _inputs(3 * BLOCK, torch.bfloat16)
        leaf = leaf.detach().to(dtype).requires_grad_()
        query, key, value = leaf.permute(2, 0, 3, 1, 4)
        if way == "ours":
            out = causal_attention(query, key, value, 0.3)
        else:
            future = torch.full((3 * BLOCK, 3 * BLOCK), -torch.inf, dtype=dtype).triu_(1)
            out = torch.softmax(query @ key.mT * 0.3 + future, -1) @ value
        out.backward(grad.to(dtype))
        assert leaf.grad is not None
        gradients.append((out.detach(), leaf.grad))
    compared = list(zip(*gradients, strict=True))
    assert len(compared) == 2
    for truth, plain, ours in compared:
        assert_no_worse(ours, plain=plain, truth=truth)


def test_torch_finds_the_operators_in_order() -> None:
    _, query, key, value, _ = _inputs(BLOCK + 3)
    inputs = tuple(x.detach().requires_grad_() for x in (query, key, value))
    torch.library.opcheck(torch.ops.fingpt.causal_attention.default, (*inputs, 0.3))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_network_uses_it_in_bfloat16_only_where_it_applies(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    module = sys.modules[causal_attention.__module__]

    def counted(*args: object) -> object:
        calls.append(args)
        return causal_attention(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "causal_attention", counted)
    shape = GPT2Shape(num_layers=2, width=12, num_heads=3, num_positions=24)
    network = build_network(shape, 23, RankRule(3), dropout=dropout, seed=1)
    ids = torch.randint(23, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    in_float32 = network(ids).logits
    network(ids, attention_mask=mask)
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        network(ids, attention_mask=mask)
        assert not calls
        logits = network(ids).logits
    assert len(calls) == (2 if dropout == 0 else 0)
    if dropout == 0:
        torch.testing.assert_close(logits.float(), in_float32, rtol=0, atol=0.02)


def test_heads_that_share_keys_attend_as_torch_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = []

    def noted(query: Tensor, key: Tensor, *others: object) -> Tensor:
        heads.append((query.shape[1], key.shape[1]))
        return causal_attention(query, key, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(sys.modules[causal_attention.__module__], "causal_attention", noted)
    found: dict[str, list[Tensor]] = {}
    for way in ("truth", "sdpa", "fingpt_blocked"):
        network = tiny_network("llama")
        if way == "truth":
            network.double()
        network.set_attn_implementation("sdpa" if way == "truth" else way)
        ids = torch.randint(20, (2, 2 * BLOCK + 3), generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", torch.bfloat16, enabled=way != "truth"):
            logits = network(ids).logits
        logits.float().square().sum().backward()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        found[way] = [logits.detach(), *gradients]
    assert heads == [(4, 4)] * 2
    assert {len(tensors) for tensors in found.values()} == {22}
    for truth, plain, ours in zip(*found.values(), strict=True):
        assert_no_worse(ours, plain=plain, truth=truth, slack=2)
