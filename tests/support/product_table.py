"""Products and kernels in bfloat16 over a table of sizes, against float64, in poisoned memory.

A program, for its results depend on how a process is started; its argument is the file to write.

Axes: N rows, I in_features, O out_features, R rank, B batch, H heads, T tokens, D features.
"""

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fingpt_lightning.deploy.adapter_bank import LayerAdapter, RoutedLinear, RowClients
from fingpt_lightning.low_rank import (
    AdaptedLinear,
    AdapterOptions,
    LowRankEmbedding,
    LowRankHead,
    LowRankLinear,
)
from fingpt_lightning.low_rank.adapters import SharedDown
from fingpt_lightning.low_rank.factor_optimizer import orthogonalized
from fingpt_lightning.low_rank.frozen_products import frozen_linear
from fingpt_lightning.low_rank.spectron import spectral_norms
from fingpt_lightning.models import vocabulary_loss
from fingpt_lightning.models.attention import causal_attention
from fingpt_lightning.models.decode_step import decode_step
from fingpt_lightning.models.key_value_cache import preallocated_cache
from fingpt_lightning.models.packed_attention import (
    packed_group,
    run_packed,
    use_packed_attention,
)
from fingpt_lightning.models.quantization.frozen_matrix import CHUNK_BYTES
from fingpt_lightning.models.quantization.layers import quantized_layer
from fingpt_lightning.models.quantization.quantized_embedding import (
    QuantizedEmbedding,
    QuantizedHead,
)
from tests.models.tiny_models import tiny_gpt2, tiny_llama

NAN = float("nan")
SIZES = [
    (1, 1, 1), (1, 7, 5), (3, 64, 33), (7, 11, 13), (33, 36, 100), (40, 5, 129), (65, 31, 16),
    (64, 64, 64), (130, 65, 47), (257, 100, 33),
]  # fmt: skip
"""N, I, O: thin, odd, whole tiles, and one row or column more or less than those."""
LAYER_SIZES = SIZES[1:]
"""Without the single number, in which sums of two products may cancel."""
QUANTIZATIONS = ("int8", "nf4")

Compared = Iterator[tuple[str, Tensor, Tensor]]
"""Cases: a name, the result, the truth in float64."""


def drawn(*shape: int, gap: float | None = None, transposed: bool = False) -> Tensor:
    """Random numbers in bfloat16.

    Args:
        shape: Shape of the tensor.
        gap: Value between, before and behind the rows; None for rows without a gap.
        transposed: Whether columns lie in memory as rows do otherwise.
    """
    if transposed:
        return drawn(*shape[:-2], shape[-1], shape[-2], gap=gap).mT
    values = torch.randn(shape, dtype=torch.bfloat16)
    if gap is None:
        return values
    around = torch.full((*shape[:-2], shape[-2] + 2, shape[-1] + 29), gap, dtype=torch.bfloat16)
    within = around[..., 1:-1, 3 : 3 + shape[-1]]
    return within.copy_(values)


def left_operands(*shape: int) -> Iterator[tuple[str, Tensor]]:
    """Ways in which a product's first operand lies, as our slices of larger results do.

    No gap holds NaN: on processors with AMX oneDNN 3.12 multiplies it by 0
    (https://github.com/uxlfoundation/oneDNN/pull/5603), so our code must not leave any there.
    """
    yield "whole", drawn(*shape)
    yield "slice", drawn(*shape, gap=1e30)
    yield "columns", drawn(*shape, gap=1e30, transposed=True)


def right_operands(*shape: int) -> Iterator[tuple[str, Tensor]]:
    """Ways in which a product's second operand lies."""
    yield "whole", drawn(*shape)
    yield "slice", drawn(*shape, gap=NAN)
    yield "columns", drawn(*shape, gap=NAN, transposed=True)


def with_gradients(case: str, function: Any, *inputs: Tensor, truth: Any = None) -> Compared:
    """A function's result and its gradients, of the inputs and of parameters if it is a module.

    Args:
        case: Name of the case.
        function: Function in bfloat16.
        inputs: Inputs in bfloat16.
        truth: Function in float64; None for ``function`` itself, converted if it is a module.
    """
    if truth is None:
        is_module = isinstance(function, nn.Module)
        truth = copy.deepcopy(function).double() if is_module else function
    ours = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    result, true_result = function(*ours), truth(*exact)
    along = torch.randn_like(result)
    result.backward(along)
    true_result.backward(along.double())
    yield case, result, true_result
    for index, (x, true_x) in enumerate(zip(ours, exact, strict=True)):
        yield f"{case}, gradient {index}", _gradient(x), _gradient(true_x)
    if isinstance(function, nn.Module):
        of_truth = dict(truth.named_parameters())
        for name, p in function.named_parameters():
            if p.requires_grad:
                yield f"{case}, gradient of {name}", _gradient(p), _gradient(of_truth[name])


def _gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


# Products of torch that we call.


def linear() -> Compared:
    for n, i, o in SIZES:
        for how, x in left_operands(n, i):
            for kind, weight in right_operands(o, i):
                case = f"{(n, i, o)} {how} {kind}"
                yield from with_gradients(case, F.linear, x, weight, drawn(1, o)[0])


def matmul() -> Compared:
    for n, i, o in SIZES:
        for how, x in left_operands(n, i):
            for kind, y in right_operands(i, o):
                yield f"{(n, i, o)} {how} {kind}", x @ y, x.double() @ y.double()


def products_into_given_memory() -> Compared:
    for n, i, o in SIZES:
        for how, x in left_operands(n, i):
            for kind, y in right_operands(i, o):
                case, true = f"{(n, i, o)} {how} {kind}", x.double() @ y.double()
                for gap in (None, NAN):
                    out = drawn(n, o, gap=gap).fill_(NAN)
                    yield f"matmul {case} {gap}", torch.matmul(x, y, out=out), true
                    out = drawn(n, o, gap=gap).fill_(NAN)
                    made = torch.addmm(out, x, y, beta=0, out=out)
                    yield f"addmm, beta 0 {case} {gap}", made, true
                    out = drawn(n, o, gap=gap)
                    true_sum = out.double() + 2 * true
                    yield f"addmm_ {case} {gap}", out.addmm_(x, y, alpha=2), true_sum


def batched_products() -> Compared:
    for n, i, o in SIZES:
        for how, x in left_operands(3, n, i):
            for kind, y in right_operands(3, i, o):
                case, true = f"{(n, i, o)} {how} {kind}", x.double() @ y.double()
                yield f"bmm {case}", torch.bmm(x, y), true
                z = drawn(3, n, o)
                yield f"baddbmm {case}", torch.baddbmm(z, x, y), z.double() + true
                yield f"einsum {case}", torch.einsum("bni,bio->bno", x, y), true


def scaled_dot_product_attention() -> Compared:
    for d in (3, 16, 31, 64):
        for t, s in ((1, 1), (1, 33), (7, 7), (33, 65), (130, 130)):
            query = drawn(2, 3, t, d, gap=1e30)
            key, value = (drawn(2, 3, s, d, gap=NAN) for _ in range(2))
            mask = (torch.rand(t, s) < 0.7).index_fill(1, torch.tensor([0]), True)
            function = F.scaled_dot_product_attention
            yield from with_gradients(f"{(d, t, s)}", function, query, key, value)
            made = function(query, key, value, mask)
            true = function(query.double(), key.double(), value.double(), mask)
            yield f"{(d, t, s)} masked", made, true
            if t == s:
                made = function(query, key, value, is_causal=True)
                true = function(query.double(), key.double(), value.double(), is_causal=True)
                yield f"{(d, t, s)} causal", made, true


def products_of_bytes() -> Compared:
    for n, i, o in ((17, 8, 16), (33, 64, 48), (65, 104, 32)):
        x, y = (torch.randint(-128, 128, s, dtype=torch.int8) for s in ((n, i), (i, o)))
        yield f"{(n, i, o)}", torch._int_mm(x, y), x.double() @ y.double()


# Our layers and kernels.


def low_rank_linear() -> Compared:
    for n, i, o in LAYER_SIZES:
        rank = max(1, min(i, o) // 2)
        for settings in ({}, {"activation": "silu"}, {"expansion": 0.5}, {"bias": False}):
            layer = LowRankLinear(i, o, rank, **settings)
            layer.to(torch.bfloat16)
            for how, x in left_operands(n, i):
                layer.zero_grad()
                yield from with_gradients(f"{(n, i, o)} {settings} {how}", layer, x)
        guided = LowRankLinear(i, o, rank).to(torch.bfloat16)
        guided.add_guide()
        assert guided.guide_share is not None
        guided.guide_share.fill_(0.5)
        yield from with_gradients(f"{(n, i, o)} guided", guided, drawn(n, i))
        exact = copy.deepcopy(guided).double()
        yield f"{(n, i, o)} product", guided.product(), exact.product()


def low_rank_embedding() -> Compared:
    for vocabulary, width, rank in ((23, 7, 3), (100, 33, 17), (257, 64, 32)):
        embedding = LowRankEmbedding(vocabulary, width, rank).to(torch.bfloat16)
        exact = copy.deepcopy(embedding).double()
        ids = torch.randint(vocabulary, (2, 35))
        case, made, true = f"{(vocabulary, width, rank)}", embedding(ids), exact(ids)
        yield case, made, true
        made = LowRankHead(embedding)(made)
        yield f"{case}, head", made, LowRankHead(exact)(true)


def frozen_products() -> Compared:
    for n, i, o in LAYER_SIZES:
        weight, bias = drawn(o, i), drawn(1, o)[0]
        for how, x in left_operands(n, i):

            def function(x: Tensor, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
                return frozen_linear(x, weight.to(x.dtype), bias.to(x.dtype))

            yield from with_gradients(f"{(n, i, o)} {how}", function, x)


def _bases(i: int, o: int) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Layers under an adapter, and what each is in float64."""
    dense = nn.Linear(i, o).to(torch.bfloat16)
    yield "dense", dense, copy.deepcopy(dense).double()
    pair = LowRankLinear(i, o, max(1, min(i, o) // 2)).to(torch.bfloat16)
    yield "pair", pair, copy.deepcopy(pair).double()
    for quantize in QUANTIZATIONS:
        layer = quantized_layer(dense, quantize, torch.device("cpu"))
        exact = copy.deepcopy(dense).double()
        exact.weight.data = layer.values(torch.float64)
        yield quantize, layer, exact


def quantized_linear() -> Compared:
    for n, i, o in LAYER_SIZES:
        for kind, layer, exact in _bases(i, o):
            if kind in QUANTIZATIONS:
                for how, x in left_operands(n, i):
                    case = f"{(n, i, o)} {kind} {how}"
                    for name, p in layer.named_parameters():
                        p.requires_grad_(name != "weight" and p.is_floating_point())
                    layer.zero_grad()
                    exact.zero_grad()
                    yield from with_gradients(case, layer, x, truth=exact)


def adapted_linear() -> Compared:
    for n, i, o in LAYER_SIZES:
        for kind, base, exact in _bases(i, o):
            for dora in (False, True):
                if dora and kind != "dense":
                    continue
                options = AdapterOptions(rank=5, dora=dora)
                layer = AdaptedLinear(base, i, o, options)
                nn.init.normal_(layer.lora_B)
                true_layer = AdaptedLinear(exact, i, o, options, torch.float64)
                with torch.no_grad():
                    # As they are rounded for the product.
                    for name in ("lora_A", "lora_B"):
                        own = getattr(layer, name)
                        own.copy_(own.bfloat16())
                        getattr(true_layer, name).copy_(own)
                if dora:
                    layer.start_dora(exact.weight)  # type: ignore[arg-type]
                    true_layer.start_dora(exact.weight)  # type: ignore[arg-type]
                for how, x in left_operands(n, i):
                    layer.zero_grad()
                    true_layer.zero_grad()
                    case = f"{(n, i, o)} {kind} {dora} {how}"
                    yield from with_gradients(case, layer, x, truth=true_layer)


def adapters_that_share_their_input() -> Compared:
    for n, i, o in LAYER_SIZES:
        layers = [
            AdaptedLinear(nn.Linear(i, o).to(torch.bfloat16), i, o, AdapterOptions(rank=rank))
            for rank in (3, 5, 8)
        ]
        for layer in layers:
            nn.init.normal_(layer.lora_B)
            layer.to(torch.bfloat16)
        exact = [copy.deepcopy(layer).double() for layer in layers]
        for some in (layers, exact):
            SharedDown(some)

        def total(x: Tensor, layers: Any = layers, exact: Any = exact) -> Tensor:
            some = exact if x.dtype == torch.float64 else layers
            return torch.cat([layer(x) for layer in some], -1)

        yield from with_gradients(f"{(n, i, o)}", total, drawn(n, i))


@torch.no_grad()
def adapters_by_row() -> Compared:
    for n, i, o in LAYER_SIZES:
        layer = RoutedLinear(nn.Linear(i, o).to(torch.bfloat16), i, o)
        for name, rank in (("one", 3), ("other", 5)):
            layer.adapters[name] = LayerAdapter(drawn(rank, i), drawn(o, rank), 0.5, None)
        exact = copy.deepcopy(layer).double()
        for names in (["one"], ["one", "other", None]):
            clients = RowClients(names, ("one", "other")[: len(names)], torch.device("cpu"))
            layer.activate(clients, torch.bfloat16)
            exact.activate(clients, torch.float64)
            x = drawn(len(names), n, i)
            yield f"{(n, i, o)} {len(names)}", layer(x), exact(x.double())


@torch.no_grad()
def quantized_head() -> Compared:
    for vocabulary, width, rank in ((200, 33, 17), (257, 64, 32)):
        for quantize in QUANTIZATIONS:
            low_rank = LowRankEmbedding(vocabulary, width, rank).to(torch.bfloat16)
            embedding = QuantizedEmbedding.of(low_rank, quantize, torch.device("cpu"))
            hidden = drawn(2, 35, width)
            table = embedding.dense_table()
            case = f"{(vocabulary, width, rank)} {quantize}"
            made = QuantizedHead(embedding)(hidden)
            yield case, made, hidden.double() @ table.T
            ids = torch.randint(vocabulary, (2, 35))
            yield f"{case}, rows", embedding(ids), table[ids]


def blocked_attention() -> Compared:
    for d in (3, 6, 16, 31, 64):
        for t in (2, 7, 33, 130, 257):
            parts = (drawn(2, 3, t, d, gap=1e30) for _ in range(3))

            def function(query: Tensor, key: Tensor, value: Tensor, d: int = d) -> Tensor:
                return causal_attention(query, key, value, d**-0.5)

            yield from with_gradients(f"{(d, t)}", function, *parts)


def packed_attention() -> Compared:
    for network in (tiny_gpt2(), tiny_llama()):
        use_packed_attention(network)
        network.bfloat16()
        lengths, num_shared = [1, 3, 3, 5], 3
        num_tokens = num_shared + sum(lengths)
        ids = torch.randint(network.config.vocab_size, (1, num_tokens))
        places = [torch.arange(num_shared, num_shared + length) for length in lengths]
        positions = torch.cat([torch.arange(num_shared), *places])[None]
        packing = [packed_group(0, num_shared, lengths)]
        made = run_packed(network, ids, positions, packing)
        exact = copy.deepcopy(network).double()
        true = run_packed(exact, ids, positions, packing)
        case = network.config.model_type
        yield case, made, true
        along = torch.randn_like(made)
        made.backward(along)
        true.backward(along.double())
        for (name, p), true_p in zip(network.named_parameters(), exact.parameters(), strict=True):
            if p.grad is not None and "weight" in name:
                yield f"{case}, gradient of {name}", p.grad, _gradient(true_p)


@torch.no_grad()
def decoding() -> Compared:
    for network in (tiny_gpt2(), tiny_llama()):
        network.bfloat16()
        exact = copy.deepcopy(network).double()
        ids = torch.randint(network.config.vocab_size, (40, 9))
        cache = preallocated_cache(network.config, 64)
        network.base_model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
        for allowed in (None, torch.ones(40, 9, dtype=torch.bool)):
            own = copy.deepcopy(cache)
            made = decode_step(network, ids[:, -1], torch.full((40,), 8), own, allowed)
            true = exact.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
            yield f"{network.config.model_type} {allowed is None}", made, true


def loss_over_the_vocabulary() -> Compared:
    for vocabulary, width in ((23, 7), (65, 33), (100, 36), (129, 64), (1000, 31)):
        for n, chunk_size in ((1, 512), (33, 512), (130, 47), (257, 129)):
            labels = torch.randint(vocabulary, (n,))
            labels[::5] = -100
            head = nn.Linear(width, vocabulary, bias=False).to(torch.bfloat16)
            for autocast in (False, True):
                own = copy.deepcopy(head).float() if autocast else head
                own.zero_grad()

                def function(
                    hidden: Tensor,
                    head: nn.Module = own,
                    labels: Tensor = labels,
                    chunk_size: int = chunk_size,
                ) -> Tensor:
                    return vocabulary_loss(head, hidden, labels, chunk_size).loss_sum

                exact = copy.deepcopy(head).double()
                hidden = drawn(n, width).float() if autocast else drawn(n, width)
                true_hidden = hidden.double().requires_grad_()
                hidden.requires_grad_()
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = function(hidden)
                loss.backward()
                true = F.cross_entropy(exact(true_hidden), labels, reduction="sum")
                if n == 1:
                    true = 0 * true  # its one label is ignored
                true.backward()
                case = f"{(vocabulary, width, n, chunk_size)} {autocast}"
                yield case, loss, true
                yield f"{case}, hidden", _gradient(hidden), _gradient(true_hidden)
                yield f"{case}, weight", _gradient(own.weight), _gradient(exact.weight)


def pair_optimizer() -> Compared:
    for r, f in ((1, 1), (1, 7), (5, 33), (31, 65), (33, 100), (64, 64)):
        for kind, some in left_operands(3, r, f):
            made, true = orthogonalized(some), orthogonalized(some.double())
            yield f"{(r, f)} {kind}", made, true
            vectors = drawn(3, r)
            norms, _ = spectral_norms(some, vectors, 3)
            true_norms, _ = spectral_norms(some.double(), vectors.double(), 3)
            yield f"{(r, f)} {kind}, norms", norms, true_norms


LIMITS: dict[Any, float] = {
    linear: 0.01,
    matmul: 0.01,
    products_into_given_memory: 0.01,
    batched_products: 0.01,
    scaled_dot_product_attention: 0.02,
    products_of_bytes: 0.0,
    low_rank_linear: 0.02,
    low_rank_embedding: 0.02,
    frozen_products: 0.01,
    quantized_linear: 0.02,
    adapted_linear: 0.02,
    adapters_that_share_their_input: 0.02,
    adapters_by_row: 0.02,
    quantized_head: 0.02,
    blocked_attention: 0.03,
    packed_attention: 0.1,
    decoding: 0.1,
    loss_over_the_vocabulary: 0.02,
    pair_optimizer: 0.1,
}
"""The largest error of each: the norm of the difference over the norm of the truth."""


def main() -> None:
    """Writes the error of each case, and which kernel oneDNN took for a product."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Also where nothing is preloaded that poisons memory.
    torch.use_deterministic_algorithms(True, warn_only=True)
    CHUNK_BYTES["cpu"] = 1  # the fewest rows at a time
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):  # to the output
        drawn(64, 64) @ drawn(64, 64)
    errors: dict[str, dict[str, float]] = {}
    for kernel in LIMITS:
        errors[kernel.__name__] = {}
        for case, made, true in kernel():
            assert made.shape == true.shape, (kernel, case)
            distance = (made.detach().double() - true.detach()).norm()
            # Gradients that are 0 in truth, of a softmax of one number, are rounding errors here.
            errors[kernel.__name__][case] = (distance / true.norm().clamp_min(1e-3)).item()
    Path(sys.argv[1]).write_text(json.dumps(errors), encoding="utf-8")


if __name__ == "__main__":
    main()
