"""Modules that write and upload what they have trained."""

from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from lightning.pytorch import LightningModule, Trainer
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from fingpt_lightning.hub.pushing import PushError
from fingpt_lightning.models.adapting import adapted_layers
from fingpt_lightning.modules import LowRankPretraining, QuantizedFinetuning
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer
from tests.support.hub_server import HubServer, files_of, reach
from tests.support.token_data import TokenData

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")
SIZES: dict[str, Any] = {
    "preset": "gpt2-nano", "num_layers": 2, "width": 12, "num_heads": 3, "num_positions": 16,
}  # fmt: skip
IDS = torch.arange(11)[None]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer().running() as server:
        reach(server, monkeypatch)
        yield server


def _trained(folder: Path, module: LightningModule) -> Any:
    trainer = Trainer(
        accelerator="cpu", max_steps=2, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, limit_val_batches=1, enable_model_summary=False,
        val_check_interval=1, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, datamodule=TokenData(batch_size=2))
    return module.eval()


def _logits(network: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = network(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("settings", [{"rank": 3, "factor_expansion": 0.5}, {"rank": None}])
def test_a_pretrained_network_is_downloaded_as_it_was_trained(
    settings: dict[str, Any], hub: HubServer, tmp_path: Path
) -> None:
    module = _trained(tmp_path, LowRankPretraining(**SIZES, **settings))
    expected = _logits(module.network)
    pushed = module.push_to_hub("me/small", private=True, commit_message="Two steps")
    assert pushed == (f"{hub.url}/me/small", True)
    repository = hub.repositories["me/small"]
    assert (repository.is_private, repository.branches["main"][-1].message) == (True, "Two steps")
    folder = Path(snapshot_download("me/small", cache_dir=tmp_path / "cache"))
    again = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(_logits(again), expected)
    assert torch.equal(_logits(module.network), expected), "the module itself is changed"
    card = ModelCard.load(folder / "README.md")
    is_low_rank = settings["rank"] is not None
    library = "fingpt-lightning" if is_low_rank else "transformers"
    assert card.data.library_name == library
    assert card.data.tags == ["fingpt-lightning", *(["low-rank"] if is_low_rank else [])]
    assert "# small\n" in card.text
    assert "Trained for 2 steps; validation loss" in card.text
    assert ("import fingpt_lightning" in card.text) == is_low_rank


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # by PEFT
def test_an_adapter_is_downloaded_as_it_was_trained(hub: HubServer, tmp_path: Path) -> None:
    tiny_network("gpt2").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\n")
    module = QuantizedFinetuning(
        base=str(tmp_path / "base"), quantize=None, dtype="float32", rank=2, learning_rate=0.1
    )
    module = _trained(tmp_path / "run", module)
    assert all(x.lora_B.abs().max() > 0 for x in adapted_layers(module.network).values())
    module.push_to_hub("me/client", folder=tmp_path / "client", revision="v1")
    assert hub.repositories["me/client"].files("v1") == files_of(tmp_path / "client")
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "client")
    torch.testing.assert_close(_logits(theirs), _logits(module.network), rtol=1e-4, atol=1e-5)
    card = ModelCard.load(tmp_path / "client" / "README.md").data.to_dict()
    assert (card["library_name"], card["base_model_relation"]) == ("peft", "adapter")
    assert (card["license"], card["base_model"]) == ("mit", "a/b")


def test_a_folder_stays_where_the_upload_fails_and_is_not_taken_from_others(
    hub: HubServer, tmp_path: Path
) -> None:
    module = LowRankPretraining(**SIZES, rank=3, vocab_size=23)
    with pytest.raises(ValueError, match="the module has no network yet"):
        module.push_to_hub("me/small")
    module.configure_model()
    with pytest.raises(ValueError, match=r"did you mean me/a-b\?"):
        module.push_to_hub("me/a b")
    hub.answer_instead = lambda method, path: HTTPStatus.FORBIDDEN
    with pytest.raises(PushError, match=r"\(status 403\).*; .*out is whole and can be pushed"):
        module.push_to_hub("me/small", folder=tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    with pytest.raises(PushError) as refused:
        module.push_to_hub("me/small")
    assert "is whole" not in str(refused.value), "the temporary folder is gone"
    module.save_pretrained(tmp_path / "out")  # its own is replaced
    (tmp_path / "other").mkdir()
    with pytest.raises(FileExistsError, match="no model that a module has saved"):
        module.save_pretrained(tmp_path / "other")


def test_without_a_token_nothing_is_written(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reach(hub, monkeypatch, token=None)
    module = LowRankPretraining(**SIZES, rank=3, vocab_size=23)
    module.configure_model()
    with pytest.raises(PushError, match="there is no token"):
        module.push_to_hub("me/small", folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_of_a_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = LowRankPretraining(**SIZES, rank=3, vocab_size=23)
    module.configure_model()
    module.trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
    monkeypatch.setattr(LowRankPretraining, "partial_network", object())
    with pytest.raises(ValueError, match="SingleDeviceStrategy gives each process a part"):
        module.save_pretrained(tmp_path / "out")
