"""Any module of linear layers becomes low-rank by one call, or is refused by name, unchanged."""

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.utils.parametrizations import weight_norm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.low_rank import LowRankLinear, low_rank_factors, make_low_rank
from fingpt_lightning.low_rank.adapters import AdapterOptions
from fingpt_lightning.models.adapting import adapt
from fingpt_lightning.models.formats.hf_folder import write_network
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.models.quantization.layers import quantized_layer
from tests.models.tiny_models import ids, tiny_gpt2, tiny_llama


def _mlp() -> Any:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(13, 11), nn.ReLU(), Conv1D(17, 11), nn.Linear(17, 3)).double()


def _of_rank(rows: int, columns: int, rank: int) -> Tensor:
    left, right = torch.randn(rows, rank), torch.randn(rank, columns)
    return left.double() @ right.double()


@torch.no_grad()
def test_weights_of_that_rank_give_the_same_function() -> None:
    network = _mlp()
    for layer, rank in ((network[0], 4), (network[2], 4)):
        rows, columns = layer.weight.shape
        layer.weight.copy_(_of_rank(rows, columns, rank))
    x = torch.randn(5, 13, dtype=torch.float64)
    truth = network(x)
    report = make_low_rank(network, rank=4)
    assert report.ranks == {"0": 4, "2": 4}
    assert isinstance(network[2], LowRankLinear)
    torch.testing.assert_close(network(x), truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [_mlp, lambda: tiny_gpt2().double()])
def test_full_rank_is_not_smaller_and_keeps_the_function(make: Callable[[], nn.Module]) -> None:
    network, whole = make(), make()
    with pytest.warns(UserWarning, match=r"rank 1\.0 changed nothing: .* are not smaller than"):
        report = make_low_rank(network, rank=1.0)
    assert not report.ranks
    assert report.parameters_after == report.parameters_before
    assert network.state_dict().keys() == whole.state_dict().keys()


def test_the_factors_are_the_nearest_to_the_weight() -> None:
    network, dense = _mlp(), _mlp()
    make_low_rank(network, rank=3)
    for layer, weight in ((network[0], dense[0].weight), (network[2], dense[2].weight.T)):
        assert isinstance(layer, LowRankLinear)
        u, s, v = torch.linalg.svd(weight.detach(), full_matrices=False)
        torch.testing.assert_close(layer.product(), u[:, :3] * s[:3] @ v[:3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_a_transformers_network_trains_is_written_and_loaded(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    network, before = make(), make()
    report = make_low_rank(network, rank=0.25)
    assert {name.split(".")[1] for name in report.ranks} <= {"h", "layers"}
    assert report.parameters_before == sum(p.numel() for p in before.parameters())
    assert report.parameters_after == sum(p.numel() for p in network.parameters())
    assert report.parameters_after < report.parameters_before
    assert "lm_head" in report.kept
    network(ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in low_rank_factors(network))
    write_network(network, tmp_path, torch.float32)
    loaded = load_model(tmp_path).network
    torch.testing.assert_close(loaded(ids()).logits, network.eval()(ids()).logits)


def test_names_choose_as_target_modules_do() -> None:
    whole = [
        f"transformer.h.{block}.{part}" for block in (0, 1) for part in ("mlp.c_fc", "mlp.c_proj")
    ]
    for names, expected in (
        ("c_fc", whole[::2]),
        (["mlp.c_fc", "transformer.h.1.mlp.c_proj"], [whole[0], whole[2], whole[3]]),
        ("*.mlp.*", whole),
    ):
        report = make_low_rank(tiny_gpt2(), rank=3, names=names)
        assert list(report.ranks) == expected
        assert report.kept["transformer.h.0.attn.c_attn"] == "not named"


def test_a_mapping_gives_each_layer_its_rank() -> None:
    network = tiny_gpt2()
    ranks = {"*.mlp.*": 2, "c_fc": 0.5, "h.1.mlp.c_proj": None}
    report = make_low_rank(network, ranks)
    assert list(report.ranks.values()) == [6, 2, 6]
    assert report.kept["transformer.h.1.mlp.c_proj"] == "its rank is None"
    assert report.kept["transformer.h.1.attn.c_attn"] == "not named"


def test_dtype_device_bias_mode_and_what_is_frozen_stay() -> None:
    network = _mlp().to(torch.bfloat16).eval()
    network[0].weight.requires_grad_(False)
    bias = network[0].bias
    make_low_rank(network, rank=3)
    pair = network[0]
    assert isinstance(pair, LowRankLinear)
    assert pair.bias is bias
    assert (pair.up.dtype, pair.down.dtype) == (torch.bfloat16, torch.bfloat16)
    assert {pair.up.requires_grad, pair.down.requires_grad} == {False}
    assert not pair.training
    assert pair.bias.requires_grad


def test_a_layer_on_the_meta_device_becomes_factors_there() -> None:
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(13, 11), nn.Linear(11, 11, bias=False))
    for start in ("svd", "cola", "orthogonal"):
        laid_out = copy.deepcopy(network)
        assert make_low_rank(laid_out, 3, initialization=start).ranks == {"0": 3, "1": 3}
        assert all(parameter.is_meta for parameter in laid_out.parameters())
        assert make_low_rank(_mlp(), 3, initialization=start).ranks == {"0": 3, "2": 3}


@pytest.mark.parametrize("start", ["cola", "orthogonal"])
def test_drawn_factors_are_new_and_of_the_generator(start: str) -> None:
    drawn = []
    for seed in (1, 1, 2):
        network: Any = nn.Sequential(nn.Linear(64, 96))
        nn.init.normal_(network[0].weight, std=0.3)
        make_low_rank(
            network, 16, initialization=start, generator=torch.Generator().manual_seed(seed)
        )
        assert isinstance(network[0], LowRankLinear)
        drawn.append(network[0].product())
    if start == "orthogonal":
        assert float(drawn[0].std()) == pytest.approx(0.3, rel=0.05)
        torch.testing.assert_close(drawn[0], drawn[1], rtol=0.05, atol=0.02)
    else:
        torch.testing.assert_close(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2], atol=0.01)


def test_a_layer_at_two_places_stays_one_layer() -> None:
    layer = nn.Linear(13, 13)
    network = nn.ModuleDict({"a": layer, "b": nn.Sequential(nn.ReLU(), layer)})
    report = make_low_rank(network, rank=4)
    assert report.ranks == {"a": 4}
    assert network["a"] is network.get_submodule("b.1")
    assert isinstance(network["a"], LowRankLinear)


def test_torchs_encoder_computes_in_evaluation_what_it_does_in_training() -> None:
    layer = nn.TransformerEncoderLayer(12, 2, 40, dropout=0.0, batch_first=True)
    network = nn.TransformerEncoder(layer, 2).double()
    report = make_low_rank(network, rank=4)
    assert set(report.ranks) == {f"layers.{n}.linear{part}" for n in (0, 1) for part in (1, 2)}
    assert "forward pass is its own" in report.kept["layers.0.self_attn.out_proj"]
    x, padding = torch.randn(2, 5, 12, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    trained = network(x, src_key_padding_mask=padding)
    network.eval()
    with torch.no_grad():
        evaluated = network(x, src_key_padding_mask=padding)
    torch.testing.assert_close(evaluated[~padding], trained[~padding], rtol=0, atol=1e-12)


def _adapted() -> nn.Module:
    network = tiny_gpt2()
    adapt(network, AdapterOptions(rank=2), ["transformer.h.0.mlp.c_fc"])
    return network


def _quantized(method: str) -> nn.Module:
    layer = quantized_layer(nn.Linear(64, 64), method, torch.device("cpu"))
    return nn.Sequential(nn.Linear(64, 64), layer)


def _shared() -> nn.Module:
    network = nn.Sequential(nn.Linear(13, 13), nn.Linear(13, 13))
    network[1].weight = network[0].weight
    return network


def _hooked() -> Any:
    network = _mlp()
    network[0].register_forward_hook(lambda *_: None)
    return network


def _normed() -> Any:
    network = _mlp()
    weight_norm(network[0])
    return network


def _old_normed() -> nn.Module:
    layer = nn.Linear(13, 13)
    weight = layer._parameters.pop("weight")
    layer.weight = weight.detach().clone()  # type: ignore[union-attr]  # as the old weight_norm
    return nn.Sequential(layer, nn.Linear(13, 13))


CASES: list[tuple[Callable[[], nn.Module], str, str]] = [
    (tiny_gpt2, "lm_head", "it shares its weight with transformer.wte"),
    (_shared, "1", "it shares its weight with 0"),
    (_adapted, "h.0.mlp.c_fc.base_layer", "it is under an adapter; merge or remove"),
    (lambda: _quantized("nf4"), "1", "it is quantized (NF4Linear)"),
    (lambda: _quantized("int8"), "1", "it is quantized (Int8Linear)"),
    (_hooked, "0", "it has hooks, which would be lost"),
    (_normed, "0", "it is a ParametrizedLinear, whose forward pass is its own"),
    (_old_normed, "0", "its weight is computed"),
    (lambda: nn.Sequential(nn.MultiheadAttention(12, 3)), "out_proj", "forward pass is its own"),
]


@pytest.mark.parametrize(("make", "name", "reason"), CASES, ids=[reason for *_, reason in CASES])
def test_what_cannot_be_replaced_is_passed_over_or_refused_by_name(
    make: Callable[[], nn.Module], name: str, reason: str
) -> None:
    network = make()
    before = list(network.named_modules())
    for settings in ({"names": [name], "rank": 3}, {"rank": {name: 3}}):
        message = rf"{re.escape(name)} cannot become low-rank: .*{re.escape(reason)}"
        with pytest.raises(ValueError, match=message):
            make_low_rank(network, **settings)
    assert list(network.named_modules()) == before
    with warnings.catch_warnings(action="ignore"):  # some have nothing else to replace
        report = make_low_rank(network, rank=3)
    found = [why for kept, why in report.kept.items() if kept.endswith(name)]
    assert len(found) == 1
    # The head of a transformers network is passed over as such.
    assert reason in found[0] or "it is the head" in found[0]


def test_a_sharded_weight_is_refused() -> None:
    network = _mlp()
    torch.distributed.init_process_group("fake", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole = distribute_tensor(network[0].weight.detach(), mesh, [Replicate()])
        network[0].weight = nn.Parameter(whole)
        with pytest.raises(ValueError, match="0 cannot become low-rank: its weight is sharded"):
            make_low_rank(network, rank=3, names="0")
    finally:
        torch.distributed.destroy_process_group()


def test_low_rank_layers_are_passed_over_or_refused_by_name() -> None:
    network = _mlp()
    make_low_rank(network, rank=3, names="0")
    assert make_low_rank(network, rank=3).ranks == {"2": 3}
    with pytest.raises(ValueError, match="names '0' is low-rank already, with rank 3"):
        make_low_rank(network, rank=3, names="0")


def test_an_untied_head_is_made_low_rank_where_it_is_named() -> None:
    network = tiny_llama()
    assert make_low_rank(network, rank=4, names="lm_head").ranks == {"lm_head": 4}
    assert network(ids()).logits.shape[-1] == 23


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": "c_atn"}, "names 'c_atn' fits no linear layer; there are c_attn, c_proj, c_fc,"
         " lm_head, or all as all-linear; did you mean c_attn?"),
        ({"rank": {"c_fc": 3, "fc": 2}}, "rank 'fc' fits no linear layer; there are c_attn"),
        ({"rank": 0}, "transformer.h.0.attn.c_attn: rank 0 is outside [1, 12]"),
        ({"rank": 1.5}, "transformer.h.0.attn.c_attn: rank ratio 1.5 is outside (0, 1]"),
        ({"rank": 13, "names": "c_fc"}, "transformer.h.0.mlp.c_fc: rank 13 is outside [1, 12]"),
        ({"initialization": "svdd"}, "initialization 'svdd' is none of svd, cola, orthogonal; did"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_and_changes_nothing(
    settings: dict[str, Any], message: str
) -> None:
    network = tiny_gpt2()
    with pytest.raises(ValueError, match=re.escape(message)):
        make_low_rank(network, **settings)
    assert not any(isinstance(module, LowRankLinear) for module in network.modules())


def test_a_weight_that_gives_no_factors_is_named_before_anything_changes() -> None:
    network = _mlp()
    with torch.no_grad():
        network[2].weight[3, 1] = torch.nan
    with pytest.raises(ValueError, match="2: the weight has numbers that are not finite"):
        make_low_rank(network, rank=3)
    with torch.no_grad():
        network[2].weight.zero_()
    with pytest.raises(ValueError, match="2: the weight is 0 throughout"):
        make_low_rank(network, rank=3, initialization="orthogonal")
    assert not any(isinstance(module, LowRankLinear) for module in network.modules())
    with pytest.raises(
        ValueError, match=r"itself a Linear, which .* take LowRankLinear.from_dense"
    ):
        make_low_rank(nn.Linear(13, 11), rank=3)
    with pytest.raises(ValueError, match=r"the network has no torch\.nn\.Linear or Conv1D layer"):
        make_low_rank(nn.Sequential(nn.ReLU()), rank=3)
