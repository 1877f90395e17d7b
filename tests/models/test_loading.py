import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from fingpt_lightning.low_rank import LowRankEmbedding, LowRankLinear, RankRule
from fingpt_lightning.models import GPT2Shape, build_network
from fingpt_lightning.models.formats import safetensors_files
from fingpt_lightning.models.loading import load_model
from tests.models.tiny_models import (
    VOCABULARY,
    ids,
    save,
    save_low_rank,
    tiny_gpt2,
    tiny_llama,
    tiny_tokenizer,
)

MAKERS = [tiny_gpt2, tiny_llama]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("shard_size", ["5GB", "8KB"])
def test_a_folder_gives_the_saved_network(
    tmp_path: Path, make: Callable[[], PreTrainedModel], shard_size: str
) -> None:
    network = make()
    save(network, tmp_path, shard_size)
    num_files = len(list(tmp_path.glob("*.safetensors")))
    assert (num_files > 1) == (shard_size == "8KB")
    loaded = load_model(tmp_path)
    assert torch.equal(loaded.network(ids()).logits, network(ids()).logits)
    assert not loaded.network.training
    assert all(parameter.requires_grad for parameter in loaded.network.parameters())
    assert loaded.require_tokenizer().decode([3, 5]) == "w3 w5"
    assert loaded.description == f"{tmp_path} ({network.config.model_type})"
    if num_files == 1:
        contents = (tmp_path / "model.safetensors").read_bytes()
        assert loaded.revision == hashlib.sha256(contents).hexdigest()


def test_the_weights_are_copies_that_no_change_of_the_file_reaches(tmp_path: Path) -> None:
    loaded = load_model(save(tiny_gpt2(), tmp_path)).network
    before = loaded(ids()).logits
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(2000)
        file.write(b"\xff" * 4000)
    assert torch.equal(loaded(ids()).logits, before)


@pytest.mark.parametrize("make", MAKERS)
def test_generating_uses_the_tied_head_and_the_saved_settings(
    tmp_path: Path, make: Callable[[], PreTrainedModel]
) -> None:
    network = make()
    network.generation_config.max_new_tokens = 3
    network.generation_config.eos_token_id = None
    save(network, tmp_path)
    loaded = load_model(tmp_path).network
    mask = torch.ones_like(ids())
    generating: list[Any] = [loaded, network]
    made, expected = (model.generate(ids(), attention_mask=mask) for model in generating)
    assert torch.equal(made, expected)
    assert loaded.generation_config.max_new_tokens == 3
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == network.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_a_dtype_is_that_of_all_weights(tmp_path: Path, dtype: torch.dtype | str) -> None:
    network = tiny_llama()
    loaded = load_model(save(network, tmp_path), dtype=dtype).network
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config.dtype == torch.bfloat16
    # Rotary frequencies stay in float32, as in transformers' own loading.
    theirs = type(network).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded(ids()).logits, theirs(ids()).logits)


def test_a_low_rank_folder_is_known_by_its_weights(tmp_path: Path) -> None:
    shape = GPT2Shape(num_layers=2, width=12, num_heads=3, num_positions=11)
    rank = RankRule(3, {"*.mlp.c_fc": 5, "*.1.attn.c_attn": None})
    network = build_network(shape, VOCABULARY, rank, embedding_rank=4, seed=1).eval()
    save_low_rank(network, tmp_path)
    loaded = load_model(tmp_path)
    ranks = [m.rank for m in loaded.network.modules() if isinstance(m, LowRankLinear)]
    assert sorted(ranks) == [3] * 5 + [5] * 2
    embedding = loaded.network.get_input_embeddings()
    assert isinstance(embedding, LowRankEmbedding)
    assert loaded.network.get_parameter("lm_head.table") is embedding.table
    torch.testing.assert_close(loaded.network(ids()).logits, network(ids()).logits)
    assert loaded.description == f"{tmp_path} (low-rank gpt2)"
    loaded.network.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again").network
    assert torch.equal(again(ids()).logits, loaded.network(ids()).logits)


def test_a_file_of_the_bare_body_and_its_old_buffers_is_read(tmp_path: Path) -> None:
    network = tiny_gpt2()
    save(network, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 11, 11)
    save_file(bare, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path).network(ids()).logits, network(ids()).logits)


def test_a_model_without_tokenizer_says_so_when_asked(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.tokenizer is None
    with pytest.raises(ValueError, match=r"model \(gpt2\) has no tokenizer beside it"):
        loaded.require_tokenizer()
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    given = load_model(tmp_path / "model", tokenizer=tmp_path / "tokenizer")
    assert given.require_tokenizer().eos_token_id == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "bfloat"}, "dtype bfloat is none of float32, bfloat16, float16, float64; did"),
        ({"dtype": torch.int8}, "dtype int8 is none of"),
        ({"quantize": "nf8"}, "quantize 'nf8' is none of auto, none, nf4, int8"),
        ({"revision": "main"}, "revision main: "),
    ],
)
def test_a_wrong_setting_is_refused(
    tmp_path: Path, settings: dict[str, torch.dtype | str], message: str
) -> None:
    save(tiny_gpt2(), tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_model(tmp_path, **settings)  # type: ignore[arg-type]


def _drop_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["transformer.h.1.ln_1.bias"]
    save_file(state, folder / "model.safetensors")


def _add_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state | {"score.weight": torch.zeros(2)}, folder / "model.safetensors")


def _untie_head(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["transformer.wte.weight"] + 1
    save_file(state, folder / "model.safetensors")


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _change_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _empty(folder: Path) -> None:
    (folder / "config.json").unlink()


def _break_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type":\n gpt2}')


def test_a_device_is_checked_before_weights_are_read(tmp_path: Path) -> None:
    save(tiny_gpt2(), tmp_path)
    with pytest.raises(ValueError, match="device 'gpu' is not cpu, cuda or a name such as cuda:1"):
        load_model(tmp_path, device="gpu")
    with pytest.raises(ValueError, match="device 'xpu' is not to be had here"):
        load_model(tmp_path, device="xpu")


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ("nobody/nothing", "is neither a local folder nor to be had from the Hugging Face hub ("),
        ("{}/config.json", "config.json is a file; give its folder"),
        ("{}/empty", "holds none of tokenizer.json, tokenizer.model, vocab.json; found nothing"),
    ],
)
def test_a_tokenizer_that_is_not_there_ends_in_one_short_line(
    tokenizer: str, message: str, tmp_path: Path
) -> None:
    save(tiny_gpt2(), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises((OSError, ValueError), match=re.escape(message)) as raised:
        load_model(tmp_path, tokenizer=tokenizer.format(tmp_path))
    assert len(str(raised.value)) < 300


def _grow_tokenizer(folder: Path) -> None:
    tiny_tokenizer(VOCABULARY + 1).save_pretrained(folder)


def _add_pair(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["transformer.h.0.attn.c_atn.down"] = torch.zeros(3, 12)
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_drop_weight, ValueError, "1 weights are missing: transformer.h.1.ln_1.bias"),
        (_add_weight, ValueError, "1 weights have no place in the network: score.weight"),
        (_untie_head, ValueError, "lm_head.weight differs from the embedding"),
        (_truncate, ValueError, "model.safetensors is not a whole safetensors file"),
        (_change_config(n_embd=15), ValueError, "c_attn.bias is 36, the config asks for 45"),
        (_change_config(n_layer="2x"), ValueError, "config.json: the config is wrong"),
        (_change_config(model_type="gpt3"), ValueError,
         "config.json: architecture 'gpt3' is not supported; gpt2, llama, "),
        (_change_config(quantization_config={"quant_method": "gptq"}), ValueError,
         "weights stored as gptq are not read"),
        (_pickle, ValueError, "pytorch_model.bin is pickled and could run code"),
        (_empty, FileNotFoundError, "found generation_config.json, model.safetensors"),
        (_break_json, ValueError, "config.json:2: Expecting value"),
        (_grow_tokenizer, ValueError, "the tokenizer has 24 tokens, the network 23"),
        (_add_pair, ValueError, "the network has no layer transformer.h.0.attn.c_atn"),
    ],
)  # fmt: skip
def test_a_spoilt_folder_is_refused_in_one_line(
    tmp_path: Path, spoil: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    spoil(save(tiny_gpt2(), tmp_path))
    with pytest.raises(error, match=re.escape(message)) as raised:
        load_model(tmp_path)
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save(tiny_llama(), tmp_path, "20KB")
    (shard, *_) = sorted(tmp_path.glob("model-00002-of-*.safetensors"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name}, one of"):
        load_model(tmp_path)


def test_a_path_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    save(tiny_gpt2(), tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"no such file or folder; did you mean .*model\?"):
        load_model(tmp_path / "modl")


def test_a_hub_name_that_cannot_be_had_says_why() -> None:
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing: .* not to be had from the Hugg"):
        load_model("nobody/nothing")


def test_a_hub_name_is_found_in_the_local_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--someone--tiny"
    save(tiny_gpt2(), cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = load_model("someone/tiny")
    assert loaded.revision == commit
    assert loaded.description == "someone/tiny (gpt2)"


@pytest.mark.parametrize("name", ["weights.bin", "weights.safetensors"])
def test_a_lone_file_of_weights_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"is pickled|of other models give the folder"):
        load_model(tmp_path / name)


def test_more_layers_than_weights_are_refused_before_they_are_laid_out(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**7}))
    with pytest.raises(ValueError, match=r"config.json: 10,000,000 layers, and \d+ weights"):
        load_model(str(tmp_path))


def test_many_tensors_are_read_in_linear_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"extra.{index}": torch.full((1,), float(index)) for index in range(300)}
    save_file(tensors, tmp_path / "a.safetensors")
    num_opened = 0

    def count(*words: object) -> object:
        nonlocal num_opened
        num_opened += 1
        return safe_open(*words)

    monkeypatch.setattr(safetensors_files, "safe_open", count)
    found = dict(safetensors_files.stored_tensors((tmp_path / "a.safetensors",)))
    assert {name: float(tensor) for name, tensor in found.items()} == {
        name: float(tensor) for name, tensor in tensors.items()
    }
    assert num_opened == 2  # for the names, and for the tensors
    monkeypatch.setattr(safetensors_files, "_BYTES_OF_A_MAP", 400)
    assert len(dict(safetensors_files.stored_tensors((tmp_path / "a.safetensors",)))) == 300
    assert num_opened == 2 + 4


def test_stored_integers_are_refused_by_name(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.bool)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model.norm.weight is stored as bool, a weight has"):
        load_model(str(tmp_path))
