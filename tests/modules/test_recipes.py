"""Recipes for low-rank layers: each resumes, loads as a network, is the same on several ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.low_rank import LowRankLinear, Spectron, embedding_factors, low_rank_factors
from fingpt_lightning.low_rank.factor_optimizer import FactorOptimizer
from fingpt_lightning.models.expansion import expand, merge_into_base
from fingpt_lightning.models.formats.hf_folder import write_network
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.models.quantization.layers import quantized_layer
from fingpt_lightning.modules import LowRankPretraining
from fingpt_lightning.modules.optimization import dense_in_blocks, split_embedding
from fingpt_lightning.modules.recipe import PLAIN, check_recipe, check_schedule
from fingpt_lightning.planning.plan import factor_saving, optimizer_bytes
from fingpt_lightning.profiling.memory import module_memory
from fingpt_lightning.strategies import FullySharded, PipelineStrategy
from tests.models.tiny_models import ids
from tests.support.lightning_ranks import RanksEnvironment
from tests.support.ranks import run_ranks
from tests.support.token_data import TokenData

SIZES: dict[str, Any] = {
    "preset": "gpt2-nano", "num_layers": 2, "width": 12, "num_heads": 3, "num_positions": 16,
    "rank": 3, "embedding_rank": 5, "learning_rate": 0.01, "warmup": 1,
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "spectron": {"optimizer": "spectron", "initialization": "orthogonal", "factor_expansion": 0.5},
    "lora_muon": {
        "optimizer": "lora_muon",
        "lora_muon_dense": True,
        "factor_expansion": 0.5,
        "rank_overrides": {"*.c_fc": None},
    },
    "spectron, embedding": {
        "optimizer": "spectron",
        "embedding_optimizer": "same",
        "embedding_learning_rate": 0.3,
        "spectron_adjust_lr": "original",
    },
    "lora_muon, embedding": {"optimizer": "lora_muon", "embedding_optimizer": "same"},
    "spectron, mixed embedding": {
        "optimizer": "spectron",
        "embedding_optimizer": "mixed",
        "embedding_learning_rate": 0.03,
    },
    "lora_muon, mixed embedding": {
        "optimizer": "lora_muon",
        "lora_muon_dense": True,
        "embedding_optimizer": "mixed",
        "rank_overrides": {"*.c_fc": None},
    },
    "spectron, own map of the head": {
        "optimizer": "spectron",
        "embedding_optimizer": "mixed",
        "embedding_learning_rate": 0.03,
        "head_map": "own",
    },
    "adamw, own map of the head": {"head_map": "own", "embedding_learning_rate": 0.03},
    "narrow": {
        "recipe": "narrow",
        "compression": 1.7,
        "width": 36,
        "vocab_size": 299,
        **dict.fromkeys(("embedding_rank", "learning_rate")),
        "rank": "auto",
    },
    "ranks by kind": {
        "optimizer": "lora_muon",
        "rank_overrides": {"*.c_attn.[qk]": 2, "*.c_attn.v": 5},
    },
    "ranks in multiples": {
        "rank_multiple": 3,
        "rank": 4,
        "embedding_rank": 7,
        "optimizer": "spectron",
        "embedding_optimizer": "same",
    },
    "embedding rate": {"embedding_learning_rate": 0.03, "initialization": "orthogonal"},
    "spectron, product": {
        "optimizer": "spectron",
        "factor_decay": "product",
        "spectron_dense": True,
        "rank_overrides": {"*.c_fc": None},
    },
    "adamw_8bit": {"optimizer": "adamw_8bit", "rank_overrides": {"*.c_fc": None}, "width": 36},
    "product": {"factor_decay": "product", "initialization": "cola"},
    "silu": {"factor_activation": "silu", "initialization": "cola"},
    "wsd": {"schedule": "wsd", "cooldown": 0.4, "optimizer": "spectron"},
    "guided": {"self_guided": 0.8, "factor_expansion": 0.5},
    "guided, spectron": {"self_guided": 0.8, "optimizer": "spectron", "spectron_dense": True},
    "guided, 8 bits": {"self_guided": 0.8, "optimizer": "adamw_8bit", "width": 36},
}
NUM_STEPS, CHECKPOINT_STEP = 6, 4  # the checkpoint is at the end of the second epoch
pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


def fit_recipe(
    folder: Path,
    recipe: dict[str, Any],
    *,
    batch_size: int = 4,
    resume_from: Path | None = None,
    **options: Any,
) -> LowRankPretraining:
    """Six clipped steps, a checkpoint after the fourth."""
    torch.manual_seed(3)
    module = LowRankPretraining(**(SIZES | recipe))
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_steps": NUM_STEPS, "max_epochs": -1,
        "gradient_clip_val": 0.5, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "limit_val_batches": 0, "default_root_dir": folder,
        "callbacks": [
            ModelCheckpoint(folder, "{step}", every_n_train_steps=CHECKPOINT_STEP, save_top_k=-1)
        ],
        "plugins": [DoublePrecision()],
    }  # fmt: skip
    trainer = Trainer(**(settings | options))
    data = TokenData(batch_size)
    trainer.fit(module, datamodule=data, ckpt_path=resume_from, weights_only=True)
    return module


def checkpoint_of(folder: Path) -> Path:
    return folder / f"step={CHECKPOINT_STEP}.ckpt"


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path: Path, name: str) -> None:
    recipe = RECIPES[name]
    precise: dict[str, Any] = {"plugins": []} if recipe.get("optimizer") == "adamw_8bit" else {}
    whole = fit_recipe(tmp_path / "one", recipe, **precise).state_dict()
    path = checkpoint_of(tmp_path / "one")
    resumed = fit_recipe(tmp_path / "two", recipe, resume_from=path, **precise).state_dict()
    assert whole.keys() == resumed.keys()
    for key, weight in whole.items():
        assert torch.equal(resumed[key], weight), key
    if "recipe" in recipe:  # no layer of the blocks is low-rank
        return
    plain = fit_recipe(
        tmp_path / "plain", {"width": recipe.get("width", 12)}, **precise
    ).state_dict()
    key = "network.transformer.h.1.attn.c_proj.up"
    assert not torch.allclose(whole[key], plain[key], atol=1e-6)


def test_a_resumed_run_drops_what_one_that_was_not_stopped_does(tmp_path: Path) -> None:
    whole = fit_recipe(tmp_path / "one", {"dropout": 0.3}).state_dict()
    path = checkpoint_of(tmp_path / "one")
    resumed = fit_recipe(tmp_path / "two", {"dropout": 0.3}, resume_from=path).state_dict()
    for key, weight in whole.items():
        assert torch.equal(resumed[key], weight), key


@pytest.mark.parametrize("name", ["spectron", "lora_muon", "product", "adamw_8bit"])
def test_settings_of_the_optimiser_are_those_of_the_resumed_run(tmp_path: Path, name: str) -> None:
    recipe = RECIPES[name]
    precise: dict[str, Any] = {"plugins": []} if name == "adamw_8bit" else {}
    fit_recipe(tmp_path, recipe, **precise)
    changed = recipe | {
        "learning_rate": 0.002, "spectron_learning_rate": 0.03, "weight_decay": 0.7, "beta1": 0.5,
        "spectron_momentum": 0.6, "lora_muon_learning_rate": 0.03, "lora_muon_momentum": 0.6,
    }  # fmt: skip
    resumed = fit_recipe(
        tmp_path / "two", changed, resume_from=checkpoint_of(tmp_path), **precise
    ).trainer.optimizers[0]
    fresh = fit_recipe(tmp_path / "fresh", changed, **precise).trainer.optimizers[0]
    for ours, truth in zip(resumed.param_groups, fresh.param_groups, strict=True):
        own = {key: value for key, value in ours.items() if key != "params"}
        assert own == {key: value for key, value in truth.items() if key != "params"}


@pytest.mark.parametrize("name", ["spectron", "silu", "guided", "ranks in multiples"])
def test_what_is_loaded_or_written_is_the_trained_network(tmp_path: Path, name: str) -> None:
    module = fit_recipe(tmp_path, RECIPES[name])
    module.trainer.save_checkpoint(tmp_path / "end.ckpt")
    truth = module.eval().network(ids()).logits
    again = LowRankPretraining.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    torch.testing.assert_close(again.eval().network(ids()).logits.double(), truth)
    loaded = load_model(tmp_path / "end.ckpt", tokenizer=None, dtype="float64").network
    torch.testing.assert_close(loaded(ids()).logits, truth, rtol=0, atol=1e-12)
    pairs = [m for m in loaded.modules() if isinstance(m, LowRankLinear)]
    assert len(pairs) == 8
    assert {(pair.activation, pair.expansion) for pair in pairs} == {
        ("silu" if name == "silu" else "none", 0.0)
    }
    (tmp_path / "folder").mkdir()
    write_network(loaded, tmp_path / "folder", torch.float64)
    read = load_model(tmp_path / "folder", dtype="float64").network
    torch.testing.assert_close(read(ids()).logits, truth, rtol=0, atol=1e-12)
    assert ("factor" in (tmp_path / "folder" / "config.json").read_text()) == (name == "silu")


def test_a_network_with_activations_between_factors_becomes_no_dense_one(tmp_path: Path) -> None:
    module = fit_recipe(tmp_path, RECIPES["silu"])
    module.trainer.save_checkpoint(tmp_path / "end.ckpt")
    source = load_model(tmp_path / "end.ckpt")
    message = "a low-rank layer with silu between its factors is not a linear map"
    for form in ("hf", "gguf"):
        with pytest.raises(ValueError, match="have silu between their factors, which no dense"):
            export(source, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=message):
        expand(source.network)
    pair = source.network.get_submodule("transformer.h.0.mlp.c_fc")
    for quantize in ("nf4", "int8"):
        with pytest.raises(ValueError, match=r"a low-rank layer with silu .* cannot be quantized"):
            quantized_layer(pair, quantize, torch.device("cpu"))
    merge_into_base(source.network)  # no adapter, nothing to merge


def test_momentum_is_orthogonalised_in_the_dtype_of_products_and_all_the_state_it_has(
    tmp_path: Path,
) -> None:
    bf16: dict[str, Any] = {"plugins": [], "precision": "bf16-mixed"}
    mixed = {"rank_overrides": {"*.c_fc": None}, "spectron_dense": True}
    for name, recipe, options, dtype in (
        ("spectron", RECIPES["spectron"] | mixed, {}, None),
        ("spectron", RECIPES["spectron"] | mixed, bf16, torch.bfloat16),
        ("lora_muon", RECIPES["lora_muon"], bf16, torch.bfloat16),
        ("lora_muon", RECIPES["lora_muon"] | {"embedding_optimizer": "same"}, {}, None),
    ):
        module = fit_recipe(tmp_path, recipe, **options)
        (optimizer,) = module.trainer.optimizers
        assert isinstance(optimizer, FactorOptimizer)
        assert optimizer.product_dtype == dtype
        assert optimizer.param_groups[2]["expansion"] == 0.5
        trained = [(p.numel(), p.element_size()) for p in module.parameters()]
        dense = dense_in_blocks(module.network)
        has_vectors = name == "spectron"
        factors = low_rank_factors(module)
        if recipe.get("embedding_optimizer") == "same":
            factors += embedding_factors(module)
        moved = [(min(p.shape) if has_vectors else 0, p) for p in factors] + [(0, p) for p in dense]
        assert len(dense) == 2
        saving = factor_saving((rank, p.numel(), p.element_size()) for rank, p in moved)
        planned = optimizer_bytes(trained, name) - saving
        assert module_memory(module, optimizer).optimizer == planned


def test_the_product_decays_by_rate_and_weight_decay(tmp_path: Path) -> None:
    once: dict[str, Any] = {"max_steps": 1, "callbacks": [], "enable_checkpointing": False}
    for recipe in (
        {"optimizer": "adamw"},
        {"optimizer": "spectron", "spectron_learning_rate": 0.01},
    ):
        recipe |= {"factor_decay": "product"}
        plain, decayed = (
            low_rank_factors(fit_recipe(tmp_path, recipe | {"weight_decay": decay}, **once))
            for decay in (0.0, 0.5)
        )
        assert len(plain) == len(decayed) == 16
        for down, up, ours_down, ours_up in zip(
            plain[::2], plain[1::2], decayed[::2], decayed[1::2], strict=True
        ):
            product = up @ down
            expected = down - 0.01 * 0.5 * up.T @ product, up - 0.01 * 0.5 * product @ down.T
            torch.testing.assert_close((ours_down, ours_up), expected, rtol=0, atol=1e-14)
            assert not torch.equal(ours_up, up)


def test_the_dense_baseline_of_any_recipe_is_plain(tmp_path: Path) -> None:
    for recipe in RECIPES.values():
        module = LowRankPretraining(**(SIZES | recipe))
        twin, kind = module.dense_baseline(), module.hparams["optimizer"]
        expected = kind if module.hparams.get(f"{kind}_dense") else "adamw"
        if kind == "adamw_8bit":
            expected = "adamw_8bit"
        assert (twin.hparams["optimizer"], twin.hparams["initialization"]) == (expected, "svd")
        assert twin.hparams["self_guided"] == 0
        twin.hparams["vocab_size"] = 23
        twin.configure_model()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spectron_learning_rate": 0.0}, "spectron_learning_rate 0.0 is not above 0"),
        ({"spectron_momentum": 1.0}, r"spectron_momentum 1.0 is outside \[0, 1\)"),
        ({"spectron_dense": True}, "spectron_dense has no effect with optimizer adamw"),
        (
            {"optimizer": "lora_muon", "spectron_adjust_lr": "original"},
            "spectron_adjust_lr original has no effect with optimizer lora_muon: set spectron",
        ),
        (
            {"embedding_optimizer": "same"},
            "embedding_optimizer same has no effect with optimizer adamw: set spectron or lora_mu",
        ),
        (
            {"embedding_optimizer": "mixed", "optimizer": "adamw_8bit"},
            "embedding_optimizer mixed has no effect with optimizer adamw_8bit: set spectron or lo",
        ),
        ({"cooldown": 0.3}, "cooldown 0.3 has no effect with schedule cosine: set wsd"),
        (
            {"schedule": "wsd", "cooldown": 1.5},
            r"cooldown 1.5 is outside \(0, 1\] \(a share of the steps\)",
        ),
        ({"schedule": "wsd", "cooldown": 0}, "cooldown 0 is below 1"),
        ({"schedule": "wsd", "cooldown": float("nan")}, "cooldown nan is outside"),
        (
            {"schedule": "wsd", "cooldown": 0.8, "warmup": 0.3},
            "warmup 0.3 and cooldown 0.8 are more than the whole run",
        ),
        ({"embedding_learning_rate": 0.0}, "embedding_learning_rate 0.0 is not above 0"),
        ({"lora_muon_learning_rate": -0.1}, "lora_muon_learning_rate -0.1 is not above 0"),
        ({"lora_muon_momentum": 1.0}, r"lora_muon_momentum 1.0 is outside \[0, 1\)"),
        (
            {"optimizer": "spectron", "lora_muon_dense": True},
            "lora_muon_dense has no effect with optimizer spectron: set lora_muon",
        ),
        (
            {"optimizer": "lora_muon", "lora_muon_learning_rate": 2.0, "weight_decay": 0.5},
            "lora_muon_learning_rate 2.0 times weight_decay 0.5 is not below 1: lower one",
        ),
        (
            {"optimizer": "lora_muon", "factor_activation": "silu"},
            "which with factor_activation silu is not the weight: set spectron or adamw",
        ),
        ({"factor_expansion": -1.0}, "factor_expansion -1.0 is below 0"),
        ({"factor_expansion": 0.5, "factor_activation": "silu"}, "cannot be folded behind"),
        (
            {"factor_expansion": 0.5, "factor_decay": "product"},
            "factor_decay product decays up down",
        ),
        ({"self_guided": 1.5}, r"self_guided 1.5 is outside \[0, 1\]"),
        ({"self_guided": 0.5, "factor_activation": "silu"}, "none does what one with factor_act"),
        ({"quantization_aware": "nf4", "factor_expansion": 0.5}, "rounds up as it is stored"),
        ({"quantization_aware": "nf4", "factor_activation": "silu"}, "is for an export that fac"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankPretraining(**(SIZES | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initialization": "svdd"}, "initialization 'svdd' is none of .*did you mean svd"),
        ({"factor_activation": "gelu"}, "factor_activation 'gelu' is none of none, silu"),
        ({"factor_decay": "both"}, "factor_decay 'both' is none of factors, product"),
        ({"embedding_optimizer": "sam"}, "embedding_optimizer 'sam' is none .* did you mean same"),
        ({"spectron_adjust_lr": "orig"}, "spectron_adjust_lr 'orig' is none of none, original"),
        ({"optimizer": "spectrum"}, "optimizer 'spectrum' is none of .*did you mean spectron"),
    ],
)
def test_a_word_that_is_none_of_a_settings_is_refused(
    settings: dict[str, str], message: str
) -> None:
    # Of the check alone: the annotations of the module's arguments are checked before it here.
    with pytest.raises(ValueError, match=message):
        check_recipe(
            LowRankPretraining(**SIZES).hparams | settings  # type: ignore[operator]
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "spectron"}, {"optimizer": "lora_muon"}, {"factor_decay": "product"},
        {"initialization": "cola"},
    ],
)  # fmt: skip
def test_a_recipe_for_low_rank_layers_needs_some(settings: dict[str, str]) -> None:
    module = LowRankPretraining(**(SIZES | settings | {"rank": None, "vocab_size": 23}))
    ((key, value),) = settings.items()
    with pytest.raises(
        ValueError,
        match=(
            f"model.{key} {value} is about low-rank layers, .* model.rank is null: set {PLAIN[key]}"
        ),
    ):
        module.configure_model()


def test_rates_are_those_of_the_schedule(tmp_path: Path) -> None:
    rates: dict[str, list[float]] = {"wsd": [], "linear": []}

    class Reader(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            kind = pl_module.hparams["schedule"]
            rates[kind].append(trainer.optimizers[0].param_groups[2]["lr"])

    to_zero = {"spectron_learning_rate": 1.0, "final_learning_rate_ratio": 0.0}
    for recipe in (RECIPES["wsd"], {"schedule": "linear", "optimizer": "spectron"}):
        fit_recipe(tmp_path, recipe | to_zero, callbacks=[Reader()], enable_checkpointing=False)
    assert rates["wsd"] == pytest.approx([1, 1, 1, 1, 1, 0.5])
    assert rates["linear"] == pytest.approx([1, 1, 0.8, 0.6, 0.4, 0.2])


def test_a_constant_rate_goes_on_with_more_steps_as_if_they_had_been_planned(
    tmp_path: Path,
) -> None:
    fit_recipe(tmp_path / "short", RECIPES["wsd"])
    path = checkpoint_of(tmp_path / "short")
    more: dict[str, Any] = {"max_steps": NUM_STEPS + 4}
    longer = fit_recipe(tmp_path / "longer", RECIPES["wsd"], resume_from=path, **more).state_dict()
    for key, weight in fit_recipe(tmp_path / "whole", RECIPES["wsd"], **more).state_dict().items():
        assert torch.equal(longer[key], weight), key


def test_a_word_that_is_no_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule 'cosin' is none of .*did you mean cosine"):
        check_schedule("cosin", 0.1, None)


def test_factors_of_the_embedding_need_an_embedding_of_factors() -> None:
    same = {"optimizer": "spectron", "embedding_optimizer": "same", "vocab_size": 23}
    module = LowRankPretraining(**(SIZES | same | {"embedding_rank": None}))
    with pytest.raises(ValueError, match=r"same is about factors of the embedding, and here it is"):
        module.configure_model()
    LowRankPretraining(**(SIZES | same | {"rank": None})).configure_model()


def test_the_rate_of_the_embedding_is_its_own_under_every_optimizer(tmp_path: Path) -> None:
    once: dict[str, Any] = {"max_steps": 1, "callbacks": [], "enable_checkpointing": False}
    for optimizer in ("adamw", "spectron", "lora_muon"):
        for rank in (5, None):
            recipe = {
                "optimizer": optimizer, "embedding_learning_rate": 0.25, "embedding_rank": rank
            }  # fmt: skip
            module = fit_recipe(tmp_path, recipe, **once)
            groups = module.trainer.optimizers[0].param_groups
            (group,) = (group for group in groups if group["initial_lr"] == 0.25)
            table: Any = module.network.get_input_embeddings()
            assert set(group["params"]) == set(table.parameters())
            assert sum(len(group["params"]) for group in groups) == len([*module.parameters()])


@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("moves_dense", [False, True])
@pytest.mark.parametrize("rate", [None, 0.25])
def test_a_mixed_embedding_is_one_table_and_one_dense_matrix(
    rank: int | None, moves_dense: bool, rate: float | None
) -> None:
    recipe = {
        "optimizer": "spectron", "spectron_dense": moves_dense, "embedding_optimizer": "mixed",
        "embedding_learning_rate": rate, "spectron_learning_rate": 0.05, "rank": rank,
        "vocab_size": 23,
    }  # fmt: skip
    module = LowRankPretraining(**(SIZES | recipe))
    module.configure_model()
    groups = split_embedding_of(module)
    embedding: Any = module.network.get_input_embeddings()
    dense = dense_in_blocks(module.network) if moves_dense else []
    (moved,) = (group for group in groups if group.get("is_dense"))
    assert {*moved["params"]} == {*dense, embedding.up}
    assert moved["lr"] == 0.05
    (of_table,) = (group for group in groups if embedding.table in {*group["params"]})
    assert of_table.get("lr") == rate
    assert not of_table.get("is_dense")
    assert rate is None or of_table["params"] == [embedding.table]
    every = [p for group in groups for p in group["params"]]
    assert len(every) == len({*every}) == len([*module.parameters()])


def split_embedding_of(module: LowRankPretraining) -> list[dict[str, Any]]:
    """The groups that the optimizer is made of."""
    groups = module._factor_groups()
    settings = module._embedding_settings()
    return groups if settings is None else split_embedding(groups, module.network, settings)


@pytest.mark.parametrize("rates", [(None, 0.1), (0.1, None)])
def test_a_rate_of_the_embedding_is_not_begun_or_ended_in_mid_run(
    tmp_path: Path, rates: tuple[float | None, float | None]
) -> None:
    fit_recipe(tmp_path, {"embedding_learning_rate": rates[0]})
    message = f"embedding_learning_rate is {rates[1] or 'null'}, .* with {rates[0] or 'null'}: "
    with pytest.raises(ValueError, match=message):
        fit_recipe(
            tmp_path, {"embedding_learning_rate": rates[1]}, resume_from=checkpoint_of(tmp_path)
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"embedding_optimizer": "same"},
            r"model.embedding_optimizer is same, whose state .* of adamw",
        ),
        ({"optimizer": "adamw"}, r"model.optimizer is adamw, whose state .* of spectron"),
        ({"optimizer": "lora_muon"}, r"model.optimizer is lora_muon, whose state .* of spectron"),
        (
            {"factor_decay": "product"},
            r"model.factor_decay is product, whose state .* of factors",
        ),
        ({"spectron_dense": True}, r"model.spectron_dense is True, whose state .* of False"),
        ({"self_guided": 0.9}, r"model.self_guided is 0.9, .* of a run that was not guided"),
    ],
)
def test_another_optimisers_state_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    fit_recipe(tmp_path, {"optimizer": "spectron"})
    with pytest.raises(ValueError, match=message):
        fit_recipe(
            tmp_path, {"optimizer": "spectron"} | settings, resume_from=checkpoint_of(tmp_path)
        )


def _on_two(process_rank: int, num_ranks: int, name: str) -> dict[str, Any]:
    folder = Path(name)

    def fit(case: str, recipe: str, strategy: Any, **options: Any) -> dict[str, Any]:
        ranks: dict[str, Any] = {
            "strategy": strategy, "devices": num_ranks,
            "plugins": [RanksEnvironment(), DoublePrecision()],
        }  # fmt: skip
        module = fit_recipe(folder / case, RECIPES[recipe], **ranks, **options)
        return {case: dict(module.state_dict())}

    def pipeline() -> PipelineStrategy:
        return PipelineStrategy(schedule="1F1B", num_microbatches=2)

    results = {
        **fit("ddp", "spectron", DDPStrategy(), batch_size=2),
        **fit("pipeline", "spectron", pipeline()),
        **fit("pipeline, product", "spectron, product", pipeline()),
        **fit("pipeline, embedding", "spectron, embedding", pipeline()),
        **fit("pipeline, muon embedding", "lora_muon, embedding", pipeline()),
        **fit("pipeline, kinds", "ranks by kind", pipeline()),
        **fit("ddp, lora_muon", "lora_muon", DDPStrategy(), batch_size=2),
        **fit("pipeline, lora_muon", "lora_muon", pipeline()),
        **fit("of one", "spectron", pipeline(), resume_from=checkpoint_of(folder / "one")),
    }
    for recipe, key in (
        ("spectron", "optimizer spectron"), ("lora_muon", "optimizer lora_muon"),
        ("product", "factor_decay product"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"splits each matrix, which model.{key}"):
            fit("sharded", recipe, FullySharded(), batch_size=2)
    mesh = init_device_mesh("cpu", (num_ranks,))
    sharded = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    with pytest.raises(TypeError, match="takes whole parameters, these are sharded"):
        Spectron([{"params": [sharded]}])
    return results


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_train_as_one_and_take_each_others_checkpoints(
    tmp_path: Path,
) -> None:
    one = {
        name: fit_recipe(tmp_path / folder, RECIPES[name]).state_dict()
        for folder, name in (
            ("one", "spectron"),
            ("one, product", "spectron, product"),
            ("one, muon", "lora_muon"),
            ("one, embedding", "spectron, embedding"),
            ("one, muon embedding", "lora_muon, embedding"),
            ("one, kinds", "ranks by kind"),
        )
    }
    per_rank = run_ranks(_on_two, 2, str(tmp_path), timeout_s=300)
    cases = {"ddp": "spectron", "pipeline": "spectron", "of one": "spectron"}
    cases |= {"ddp, lora_muon": "lora_muon", "pipeline, lora_muon": "lora_muon"}
    cases |= {
        "pipeline, product": "spectron, product",
        "pipeline, embedding": "spectron, embedding",
        "pipeline, muon embedding": "lora_muon, embedding",
        "pipeline, kinds": "ranks by kind",
    }
    for case, recipe in cases.items():
        truth, seen = one[recipe], set[str]()
        for results in per_rank:
            for key, weight in results[case].items():
                torch.testing.assert_close(weight, truth[key], rtol=0, atol=1e-10)
            seen |= results[case].keys()
        assert seen == truth.keys()
    for case, folder in (
        ("pipeline", "one"),
        ("pipeline, embedding", "one, embedding"),
        ("pipeline, muon embedding", "one, muon embedding"),
        ("pipeline, kinds", "one, kinds"),
    ):
        path = checkpoint_of(tmp_path / case)
        ours = torch.load(path, weights_only=True)["optimizer_states"]
        theirs = torch.load(checkpoint_of(tmp_path / folder), weights_only=True)["optimizer_states"]
        torch.testing.assert_close(ours[0]["state"], theirs[0]["state"], rtol=0, atol=1e-10)
        recipe = cases[case]
        back = fit_recipe(tmp_path / "back", RECIPES[recipe], resume_from=path).state_dict()
        for key, weight in one[recipe].items():
            torch.testing.assert_close(back[key], weight, rtol=0, atol=1e-10)
