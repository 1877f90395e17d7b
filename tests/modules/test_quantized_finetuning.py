import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from transformers import PreTrainedModel

from callbacks.checkpoints import BestCheckpoint
from fingpt_lightning.data import FinancialInstructions
from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.models.adapting import adapted_layers, without_adapters
from fingpt_lightning.models.formats.peft_adapter import read_adapter_config
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.modules import QuantizedFinetuning
from fingpt_lightning.modules.base_model import RandomLlama
from tests.models.tiny_models import save, tiny_gpt2, tiny_llama
from tests.support.exact_llama import exact_norms
from tests.support.lightning_ranks import RanksEnvironment
from tests.support.ranks import run_ranks

SHAPE = RandomLlama(num_positions=400)
SETTINGS: dict[str, Any] = {
    "random_base": SHAPE, "rank": 3, "learning_rate": 0.01, "dtype": "float32", "warmup": 1,
}  # fmt: skip


def _data(**settings: Any) -> FinancialInstructions:
    given: dict[str, Any] = {
        "num_synthetic_items": 30, "batch_size": 4, "vocab_size": 400, "max_length": 400,
    }  # fmt: skip
    return FinancialInstructions(**(given | settings))


def tiny_llama_of(data: FinancialInstructions) -> PreTrainedModel:
    """One that knows the tokens of some data; their tokenizer is saved with it."""
    data.prepare_data()
    data.setup()
    config = tiny_llama().config
    config.vocab_size, config.max_position_embeddings = data.vocabulary_size, 400
    return type(tiny_llama())(config)


def _trainer(folder: Path, **settings: Any) -> Trainer:
    given: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_steps": 4, "max_epochs": -1, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0,
        "default_root_dir": folder, "enable_checkpointing": False, "gradient_clip_val": 1.0,
    }  # fmt: skip
    return Trainer(**(given | settings))


def _module(**settings: Any) -> QuantizedFinetuning:
    torch.manual_seed(5)
    return QuantizedFinetuning(**(SETTINGS | settings))


def _weights(module: QuantizedFinetuning) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _ready(**settings: Any) -> QuantizedFinetuning:
    """In float64 and exact, with adapters that do something, outside a trainer."""
    module = _module(**({"quantize": None, "dtype": "float64"} | settings))
    trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
    data = _data()
    data.prepare_data()
    data.setup()
    trainer.datamodule = data  # type: ignore[attr-defined]
    module.trainer = trainer
    module.configure_model()
    exact_norms(module.network)
    torch.manual_seed(6)
    for layer in adapted_layers(module.network).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return module.train()


def _step(module: QuantizedFinetuning, batching: str) -> tuple[Tensor, list[Tensor]]:
    data = _data(batching=batching)
    data.prepare_data()
    data.setup()
    batch = next(iter(data.train_dataloader()))
    module.zero_grad()
    loss = module.training_step(batch, 0)
    loss.backward()
    grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    assert len(grads) == len(module.state_dict())
    return loss.detach(), grads


def test_every_speed_up_gives_the_loss_and_gradients_of_the_plain_way() -> None:
    plain = _step(_ready(supervised_logits_only=False), "padded")
    assert sum(grad.abs().max() for grad in plain[1]) > 0
    for settings, batching in (
        ({}, "padded"),
        ({}, "packed"),
        ({}, "shared_prefix"),
        ({"recompute": "block"}, "shared_prefix"),
        ({"recompute": "offload"}, "shared_prefix"),
        ({"supervised_logits_only": False}, "shared_prefix"),
    ):
        loss, grads = _step(_ready(**settings), batching)
        torch.testing.assert_close(loss, plain[0], rtol=1e-10, atol=0)
        for ours, truth in zip(grads, plain[1], strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_a_resumed_run_is_exact_and_its_checkpoint_holds_no_base(tmp_path: Path) -> None:
    for optimizer in ("adamw", "adamw_8bit"):
        whole, resumed = (_module(optimizer=optimizer, rank=64) for _ in range(2))
        folder = tmp_path / optimizer
        checkpoint = ModelCheckpoint(folder, "half", every_n_train_steps=2, save_top_k=-1)
        options: dict[str, Any] = {"callbacks": [checkpoint], "enable_checkpointing": True}
        _trainer(folder, max_steps=3, **options).fit(whole, datamodule=_data())
        trainer = _trainer(folder / "again", max_steps=3, **options)
        trainer.fit(resumed, datamodule=_data(), ckpt_path=folder / "half.ckpt", weights_only=True)
        assert trainer.global_step == 3
        assert resumed.tokens_seen == whole.tokens_seen > 0
        saved = torch.load(folder / "half.ckpt", weights_only=True)
        assert saved["state_dict"].keys() == whole.state_dict().keys()
        assert all(".lora_" in name for name in saved["state_dict"])
        assert "network_config" not in saved
        for name, tensor in _weights(whole).items():
            assert torch.equal(resumed.state_dict()[name], tensor), (optimizer, name)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_a_run_of_epochs_is_resumed_within_one_and_between_them(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    options: dict[str, Any] = {
        "max_steps": -1, "max_epochs": 2, "enable_checkpointing": True, "val_check_interval": 0.5,
        "limit_val_batches": 1, "num_sanity_val_steps": 0, "callbacks": checkpoint,
    }  # fmt: skip
    _trainer(tmp_path, **options).fit(whole := _module(), datamodule=_data())
    assert whole.trainer.global_step == 12
    for step in (2, 6, 8):
        saved = tmp_path / f"step={step}.ckpt"
        trainer = _trainer(tmp_path / "again", **options)
        trainer.fit(resumed := _module(), datamodule=_data(), ckpt_path=saved, weights_only=True)
        assert trainer.global_step == 12
        assert resumed.tokens_seen == whole.tokens_seen
        for name, tensor in _weights(whole).items():
            assert torch.equal(resumed.state_dict()[name], tensor), (step, name)


def test_settings_of_the_optimiser_are_those_of_the_resumed_run(tmp_path: Path) -> None:
    changed = {"learning_rate": 0.002, "lora_plus_ratio": 4.0, "weight_decay": 0.7, "beta2": 0.5}
    for optimizer in ("adamw", "adamw_8bit"):
        _trainer(tmp_path, max_steps=1).fit(
            first := _module(optimizer=optimizer), datamodule=_data()
        )
        first.trainer.save_checkpoint(path := tmp_path / f"{optimizer}.ckpt")
        groups = []
        for saved in (path, None):
            module = _module(optimizer=optimizer, **changed)
            trainer = _trainer(tmp_path, max_steps=2)
            trainer.fit(module, datamodule=_data(), ckpt_path=saved, weights_only=True)
            settings = trainer.optimizers[0].param_groups
            groups.append([{k: v for k, v in of.items() if k != "params"} for of in settings])
        assert groups[0] == groups[1]


def test_the_state_of_another_optimiser_is_refused(tmp_path: Path) -> None:
    _trainer(tmp_path, max_steps=1).fit(first := _module(), datamodule=_data())
    first.trainer.save_checkpoint(path := tmp_path / "one.ckpt")
    with pytest.raises(
        ValueError, match=r"model\.optimizer is adamw_8bit, whose state is not that of adamw"
    ):
        _trainer(tmp_path).fit(
            _module(optimizer="adamw_8bit"), datamodule=_data(), ckpt_path=path, weights_only=True
        )


def test_another_base_or_rank_than_the_checkpoint_s_is_refused(tmp_path: Path) -> None:
    _trainer(tmp_path, max_steps=1).fit(first := _module(), datamodule=_data())
    first.trainer.save_checkpoint(tmp_path / "one.ckpt")
    changed = _module()
    changed.base_revision = "another"
    for module, message in ((_module(rank=4), "model.rank is 4"), (changed, "another, the check")):
        with pytest.raises(ValueError, match=message):
            _trainer(tmp_path).fit(
                module, datamodule=_data(), ckpt_path=tmp_path / "one.ckpt", weights_only=True
            )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_base_from_a_folder_is_trained_and_its_adapter_is_in_the_run_folder(
    family: str, tmp_path: Path
) -> None:
    data = _data(max_length=400)
    data.prepare_data()
    data.setup()
    network = {"gpt2": tiny_gpt2, "llama": tiny_llama}[family]()
    config = network.config
    config.vocab_size = data.vocabulary_size
    config.max_position_embeddings = 400  # of a GPT-2 another name of n_positions
    network = type(network)(config)
    network.save_pretrained(tmp_path / "base")
    data.tokenizer.save_pretrained(tmp_path / "base")
    module = _module(random_base=None, base=str(tmp_path / "base"), quantize=None, dora=True)
    _trainer(tmp_path / "run").fit(module, datamodule=_data())
    folder = tmp_path / "run" / "adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["use_dora"] is True
    loaded = load_model(folder)
    assert loaded.source.adapter == folder
    ids = torch.arange(7)[None]
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded.network(ids).logits, module.network(ids).logits)
        with without_adapters(module.network):
            torch.testing.assert_close(network.eval()(ids).logits, module.network(ids).logits)
    assert 0 < module.trained_share() < 0.5
    assert module.base_text().endswith((" in nf4", " in int8", " in float32", " in bfloat16"))
    assert module.adapter_text() == f"DoRA of rank {module.options.rank}"


def test_the_adapter_of_the_best_checkpoint_is_kept_and_is_what_the_run_is_loaded_with(
    tmp_path: Path,
) -> None:
    save(tiny_llama_of(_data()), tmp_path / "base")
    run = tmp_path / "run"
    best = BestCheckpoint("val/loss", mode="max", dirpath=str(run / "checkpoints"))  # the first
    trainer = _trainer(
        run, enable_checkpointing=True, callbacks=best, limit_val_batches=1, val_check_interval=1,
        check_val_every_n_epoch=None,
    )  # fmt: skip
    base = str(tmp_path / "base")
    module = _module(random_base=None, base=base, quantize=None, learning_rate=0.1)
    trainer.fit(module, datamodule=_data())
    kept = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert kept["global_step"] < trainer.global_step
    loaded = load_model(run)
    assert loaded.source.adapter == run / "checkpoints" / "best.ckpt"
    for network in (loaded.network, load_model(run / "adapter_best").network):
        for name, tensor in kept["state_dict"].items():
            assert torch.equal(network.state_dict()[name.removeprefix("network.")], tensor), name
    assert (run / "adapter_best" / "tokenizer.json").is_file()
    assert (
        json.loads((run / "adapter_best" / "adapter_config.json").read_text())
        == kept["adapter_config"]
    )
    # Trained on from the run, its base is still the base.
    again = _module(random_base=None, base=str(run), quantize=None)
    _trainer(tmp_path / "second", max_steps=1).fit(again, datamodule=_data())
    assert read_adapter_config(tmp_path / "second" / "adapter").base.path == base


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_base_that_is_stored_quantised_is_trained_on(form: str, tmp_path: Path) -> None:
    base = save(tiny_llama_of(_data()), tmp_path / "base")
    export(load_model(base), form, tmp_path / "small", tolerance=2.0)
    found = []
    for folder, quantize in ((base, form), (tmp_path / "small", form)):
        module = _module(random_base=None, base=str(folder), quantize=quantize)
        _trainer(tmp_path / "run", max_steps=2).fit(module, datamodule=_data())
        found.append(_weights(module))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor)


def test_training_lowers_the_loss_of_a_quantised_base(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, max_steps=20, limit_val_batches=1)
    trainer.fit(_module(rank=8), datamodule=_data(batch_size=8))
    assert trainer.callback_metrics["val/loss"] < 5.5
    # An even guess among the 400 tokens costs 6 nats.
    assert trainer.callback_metrics["train/loss"] < 5


def test_the_divergence_from_the_base_is_zero_at_first_and_then_holds_back() -> None:
    data = _data()
    data.prepare_data()
    data.setup()
    batch: Any = next(iter(data.train_dataloader()))
    module = _ready(kl_weight=0.5, kl_positions=7)
    hidden = module.hidden_states(batch)
    divergence = module.divergence_from_base(batch, hidden)
    with torch.no_grad(), without_adapters(module.network):
        same = module.divergence_from_base(batch, module.hidden_states(batch))
    assert same == 0
    assert divergence > 0
    whole: Any = {**batch, "labels": batch["input_ids"].clone()}
    with pytest.raises(
        ValueError, match=r"kl_weight 0\.5 compares .* these data train every token"
    ):
        module.divergence_from_base(whole, hidden)
    plain = _ready()
    extra = module.training_step(batch, 0) - plain.training_step(batch, 0)
    num_tokens = int((batch["labels"] != -100).sum())
    torch.testing.assert_close(extra * 1024, 0.5 * num_tokens * divergence.double())


def test_the_divergence_from_the_base_is_not_that_of_padding() -> None:
    data = _data(batching="padded")
    data.prepare_data()
    data.setup()
    batch: Any = next(iter(data.train_dataloader()))
    wider: Any = {
        "input_ids": nn.functional.pad(batch["input_ids"], (0, 9), value=1),
        "labels": nn.functional.pad(batch["labels"], (0, 9), value=-100),
    }
    module = _ready(kl_weight=0.5, kl_positions=10**6)
    ours, same = (module.divergence_from_base(b, module.hidden_states(b)) for b in (batch, wider))
    assert ours > 0
    torch.testing.assert_close(same, ours)


def test_compiled_blocks_over_packed_rows_are_not_recomputed() -> None:
    message = r"compile true with model\.recompute block: .* data\.batching shared_prefix packs"
    with pytest.raises(ValueError, match=message):
        _ready(compile=True, recompute="block")


def test_lora_plus_gives_the_second_matrices_their_own_rate() -> None:
    module = _ready(lora_plus_ratio=4.0, dora=True, weight_decay=0.1)
    groups = module._parameter_groups()
    assert [group["lr"] for group in groups] == [0.01, 0.04, 0.01]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(module.state_dict())


def _fit_on_rank(process_rank: int, world_size: int, folder: str) -> dict[str, Tensor]:
    module = _module(quantize="nf4")
    trainer = _trainer(
        Path(folder),
        strategy=DDPStrategy(process_group_backend="gloo"),
        devices=world_size,
        plugins=[RanksEnvironment()],
    )
    trainer.fit(module, datamodule=_data(batch_size=2))
    return _weights(module)


@pytest.mark.slow
def test_two_ranks_train_what_one_process_trains(tmp_path: Path) -> None:
    per_rank = run_ranks(_fit_on_rank, 2, str(tmp_path), timeout_s=200)
    module = _module()
    _trainer(tmp_path).fit(module, datamodule=_data(batch_size=4))
    moved = 0.0
    for name, tensor in _weights(module).items():
        assert torch.equal(per_rank[0][name], per_rank[1][name])
        torch.testing.assert_close(per_rank[0][name], tensor, rtol=1e-3, atol=1e-4)
        moved += float(tensor.abs().max()) if "lora_B" in name else 0.0
    assert moved > 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "x"}, "either base"),
        ({"learning_rate": 0.0}, r"learning_rate 0\.0"),
        ({"lora_plus_ratio": -1.0}, r"lora_plus_ratio -1\.0"),
        ({"kl_weight": -0.5}, r"kl_weight -0\.5"),
        ({"warmup": 1.5}, r"warmup 1\.5"),
        ({"rank": 0}, "rank 0"),
        ({"final_learning_rate_ratio": 2.0}, r"final_learning_rate_ratio 2\.0"),
    ],
)
def test_a_value_outside_its_range_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _module(**settings)


def test_what_does_not_fit_is_said_before_training(tmp_path: Path) -> None:
    for settings, message in (
        ({"target_modules": ["query"]}, "'query' matches no linear layer; there are q_proj"),
        ({"random_base": RandomLlama(num_positions=99)}, "max_length 400 is longer than the 99"),
        ({"optimizer": "paged_adamw_8bit"}, "on cpu take adamw_8bit"),
    ):
        with pytest.raises(ValueError, match=message):
            _trainer(tmp_path).fit(_module(**settings), datamodule=_data())
    with pytest.raises(ValueError, match="num_heads 3 does not divide width 64"):
        RandomLlama(num_heads=3)
    with pytest.raises(ValueError, match=r"random_base\.num_layers 10,000,000 is above 10,000"):
        RandomLlama(num_layers=10**7)
