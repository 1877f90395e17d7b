import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fingpt_lightning.models.adapting import adapted_layers, load_adapter
from fingpt_lightning.models.loading import load_model, open_stored
from tests.models.tiny_models import ids, save, tiny_gpt2, tiny_llama, tiny_tokenizer

_SIZES = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (64, 32), "mlp.down_proj": (96, 64),
}  # fmt: skip


def _adapter(folder: Path, base: str, **changes: object) -> Path:
    """The folder that PEFT writes for a Llama of the test."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 3, "revision": None}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    weights = {}
    for name, (in_features, out_features) in _SIZES.items():
        layer = f"base_model.model.model.layers.1.{name}"
        weights[f"{layer}.lora_A.weight"] = torch.zeros(3, in_features)
        weights[f"{layer}.lora_B.weight"] = torch.zeros(out_features, 3)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_brings_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny_llama()
    save(network, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    for number, base in enumerate((str(tmp_path / "base"), "../base", "base")):
        adapter = _adapter(tmp_path / f"adapter{number}", base, revision="abc")
        loaded = load_model(adapter)
        assert loaded.source.adapter == adapter
        assert torch.equal(loaded.network(ids()).logits, network(ids()).logits)
        assert loaded.tokenizer is not None


def test_an_adapter_given_beside_its_base_is_checked_and_applied(tmp_path: Path) -> None:
    save(tiny_llama(), tmp_path / "base")
    adapter = _adapter(tmp_path / "adapter", "of-no-matter")
    loaded = load_model(tmp_path / "base", adapter=adapter, quantize="nf4")
    assert loaded.source.adapter == adapter
    assert len(adapted_layers(loaded.network)) == len(_SIZES)
    assert load_model(tmp_path / "base").source.adapter is None


def test_a_model_with_an_adapter_in_its_folder_is_not_opened_without(tmp_path: Path) -> None:
    save(tiny_llama(), tmp_path / "base")
    open_stored(tmp_path / "base")
    _adapter(tmp_path / "base" / "adapter", "..")
    with pytest.raises(ValueError, match="base has an adapter; fingpt export --format merged"):
        open_stored(tmp_path / "base")


def test_the_tokenizer_of_the_adapter_comes_first(tmp_path: Path) -> None:
    save(tiny_llama(), tmp_path / "base")
    adapter = _adapter(tmp_path / "adapter", "../base")
    tiny_tokenizer(22).save_pretrained(adapter)
    assert len(load_model(adapter).require_tokenizer()) == 22


def test_an_adapter_for_gpt2_fits_its_transposed_layers(tmp_path: Path) -> None:
    save(tiny_gpt2(), tmp_path / "base")
    adapter = _adapter(tmp_path / "adapter", "../base")
    layer = "base_model.model.transformer.h.0.attn.c_attn"
    weights = {
        f"{layer}.lora_A.weight": torch.zeros(3, 12),
        f"{layer}.lora_B.weight": torch.zeros(36, 3),
    }
    save_file(weights, adapter / "adapter_model.safetensors")
    assert adapted_layers(load_model(adapter).network)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save(tiny_gpt2(), tmp_path / "gpt2")
    save(tiny_llama(), tmp_path / "llama")
    adapter = _adapter(tmp_path / "adapter", "../gpt2")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: the base has no layer model"):
        load_model(adapter)
    layer = "base_model.model.model.layers.0.mlp.up_proj"
    parts = {"lora_A": torch.zeros(3, 64), "lora_B": torch.zeros(96, 3)}

    def write(**changes: torch.Tensor) -> None:
        weights = {f"{layer}.{part}.weight": t for part, t in (parts | changes).items()}
        save_file(weights, adapter / "adapter_model.safetensors")

    write(lora_A=torch.zeros(3, 65))
    message = "model.layers.0.mlp.up_proj has 64 in_features in the base, the adapter's has 65"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_model(tmp_path / "llama", adapter=adapter)
    write(lora_B=torch.zeros(95, 3))
    with pytest.raises(ValueError, match="has 96 out_features in the base, the adapter's has 95"):
        load_model(tmp_path / "llama", adapter=adapter)


def test_an_adapter_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    save(tiny_llama(), tmp_path / "base")
    with pytest.raises(ValueError, match="peft_type 'IA3' is not LORA"):
        load_model(_adapter(tmp_path / "ia3", "../base", peft_type="IA3"))
    with pytest.raises(ValueError, match="has no base_model_name_or_path"):
        load_model(_adapter(tmp_path / "orphan", ""))
    with pytest.raises(FileNotFoundError, match=r"the base of the adapter .*lost: model /no/where"):
        load_model(_adapter(tmp_path / "lost", "/no/where"))
    with pytest.raises(ValueError, match=r"its base .* is an adapter too"):
        load_model(_adapter(tmp_path / "second", "../orphan"))
    with pytest.raises(ValueError, match="is an adapter itself"):
        load_model(tmp_path / "orphan", adapter=tmp_path / "lost")
    with pytest.raises(FileNotFoundError, match=r"base has no adapter_config.json"):
        load_model(tmp_path / "base", adapter=tmp_path / "base")
    pickled = _adapter(tmp_path / "pickled", "../base")
    weights = pickled / "adapter_model.safetensors"
    weights.rename(pickled / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin is pickled"):
        load_model(pickled)
    (pickled / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"but no adapter_model.safetensors"):
        load_model(pickled)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (math.nan, torch.float32, "holds a NaN or an infinity"),
        (math.inf, torch.float16, "holds a NaN or an infinity"),
        (1, torch.int32, "is stored as int32, a weight has floating-point numbers"),
    ],
)
def test_damaged_adapter_weights_are_refused_by_name(
    value: float, dtype: torch.dtype, message: str, tmp_path: Path
) -> None:
    save(tiny_llama(), tmp_path / "base")
    adapter = _adapter(tmp_path / "adapter", "of-no-matter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    own = r"layers\.1\.mlp\.down_proj\.lora_B"
    tensors[name] = torch.full_like(tensors[name], value, dtype=dtype)
    save_file(tensors, file)
    network = load_model(tmp_path / "base").network
    with pytest.raises((ValueError, FloatingPointError), match=f"{own} {message}"):
        load_adapter(adapter, network)
