import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from fingpt_lightning.deploy.adapter_bank import AdapterBank, RoutedLinear
from fingpt_lightning.deploy.loading import common_quantization
from fingpt_lightning.models.decoding import decode
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.profiling import LiveTensorBytes
from tests.deploy.tiny_clients import save_clients, save_low_rank_model
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer

PROMPTS = [[5, 60, 7], [200, 31, 4, 99, 8], [17], [3, 3]]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_network("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _alone(base: Path, client: Path | None, dtype: str = "float64") -> PreTrainedModel:
    return load_model(base, dtype=dtype, adapter=client).network


def _logits(network: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = network(input_ids=torch.tensor(rows)).logits
    return logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "low_rank"])
def test_each_row_of_a_mixed_batch_has_the_logits_of_its_client_alone(
    family: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    if family == "low_rank":
        save_low_rank_model(base)
    else:
        tiny_network(family).save_pretrained(base)
    clients = save_clients(base, tmp_path, 3)  # LoRA, rsLoRA and DoRA, of ranks 3, 4 and 2
    network = load_model(base, dtype="float64").network
    bank = AdapterBank(network)
    for index, client in enumerate(clients):
        bank.load(f"client{index}", client)
    rows = [[9, 8, 7], [9, 8, 7], [9, 8, 7], [9, 8, 7]]
    with bank.rows(["client1", None, "client2", "client0"]):
        mixed = _logits(network, rows)
    order = [clients[1], None, clients[2], clients[0]]
    for row, own in enumerate(order):
        alone = _logits(_alone(base, own), rows[:1])[0]
        torch.testing.assert_close(mixed[row], alone, rtol=1e-5, atol=1e-5)
    for index, client in enumerate(clients):
        with bank.rows(f"client{index}"):  # one for all rows of any batch
            same = _logits(network, rows[:2])
        alone = _logits(_alone(base, client), rows[:2])
        torch.testing.assert_close(same, alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(_logits(network, rows), _logits(_alone(base, None), rows))
    assert (mixed[0] - mixed[1]).abs().max() > 0.1


def test_tokens_of_a_packed_sequence_and_rows_of_changing_batches_have_their_own_clients(
    base: Path, tmp_path: Path
) -> None:
    clients = save_clients(base, tmp_path, 3)  # LoRA, rsLoRA and DoRA
    network = load_model(base, dtype="float64").network
    bank = AdapterBank(network)
    for client in clients:
        bank.load(client.name, client)
    layer = next(part for part in network.modules() if isinstance(part, RoutedLinear))
    x_1NI = torch.randn(1, 5, layer.in_features, dtype=torch.float64)
    alone = {}
    for own in (None, *bank.names):
        with bank.rows(own):
            alone[own] = layer(x_1NI)[0]
    # The second batch has a further client, the third one only some of those before.
    for names in (
        ["client0", None, "client2", "client2", "client0"],
        ["client1", "client1", None, "client0", None],
        ["client2", None, None, None, "client1"],
    ):
        bank.activate(names)
        mixed = layer(x_1NI)[0]
        torch.testing.assert_close(layer(x_1NI.transpose(0, 1))[:, 0], mixed)
        wanted = torch.stack([alone[name][place] for place, name in enumerate(names)])
        torch.testing.assert_close(mixed, wanted, rtol=1e-10, atol=1e-10)
    bank.unload("client0")  # what was made for it is not kept
    assert torch.equal(layer(x_1NI), layer.base_layer(x_1NI))


def test_a_client_with_infinite_factors_spoils_no_other_row(base: Path, tmp_path: Path) -> None:
    one, two, three = save_clients(base, tmp_path, 3)
    for folder, part in ((one, "lora_A"), (two, "lora_B")):
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors = {k: v.fill_(torch.inf) if part in k else v for k, v in tensors.items()}
        save_file(tensors, file)
    network = load_model(base, dtype="float64").network
    bank = AdapterBank(network)
    for folder in (one, two, three):
        bank.load(folder.name, folder)
    rows = [[9, 8, 7]] * 4
    with bank.rows([one.name, three.name, two.name, None]):
        mixed = _logits(network, rows)
    with bank.rows(three.name):
        torch.testing.assert_close(mixed[1], _logits(network, rows[:1])[0])
    torch.testing.assert_close(mixed[3], _logits(network, rows[:1])[0])
    assert not mixed[0].isfinite().any()
    assert not mixed[2].isfinite().any()


def test_fifty_clients_in_mixed_batches_answer_as_one_at_a_time(base: Path, tmp_path: Path) -> None:
    folders = save_clients(base, tmp_path / "clients", 50)
    network = load_model(base, dtype="float64").network
    bank = AdapterBank(network)
    for folder in folders:
        bank.load(folder.name, folder)
    assert len(bank.names) == 50
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(50)]
    texts: list[list[int]] = []
    for first in range(0, 50, 13):
        part = slice(first, first + 13)
        with bank.rows(bank.names[part]):
            texts += decode(network, prompts[part], 6)
    for folder, prompt, text in zip(folders, prompts, texts, strict=True):
        assert decode(_alone(base, folder), [prompt], 6)[0] == text
    assert len(set(map(tuple, texts))) > 25


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_further_client_costs_the_bytes_of_its_adapter(
    base: Path, tmp_path: Path, quantize: str | None
) -> None:
    clients = save_clients(base, tmp_path / "clients", 4)
    network = load_model(base, quantize=quantize).network
    bank = AdapterBank(network)
    bank.load("first", clients[0])
    stored = sum(t.nbytes for t in load_file(clients[3] / "adapter_model.safetensors").values())
    with LiveTensorBytes() as count:
        bank.load("second", clients[3])
    assert count.live_bytes == stored == bank.num_bytes("second")
    with LiveTensorBytes() as count:
        bank.unload("second")
    assert count.live_bytes <= 0
    with LiveTensorBytes() as count, bank.rows(["first", None]):
        pass
    assert count.live_bytes == 0  # what a batch gathered is freed with it


def test_clients_come_and_go_while_the_base_runs(base: Path, tmp_path: Path) -> None:
    one, two = save_clients(base, tmp_path / "clients", 2)
    network = load_model(base, dtype="float64").network
    bank = AdapterBank(network)
    before = _logits(network, PROMPTS[:1])
    bank.load("ann", one)
    with bank.rows("ann"):
        own = _logits(network, PROMPTS[:1])
    bank.load("bob", two)
    bank.unload("ann")
    with pytest.raises(ValueError, match="adapter 'ann' is not loaded; there are bob"):
        bank.rows("ann").__enter__()
    assert torch.equal(_logits(network, PROMPTS[:1]), before)
    bank.load("ann", one)
    with bank.rows("ann"):
        assert torch.equal(_logits(network, PROMPTS[:1]), own)
    assert bank.names == ["bob", "ann"]


def test_wrong_names_and_folders_are_refused(base: Path, tmp_path: Path) -> None:
    (client,) = save_clients(base, tmp_path / "clients", 1)
    network = load_model(base).network
    bank = AdapterBank(network)
    bank.load("ann", client)
    with pytest.raises(ValueError, match="'ann' is loaded already"):
        bank.load("ann", client)
    with pytest.raises(ValueError, match="did you mean ann"):
        bank.unload("anm")
    with pytest.raises(FileNotFoundError, match="has no adapter_config"):
        bank.load("bob", tmp_path)
    with (
        pytest.raises(ValueError, match="a batch of 3 rows with adapters for 2"),
        bank.rows(["ann", None]),
    ):
        _logits(network, [[1], [2], [3]])
    config = client / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bias": "all"}))
    with pytest.raises(ValueError, match="bias 'all' is not supported"):
        bank.load("bob", client)
    other = tmp_path / "gpt2"
    tiny_network("gpt2").save_pretrained(other)
    (foreign,) = save_clients(other, tmp_path / "foreign", 1)
    with pytest.raises(ValueError, match=r"the base has no layer transformer\.h\.0\.attn\.c_attn"):
        bank.load("bob", foreign)
    assert bank.names == ["ann"]
    adapted = _alone(base, save_clients(base, tmp_path / "again", 1)[0])
    with pytest.raises(ValueError, match="has an adapter already"):
        AdapterBank(adapted)


def test_many_adapters_are_put_on_the_base_that_all_were_trained_on(
    base: Path, tmp_path: Path
) -> None:
    plain = save_clients(base, tmp_path / "plain", 1)[0]
    nf4 = save_clients(base, tmp_path / "nf4", 2, quantize="nf4")
    assert common_quantization({"ann": plain}) == "none"
    assert common_quantization({"ann": nf4[0], "bob": nf4[1]}) == "nf4"
    with pytest.raises(ValueError, match=r"\(ann none, bob nf4\): choose one"):
        common_quantization({"ann": plain, "bob": nf4[0]})
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such file or folder"):
        common_quantization({"ann": tmp_path / "nowhere"})
