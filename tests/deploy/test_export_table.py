"""Every export format from every stored format, with and without an adapter.

A cell works, and what is read back answers as its source within the format's rounding, or it is
refused in one line that names the formats which fit.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fingpt_lightning.deploy.export_options import FORMATS
from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.low_rank import LowRankLinear, RankRule
from fingpt_lightning.low_rank.conversion import make_low_rank
from fingpt_lightning.models.formats.hf_folder import write_network
from fingpt_lightning.models.formats.peft_adapter import trained_quantization
from fingpt_lightning.models.from_scratch import build_network
from fingpt_lightning.models.loading import LoadedModel, load_model
from fingpt_lightning.models.low_rank_config import note_low_rank
from fingpt_lightning.models.quantization.quantized_embedding import QuantizedEmbedding
from fingpt_lightning.models.shapes import AnyShape, GPT2Shape, StoredShape
from tests.deploy.tiny_clients import save_clients
from tests.evaluation.tiny_language import VOCABULARY, tiny_tokenizer

_TEXTS = ("Shares of Foo fell",)
_EXACT, _ROUNDED = 0.0, {"nf4": 0.7, "int8": 0.05}
_PRODUCTS = 2e-6
"""Largest relative error where weights are multiplied out in float32."""


class Stored(NamedTuple):
    """A model on disk.

    Args:
        base: Name of the network in it.
        method: Method by which it is quantized; None where it is not.
        when: ``stored`` with its codes, or quantized when it is ``loaded``.
        embeddings: Option with which it was exported.
    """

    base: str
    method: str | None = None
    when: str = "stored"
    embeddings: str | None = None

    @property
    def is_low_rank(self) -> bool:
        return self.base.startswith("low-rank") or self.has_activation

    @property
    def has_activation(self) -> bool:
        return self.base == "silu"

    @property
    def needs_us(self) -> bool:
        """Whether transformers alone does not read it."""
        return self.is_low_rank or self.embeddings == "quantized"

    @property
    def has_codes_for_embedding(self) -> bool:
        if self.method is None or self.when == "loaded":
            return False
        return self.is_low_rank or self.embeddings == "quantized"


SOURCES = {
    "gpt2": Stored("gpt2"),
    "llama": Stored("llama"),
    "low-rank gpt2": Stored("low-rank gpt2"),
    "low-rank llama": Stored("low-rank llama"),
    "low-rank own-map gpt2": Stored("low-rank own-map gpt2"),
    "low-rank own-map llama": Stored("low-rank own-map llama"),
    "silu": Stored("silu"),
    "gpt2 in nf4": Stored("gpt2", "nf4"),
    "llama in nf4": Stored("llama", "nf4"),
    "low-rank gpt2 in nf4": Stored("low-rank gpt2", "nf4"),
    "llama in int8, embedding too": Stored("llama", "int8", embeddings="quantized"),
    "low-rank gpt2 in int8": Stored("low-rank gpt2", "int8"),
    "low-rank llama in int8": Stored("low-rank llama", "int8", embeddings="kept"),
    "gpt2 loaded in int8": Stored("gpt2", "int8", "loaded"),
    "llama loaded in nf4": Stored("llama", "nf4", "loaded"),
    "low-rank gpt2 loaded in nf4": Stored("low-rank gpt2", "nf4", "loaded"),
    "low-rank own-map gpt2 in int8": Stored("low-rank own-map gpt2", "int8"),
    "low-rank own-map llama in nf4": Stored("low-rank own-map llama", "nf4", embeddings="kept"),
}


class Model(NamedTuple):
    """A source of the table on disk, its adapter, and how the base is loaded without it."""

    folder: Path
    adapter: Path
    quantize: str

    def load(self, with_adapter: bool, quantize: str | None = None) -> LoadedModel:
        if quantize is None:  # the adapter itself records what it was trained on
            quantize = "auto" if with_adapter else self.quantize
        adapter = self.adapter if with_adapter else None
        return load_model(self.folder, adapter=adapter, quantize=quantize)


def _network(base: str) -> PreTrainedModel:
    torch.manual_seed(3)
    network: PreTrainedModel
    shape: AnyShape
    llama = LlamaConfig(
        num_hidden_layers=1, hidden_size=24, intermediate_size=39, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=40, vocab_size=VOCABULARY,
        bos_token_id=1, eos_token_id=0,
    )  # fmt: skip
    if base == "low-rank own-map llama":
        contents = json.dumps(llama.to_dict() | {"tie_word_embeddings": True})
        shape = StoredShape(Path("config.json"), contents)
        network = build_network(shape, VOCABULARY, RankRule(5), 11, seed=3, has_own_head_map=True)
    elif base.endswith("llama"):
        network = LlamaForCausalLM(llama)
        if base == "low-rank llama":
            make_low_rank(network, rank=5)
    elif base == "low-rank own-map gpt2":  # whose blocks are dense, as with recipe: narrow
        shape = GPT2Shape(num_layers=1, width=24, num_heads=2, num_positions=40)
        network = build_network(shape, VOCABULARY, None, 11, seed=3, has_own_head_map=True)
    else:
        is_low_rank = base != "gpt2"
        network = build_network(
            GPT2Shape(num_layers=1, width=24, num_heads=2, num_positions=40),
            VOCABULARY,
            RankRule(5) if is_low_rank else None,
            embedding_rank=11 if is_low_rank else None,
            seed=3,
        )
    if base == "silu":
        note_low_rank(network.config, "silu", 0.0)
        for layer in network.modules():
            if isinstance(layer, LowRankLinear):
                layer.activation = "silu"
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    network.train(False)
    return network


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Every source, each with an adapter that was trained on it: LoRA, rsLoRA or DoRA in turn."""
    root, tokenizer = tmp_path_factory.mktemp("sources"), tiny_tokenizer()
    for base in dict.fromkeys(stored.base for stored in SOURCES.values()):
        (root / base).mkdir()
        write_network(_network(base), root / base, torch.float32)
        tokenizer.save_pretrained(root / base)
    made = {}
    for index, (name, (base, method, when, embeddings)) in enumerate(SOURCES.items()):
        folder, quantize = root / base, "none"
        if method is not None and when == "stored":
            folder = root / name
            export(
                load_model(root / base), method, folder, texts=_TEXTS, tolerance=9.0,
                embeddings=embeddings,
            )  # fmt: skip
        elif method is not None:
            quantize = method
        clients = root / f"{name} adapters"
        adapter = save_clients(folder, clients, 1, quantize=quantize, first=index)[0]
        made[name] = Model(folder, adapter, quantize)
    return made


def _logits(network: PreTrainedModel) -> Tensor:
    ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        logits: Tensor = network(input_ids=ids).logits
    return logits - logits.mean(-1, keepdim=True)


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _refusal(form: str, source: Stored, adapted: bool) -> str | None:
    """Why a cell is refused; None where it works."""
    if form in ("peft", "merged") and not adapted:
        return "it needs an adapter: give one, or its folder as the model"
    if form == "low_rank" and not source.is_low_rank:
        return "the model has no low-rank layer"
    if source.has_activation and (form not in ("low_rank", "peft")):
        between = "its low-rank layers have silu between their factors"
        return f"{between}, which no dense or quantized layer computes"
    if source.has_activation and form == "low_rank" and adapted:
        return "silu between their factors, and no adapter can be merged into them"
    return None


def _limit(form: str, source: Stored, adapted: bool) -> float:
    """The relative error that a cell may have: 0 where nothing is rounded."""
    if form == "peft":
        return _EXACT
    if form in _ROUNDED and source.method == form:
        return _EXACT  # the codes are kept
    if form in _ROUNDED:
        return _ROUNDED[form]
    if form == "gguf" or (form == "hf" and source.is_low_rank):
        return _PRODUCTS  # of GPT-2 a file of llama.cpp has the matrices transposed
    return _PRODUCTS if adapted else _EXACT


def _described(form: str, source: Stored) -> str:
    """What `load_model` calls the export."""
    is_low_rank = source.is_low_rank and form not in ("hf", "gguf")
    family = "llama" if source.base.endswith("llama") else "gpt2"
    method = source.method if form == "peft" else form if form in _ROUNDED else None
    return f"({'low-rank ' * is_low_rank}{family}{f', {method}' if method else ''})"


def _check_claim(out: Path, form: str, source: Stored) -> None:
    """An export is of a family's model type where transformers alone reads it, else of ours."""
    family = "llama" if source.base.endswith("llama") else "gpt2"
    has_other_layers = form in _ROUNDED and source.needs_us
    is_ours = has_other_layers or (source.is_low_rank and form in ("low_rank", "merged"))
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == ("fingpt_lightning" if is_ours else family)
    assert ("import fingpt_lightning" in (out / "README.md").read_text()) == is_ours


@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapted"])
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("form", FORMATS)
def test_each_format_of_each_stored_format_works_or_is_refused(
    form: str, name: str, adapted: bool, models: dict[str, Model], tmp_path: Path
) -> None:
    source, model = SOURCES[name], models[name]
    loaded = model.load(adapted)
    out = tmp_path / "out"
    if (reason := _refusal(form, source, adapted)) is not None:
        fitting = [each for each in FORMATS if _refusal(each, source, adapted) is None]
        told = f"format {form}: .*{re.escape(reason)}; the formats {', '.join(fitting)} fit it"
        with pytest.raises(ValueError, match=f"^{told}$"):
            export(loaded, form, out, texts=_TEXTS)
        assert not out.exists()
        return
    expected = _logits(loaded.network)
    made = export(loaded, form, out, texts=_TEXTS)
    again = load_model(out / "model.gguf" if form == "gguf" else out)
    error, limit = _error(_logits(again.network), expected), _limit(form, source, adapted)
    assert error <= limit
    assert error > 0 or limit == 0 or form not in _ROUNDED
    assert all(found.relative_error <= limit for found in made.differences)
    assert again.description.endswith(_described(form, source))
    keeps_codes = form == source.method
    assert (again.source.adapter is not None) == (adapted and (keeps_codes or form == "peft"))
    if form not in ("gguf", "peft"):
        _check_claim(out, form, source)
    tokens = again.require_tokenizer().encode(_TEXTS[0], add_special_tokens=False)
    assert tokens == loaded.require_tokenizer().encode(_TEXTS[0], add_special_tokens=False)


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("name", ["llama loaded in nf4", "low-rank gpt2 loaded in nf4"])
def test_an_adapter_keeps_the_record_of_its_training_however_its_base_is_loaded(
    name: str, quantize: str, models: dict[str, Model], tmp_path: Path
) -> None:
    model = models[name]
    assert trained_quantization(model.adapter) == "nf4"
    expected = _logits(model.load(True, quantize).network)
    made = export(model.load(True, quantize), "peft", tmp_path / "peft", texts=_TEXTS)
    assert made.differences[0].relative_error == 0
    assert trained_quantization(tmp_path / "peft") == "nf4"
    as_asked = load_model(tmp_path / "peft", quantize=quantize).network
    assert torch.equal(_logits(as_asked), expected)
    as_trained = load_model(tmp_path / "peft").network
    assert torch.equal(_logits(as_trained), _logits(model.load(True).network))
    if quantize == "int8":  # codes of that kind are kept, the adapter beside them
        export(model.load(True, quantize), "int8", tmp_path / "int8", texts=_TEXTS)
        again = load_model(tmp_path / "int8")
        assert torch.equal(_logits(again.network), expected)
        assert again.description.endswith(", int8; its adapter was trained on nf4)")


@pytest.mark.parametrize("form", ["hf", "LoRA", "rsLoRA", "DoRA", "low_rank"])
@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_what_codes_stand_for_is_exported_in_float64(
    form: str, method: str, models: dict[str, Model], tmp_path: Path
) -> None:
    model = models[f"low-rank gpt2 in {method}"]
    adapter = None
    if form not in ("hf", "low_rank"):
        kind = ("LoRA", "rsLoRA", "DoRA").index(form)
        adapter = save_clients(model.folder, tmp_path, 1, quantize=model.quantize, first=kind)[0]
        form = "merged"
    source = load_model(model.folder, adapter=adapter, dtype="float64")
    expected = _logits(source.network)
    export(source, form, tmp_path / "out", "float64", texts=_TEXTS)
    again = load_model(tmp_path / "out", dtype="float64").network
    assert _error(_logits(again), expected) < 1e-12


@pytest.mark.parametrize("embeddings", ["quantized", "kept"])
@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapted"])
@pytest.mark.parametrize(
    "name", ["low-rank gpt2 in nf4", "gpt2 in nf4", "llama in int8, embedding too"]
)
def test_embeddings_with_codes_keep_them_and_others_get_them_as_requested(
    name: str, adapted: bool, embeddings: str, models: dict[str, Model], tmp_path: Path
) -> None:
    source = SOURCES[name]
    assert source.method is not None
    loaded = models[name].load(adapted)
    expected = _logits(loaded.network)
    export(loaded, source.method, tmp_path / "out", texts=_TEXTS, embeddings=embeddings)
    again = load_model(tmp_path / "out").network
    has_codes = isinstance(again.get_input_embeddings(), QuantizedEmbedding)
    assert has_codes == (source.has_codes_for_embedding or embeddings == "quantized")
    if has_codes == source.has_codes_for_embedding:
        assert torch.equal(_logits(again), expected)


@pytest.mark.parametrize(
    ("name", "form", "adapted"),
    [
        (name, form, adapted)
        for name in ("low-rank llama", "low-rank gpt2 in nf4", "silu")
        for form in ("low_rank", "merged", "int8", "nf4", "peft")
        for adapted in (False, True)
        if _refusal(form, SOURCES[name], adapted) is None
    ],
)
def test_auto_model_of_transformers_loads_what_only_this_package_reads(
    name: str, form: str, adapted: bool, models: dict[str, Model], tmp_path: Path
) -> None:
    export(models[name].load(adapted), form, tmp_path / "out", texts=_TEXTS)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(network, PreTrainedModel)
    assert not network.training
    expected = load_model(tmp_path / "out").network
    assert type(network) is type(expected)
    assert torch.equal(_logits(network), _logits(expected))
