import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.llama_cpp import next_token_logprobs
from fingpt_lightning.deploy import exporting
from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.models.decoding import decode
from fingpt_lightning.models.loading import LoadedModel, load_model
from fingpt_lightning.models.quantization.frozen_matrix import Int8Linear
from tests.deploy.tiny_clients import save_clients, save_low_rank_model
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer
from tests.models.tiny_models import ids, save, tiny_llama

PROMPTS = [[5, 60, 7], [200, 31, 4, 99, 8]]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    tiny_network("llama").save_pretrained(folder)
    tiny_tokenizer("<begin>").save_pretrained(folder)
    return folder


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    folder = tmp_path / "gpt2"
    tiny_network("gpt2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def low_rank(tmp_path: Path) -> Path:
    return save_low_rank_model(tmp_path / "low_rank")


def _adapted(path: Path, client: Path) -> PreTrainedModel:
    return load_model(path, dtype="float64", adapter=client).network


def _logits(network: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = network(input_ids=torch.tensor([PROMPTS[1]])).logits
    return logits


def test_the_dense_export_of_a_low_rank_network_is_plain_transformers_gpt2(
    low_rank: Path, tmp_path: Path
) -> None:
    source = load_model(low_rank, dtype="float64")
    ours = decode(source.network, PROMPTS, 20)
    made = export(source, "hf", tmp_path / "out", "float64")
    assert {found.kind for found in made.differences} == {"random", "real"}
    assert all(found.relative_error < 1e-12 for found in made.differences)
    assert all(found.equal_predictions == 1 for found in made.differences)
    dense: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert type(dense).__name__ == "GPT2LMHeadModel"
    assert not any("down" in name for name, _ in dense.named_parameters())
    assert dense.lm_head.weight is dense.transformer.wte.weight
    # Token for token what transformers' own generate writes.
    for prompt, own in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        whole = dense.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert whole[0, len(prompt) :].tolist() == own


@pytest.mark.parametrize("family", ["llama", "low_rank", "gpt2"])
def test_a_merged_model_answers_as_base_and_adapter(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(family)
    for index, client in enumerate(save_clients(base, tmp_path / "clients", 3)):
        expected = _logits(_adapted(base, client))
        source = load_model(client, dtype="float64")
        made = export(source, "merged", tmp_path / f"out{index}", "float64")
        assert made.tolerance == 1e-10
        again = load_model(tmp_path / f"out{index}", dtype="float64")
        torch.testing.assert_close(_logits(again.network), expected, rtol=1e-9, atol=1e-9)
        # A low-rank base stays low-rank where that is smaller: rank 5 and 2 to 4 of 22 features.
        assert ("low-rank" in again.description) == (family == "low_rank")
        assert again.require_tokenizer().get_vocab() == source.require_tokenizer().get_vocab()


def test_an_adapter_is_merged_into_the_base_as_it_was_quantised(
    llama: Path, tmp_path: Path
) -> None:
    (client,) = save_clients(llama, tmp_path / "clients", 1)
    source = load_model(client, quantize="nf4")
    export(source, "merged", tmp_path / "out")
    quantised = load_model(client, quantize="nf4")
    merged = load_model(tmp_path / "out").network
    assert not any(parameter.dtype == torch.uint8 for parameter in merged.parameters())
    torch.testing.assert_close(
        _logits(merged), _logits(quantised.network.eval()), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "low_rank", "gpt2"])
def test_codes_that_an_adapter_was_trained_on_are_kept_and_it_stays_beside_them(
    family: str, form: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (client,) = save_clients(request.getfixturevalue(family), tmp_path / "clients", 1)
    expected = load_model(client, quantize=form).network
    source = load_model(client, quantize=form)
    made = export(source, form, tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert again.source.adapter == tmp_path / "out" / "adapter"
    torch.testing.assert_close(_logits(again.network), _logits(expected))
    assert made.differences[0].relative_error < 1e-5
    whole = load_model(client).network
    assert made.num_parameters == sum(p.numel() for p in whole.parameters())
    assert (tmp_path / "out" / "adapter").stat().st_mode & 0o777 == 0o755
    # Read from anywhere, and again exported.
    (tmp_path / "out").rename(tmp_path / "moved")
    merged = export(load_model(tmp_path / "moved"), "merged", tmp_path / "merged")
    assert merged.differences[0].relative_error < 1e-4
    torch.testing.assert_close(
        _logits(load_model(tmp_path / "merged").network), _logits(expected), rtol=1e-3, atol=1e-3
    )


@pytest.mark.filterwarnings("ignore")
def test_peft_reads_an_adapter_beside_its_codes(tmp_path: Path) -> None:
    save(tiny_llama(mlp_width=128), tmp_path / "llama")
    (client,) = save_clients(tmp_path / "llama", tmp_path / "clients", 1)
    export(load_model(client, quantize="nf4"), "nf4", tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    # In evaluation bitsandbytes repacks weights on some CPUs and multiplies in bfloat16.
    theirs.train()
    ours = load_model(tmp_path / "out").network
    found, expected = (network(input_ids=ids()).logits.detach() for network in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "low_rank", "gpt2"])
def test_a_quantised_export_is_what_quantising_while_loading_gives(
    family: str, form: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(family)
    made = export(load_model(base), form, tmp_path / "out", tolerance=2.0, embeddings="kept")
    again = load_model(tmp_path / "out")
    assert again.description.endswith(f", {form})")
    assert torch.equal(_logits(again.network), _logits(load_model(base, quantize=form).network))
    stored = {"nf4": torch.uint8, "int8": torch.int8}[form]
    assert any(parameter.dtype == stored for parameter in again.network.parameters())
    assert made.differences[0].relative_error > 0
    with pytest.raises(ValueError, match=f"stored in {form}; load them whole, as such"):
        load_model(tmp_path / "out", quantize={"nf4": "int8", "int8": "nf4"}[form])
    # An adapter that was trained on another rounding does not ask for it of codes that are there.
    (client,) = save_clients(base, tmp_path, 1, quantize={"nf4": "int8", "int8": "nf4"}[form])
    loaded = load_model(tmp_path / "out", quantize="auto", adapter=client)
    assert f", {form}; its adapter was trained on" in loaded.description


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_plain_transformers_reads_a_quantised_llama(form: str, tmp_path: Path) -> None:
    # On the CPU bitsandbytes 0.50.2 itself reads NF4 rows of 16 or 48 features wrongly.
    llama = save(tiny_llama(mlp_width=128), tmp_path / "llama")
    export(load_model(llama), form, tmp_path / "out", tolerance=2.0)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = load_model(tmp_path / "out").network
    if form == "int8":  # there bitsandbytes rounds the inputs too: the weights are the same
        for name, layer in ours.named_modules():
            if isinstance(layer, Int8Linear):
                theirs: Any = plain.get_submodule(name)
                assert type(theirs).__name__ == "Linear8bitLt"
                assert torch.equal(theirs.weight.data, layer.weight.data)
                assert torch.equal(theirs.weight.SCB, layer.SCB)
                theirs_dense = theirs.weight.data.float() * theirs.weight.SCB[:, None] / 127
                torch.testing.assert_close(theirs_dense, layer.values(torch.float32))
    found, expected = (network(input_ids=ids()).logits.detach() for network in (plain, ours))
    if form == "nf4":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    else:
        assert (found - expected).norm() < 0.2 * expected.norm()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapter_is_exported_for_peft(llama: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    (client,) = save_clients(llama, tmp_path / "clients", 1)
    export(load_model(llama, adapter=client), "peft", tmp_path / "out")
    network = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    torch.testing.assert_close(
        _logits(network.eval()), _logits(_adapted(llama, client)), rtol=1e-5, atol=1e-4
    )
    described = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(llama.resolve())


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_an_adapter_of_a_quantised_base_is_exported_for_peft_and_brings_that_base(
    form: str, llama: Path, tmp_path: Path
) -> None:
    (client,) = save_clients(llama, tmp_path / "clients", 1, quantize=form)
    expected = _logits(load_model(client).network)
    made = export(load_model(client), "peft", tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert again.description.endswith(f"(llama, {form})")
    assert torch.equal(_logits(again.network), expected)
    assert made.differences[0].relative_error < 1e-6


def test_a_low_rank_folder_is_read_back_as_it_was(low_rank: Path, tmp_path: Path) -> None:
    expected = load_model(low_rank)
    export(load_model(low_rank), "low_rank", tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert again.description.endswith("(low-rank gpt2)")
    assert torch.equal(_logits(again.network), _logits(expected.network))


@pytest.mark.parametrize("family", ["llama", "low_rank", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gguf_has_the_logits_of_the_model(
    family: str, dtype: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    base = request.getfixturevalue(family)
    export(load_model(base), "gguf", tmp_path / "out", dtype)
    again = load_model(tmp_path / "out" / "model.gguf")
    expected = _logits(load_model(base).network)
    limit = 1e-5 if dtype == "float32" else 5e-3
    assert (_logits(again.network) - expected).norm() < limit * expected.norm()
    text = "Shares of Foo Corp fell"
    assert again.require_tokenizer().encode(text, add_special_tokens=False) == (
        load_model(base).require_tokenizer().encode(text, add_special_tokens=False)
    )


@pytest.mark.parametrize("family", ["llama", "low_rank"])
def test_llama_cpp_answers_as_the_model(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp, which brings llama.cpp, is not installed")
    loaded = load_model(request.getfixturevalue(family))
    tokenizer, network = loaded.require_tokenizer(), loaded.network
    texts = ["Shares of Foo Corp fell", "EUR 3.5 mn, up from EUR 12 mn in 2007"]
    with torch.no_grad():
        ours = [
            network(input_ids=torch.tensor([tokenizer.encode(text)])).logits[0, -1].log_softmax(0)
            for text in texts
        ]
    vocab_size = network.config.vocab_size
    export(loaded, "gguf", tmp_path / "out")
    theirs = next_token_logprobs(tmp_path / "out" / "model.gguf", texts, vocab_size)
    torch.testing.assert_close(theirs, torch.stack(ours), rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_stored_in_the_dtype_that_is_asked_for(
    dtype: str, llama: Path, tmp_path: Path
) -> None:
    made = export(load_model(llama), "hf", tmp_path / "out", dtype)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == getattr(torch, dtype)
    assert 0 < made.differences[0].relative_error < made.tolerance
    small, large = (tmp_path / name / "model.safetensors" for name in ("out", "llama"))
    assert small.stat().st_size < 0.6 * large.stat().st_size


def test_a_difference_above_the_tolerance_leaves_nothing_behind(
    llama: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        ValueError, match=r"differ by 0\.\d+ on r\w+ prompts, more than the tolerance 1e-06"
    ):
        export(load_model(llama), "nf4", tmp_path / "out", tolerance=1e-6)
    assert sorted(tmp_path.iterdir()) == before


def test_a_write_that_fails_leaves_nothing_behind(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(exporting, "write_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        export(load_model(llama), "hf", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_only_an_export_is_replaced_and_only_when_asked(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(FileExistsError, match="is there, and no export"):
        export(load_model(llama), "hf", out, overwrite=True)
    out.rmdir()
    export(load_model(llama), "hf", out)
    with pytest.raises(FileExistsError, match="--overwrite replaces it"):
        export(load_model(llama), "hf", out)
    before = sorted(tmp_path.iterdir())
    export(load_model(llama), "int8", out, overwrite=True, tolerance=2.0)
    assert load_model(out).description.endswith(", int8)")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("form", "dtype", "message"),
    [
        ("peft", "float32", "format peft: it needs an adapter"),
        ("merged", "float32", "format merged: it needs an adapter"),
        ("low_rank", "float32", "the model has no low-rank layer"),
        ("gguf", "float64", "takes the dtypes float32, float16 and bfloat16"),
    ],
)
def test_a_format_that_does_not_fit_is_refused(
    form: str, dtype: str, message: str, llama: Path, tmp_path: Path
) -> None:
    source = load_model(llama, dtype="float64" if dtype == "float64" else "float32")
    with pytest.raises(ValueError, match=message):
        export(source, form, tmp_path / "out", dtype)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_gguf_cannot_say_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    source = load_model(save(tiny_llama(), tmp_path / "words"))
    fitting = "; the formats hf, int8, nf4 fit it$"
    with pytest.raises(ValueError, match=f"not a byte-level BPE.*{fitting}"):
        export(source, "gguf", tmp_path / "out")
    with pytest.raises(ValueError, match=f"gguf: it needs the tokenizer.*{fitting}"):
        export(source._replace(tokenizer=None), "gguf", tmp_path / "out")


def test_the_card_has_the_figures(low_rank: Path, tmp_path: Path) -> None:
    made = export(load_model(low_rank), "hf", tmp_path / "dense")
    card = (tmp_path / "dense" / "README.md").read_text()
    for found in made.differences:
        assert f"| {found.kind} | {found.num_positions:,} |" in card
        assert f"{found.relative_error:.3g}" in card
    assert 'AutoModelForCausalLM.from_pretrained("dense")' in card
    assert "low-rank gpt2" in card
    assert "torch" in card


def test_a_model_without_a_tokenizer_is_compared_on_random_prompts(
    llama: Path, tmp_path: Path, make_bare: Callable[[Path], LoadedModel]
) -> None:
    made = export(make_bare(llama), "hf", tmp_path / "out")
    assert [found.kind for found in made.differences] == ["random"]


@pytest.fixture
def make_bare() -> Callable[[Path], LoadedModel]:
    return lambda folder: load_model(folder)._replace(tokenizer=None)
