"""Weights that are dequantized once give the answers of those that are dequantized every time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.models import dequantization
from fingpt_lightning.models.adapting import adapted_layers
from fingpt_lightning.models.dequantization import dequantized_bytes
from fingpt_lightning.models.expansion import dequantize
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.models.quantization.frozen_matrix import quantization_of
from fingpt_lightning.profiling import LiveTensorBytes
from tests.deploy.tiny_clients import KINDS, save_clients, save_low_rank_model
from tests.models.tiny_models import ids, save, tiny_gpt2, tiny_llama, tiny_tokenizer

ADAPTERS = {"no adapter": None, "lora": 0, "dora": 2}
"""Place of each kind among those of the tiny clients."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama, a GPT-2, whose layers lie transposed, and a low-rank GPT-2."""
    folder = tmp_path_factory.mktemp("bases")
    for name, network in (("llama", tiny_llama()), ("gpt2", tiny_gpt2())):
        save(network, folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    save_low_rank_model(folder / "low_rank")
    return {name: folder / name for name in ("llama", "gpt2", "low_rank")}


def _logits(network: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = network(input_ids=ids()).logits
    return logits


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("base", ["llama", "gpt2", "low_rank"])
def test_logits_are_those_of_the_quantized_network(
    bases: dict[str, Path], base: str, quantize: str, adapter: str, tmp_path: Path
) -> None:
    assert [KINDS[place].dora for place in (0, 2)] == [False, True]
    place, client = ADAPTERS[adapter], None
    if place is not None:
        (client,) = save_clients(bases[base], tmp_path, 1, quantize=quantize, first=place)
    for dtype in ("float32", "bfloat16"):
        how: dict[str, Any] = {"quantize": quantize, "adapter": client, "dtype": dtype}
        kept = load_model(bases[base], **how)
        made = load_model(bases[base], **how, dequantize="always")
        assert quantization_of(kept.network) == quantize
        assert quantization_of(made.network) is None
        assert made.description == kept.description, "it says what the weights are worth"
        assert len(adapted_layers(made.network)) == len(adapted_layers(kept.network))
        assert {p.dtype for p in made.network.parameters()} <= {
            getattr(torch, dtype), *(p.dtype for layer in adapted_layers(made.network).values()
                                     for p in (layer.lora_A, layer.lora_B))
        }  # fmt: skip
        found, expected = _logits(made.network), _logits(kept.network)
        if base == "llama":  # the very products
            assert torch.equal(found, expected)
        else:  # products of another order of the same numbers
            rounding = 16 * torch.finfo(getattr(torch, dtype)).eps
            assert (found - expected).norm() <= rounding * expected.norm()


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_quantized_embedding_and_its_head_are_dequantized_too(
    bases: dict[str, Path], form: str, tmp_path: Path
) -> None:
    export(load_model(bases["low_rank"]), form, tmp_path / "out")
    (client,) = save_clients(tmp_path / "out", tmp_path, 1)
    kept, made = (
        load_model(tmp_path / "out", adapter=client, dtype="bfloat16", dequantize=how).network
        for how in ("never", "always")
    )
    assert made.dtype == torch.bfloat16
    assert quantization_of(made) is None
    assert made.lm_head.table is made.get_input_embeddings().table
    assert made.lm_head.table.dtype == torch.bfloat16
    torch.testing.assert_close(_logits(made), _logits(kept), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_it_takes_no_more_memory_than_it_is_held_against(
    bases: dict[str, Path], quantize: str
) -> None:
    network = load_model(bases["llama"], quantize=quantize).network
    dense = [m.weight.nbytes for n, m in tiny_llama().named_modules()
             if isinstance(m, nn.Linear) and n != "lm_head"]  # fmt: skip
    needed = dequantized_bytes(network, torch.float32)
    assert needed == sum(dense) + max(dense)
    with LiveTensorBytes() as count:
        dequantize(network, torch.float32)
    assert sum(dense) <= count.live_bytes
    assert count.peak_bytes <= needed
    assert dequantized_bytes(network, torch.float32) == 0


def test_auto_dequantizes_where_half_of_the_free_memory_is_enough(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = dequantized_bytes(load_model(bases["llama"], quantize="int8").network, torch.bfloat16)
    for free, kept in ((2 * needed, None), (2 * needed - 1, "int8")):
        monkeypatch.setattr(dequantization, "free_bytes", lambda _, free=free: free)
        loaded = load_model(bases["llama"], quantize="int8", dtype="bfloat16", dequantize="auto")
        assert quantization_of(loaded.network) == kept
        (remark,) = loaded.remarks
        what = "at every product" if kept else "once"
        assert f"the int8 weights are dequantized {what}" in remark
        assert "KiB in bfloat16, of " in remark
    monkeypatch.setattr(dequantization, "free_bytes", lambda _: needed)
    how: dict[str, Any] = {"quantize": "int8", "dtype": "bfloat16", "dequantize": "always"}
    assert load_model(bases["llama"], **how).remarks == ()
    monkeypatch.setattr(dequantization, "free_bytes", lambda _: needed - 1)
    with pytest.raises(ValueError, match=r"llama: dequantize always: the int8 weights take .* KiB"):
        load_model(bases["llama"], **how)


def test_what_is_not_quantized_is_left_as_it_is(bases: dict[str, Path]) -> None:
    for how in ("auto", "never"):
        assert load_model(bases["llama"], dequantize=how).remarks == ()
    with pytest.raises(ValueError, match="dequantize always has no effect: the network is not"):
        load_model(bases["llama"], dequantize="always")
    with pytest.raises(
        ValueError, match="dequantize 'allways' is none of auto, always, never; did"
    ):
        load_model(bases["llama"], dequantize="allways")


def test_a_network_on_a_gpu_keeps_its_codes_unless_it_is_requested(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load_model(bases["llama"], quantize="nf4").network
    monkeypatch.setattr(dequantization, "free_bytes", lambda _: 2**30)
    gpu = torch.device("cuda")
    assert dequantization.dequantize_once(network, "auto", torch.float32, gpu) is None
    assert quantization_of(network) == "nf4"
    dequantization.dequantize_once(network, "always", torch.float32, gpu)
    assert quantization_of(network) is None
