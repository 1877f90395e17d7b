"""Every setting about blocks acts on every family's blocks, or is refused by name."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import DoublePrecision
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fingpt_lightning.low_rank import LowRankLinear, make_low_rank
from fingpt_lightning.models.adapting import adapted_layers
from fingpt_lightning.models.families import FAMILIES, Family
from fingpt_lightning.models.formats.hf_folder import write_network
from fingpt_lightning.models.quantization.frozen_matrix import FrozenMatrix
from fingpt_lightning.modules import LowRankPretraining, QuantizedFinetuning
from tests.models.tiny_models import TINY
from tests.support.exact_llama import exact_norms
from tests.support.token_data import TokenData

RATE = 0.01


class Seen(NamedTuple):
    """A module after one step, and what it was like in that step.

    ``before`` are the weights that it started with, ``moved`` those of the forward pass.
    """

    module: Any
    family: Family
    before: dict[str, Tensor]
    moved: dict[str, Tensor]
    guided: set[str]

    @property
    def network(self) -> Any:
        return self.module.network

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.network.get_submodule(self.family.blocks))

    def groups(self, mark: str) -> list[dict[str, Any]]:
        """The optimiser's groups with a mark."""
        (optimizer,) = self.module.trainer.optimizers
        return [group for group in optimizer.param_groups if group.get(mark)]

    def layers(self, kind: type) -> set[str]:
        return {name for name, layer in self.network.named_modules() if isinstance(layer, kind)}

    def expected(self, *layers: str) -> set[str]:
        """Full names of layers of both blocks."""
        return {self.family.layer_name(block, layer) for block in (0, 1) for layer in layers}


class _Watch(Callback):
    """Notes what the first step computes with."""

    def __init__(self) -> None:
        self.moved: dict[str, Tensor] = {}
        self.guided: set[str] = set()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        network: Any = pl_module.network
        named = network.named_modules()
        self.guided = {n for n, m in named if isinstance(m, LowRankLinear) and m.guide is not None}

        def note(*_: Any) -> None:
            for name, parameter in network.named_parameters():
                self.moved.setdefault(name, parameter.detach().clone())

        network.base_model.register_forward_pre_hook(note)


class _Pretraining(LowRankPretraining):
    def configure_model(self) -> None:
        super().configure_model()
        if self.network.config.model_type != "gpt2":
            exact_norms(self.network)


def _step(module: Any, family: Family, folder: Path, *, exact: bool = True) -> Seen:
    before: dict[str, Tensor] = {}
    watch = _Watch()

    class Start(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            network: Any = pl_module.network
            before.update({n: p.detach().clone() for n, p in network.named_parameters()})

    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        default_root_dir=folder, callbacks=[Start(), watch],
        plugins=[DoublePrecision()] if exact else [],
    )  # fmt: skip
    trainer.fit(module, datamodule=TokenData(4))
    return Seen(module, family, before, watch.moved, watch.guided)


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def mixed(family: Family, tmp_path: Path) -> Path:
    """A folder whose MLPs are low-rank and whose attention is dense."""
    network = TINY[family.model_type]().double()
    assert len(make_low_rank(network, 3, family.mlp).ranks) == 2 * len(family.mlp)
    (tmp_path / "mixed").mkdir()
    write_network(network, tmp_path / "mixed", torch.float64)
    return tmp_path / "mixed"


def _recomputes(seen: Seen) -> bool:
    assert all(isinstance(block, GradientCheckpointingLayer) for block in seen.blocks)
    return all(block.gradient_checkpointing for block in seen.blocks)


def _is_compiled(seen: Seen) -> bool:
    return all(block._compiled_call_impl is not None for block in seen.blocks)


def _moves_dense_matrices(seen: Seen) -> bool:
    """By the orthogonalised step: all singular values of each move are near the rate."""
    (group,) = seen.groups("is_dense")
    named = {id(p): name for name, p in seen.network.named_parameters()}
    names = {named[id(p)] for p in group["params"]}
    assert names == {f"{name}.weight" for name in seen.expected(*seen.family.attention)}
    after = dict(seen.network.named_parameters())
    for name in names:
        move = after[name].detach() - seen.before[name]
        values = torch.linalg.svdvals(move) / RATE
        # A gradient of four rows of few tokens has no more directions than these have tokens.
        assert 0.6 < float(values[0]) < 1.25, name
        assert int((values > 0.6).sum()) > min(8, len(values) - 3), name
    return True


def _rounds(seen: Seen) -> bool:
    """Each matrix of the blocks has few values in the pass, and its own ones after it."""
    for name, parameter in seen.moved.items():
        if seen.family.is_in_block(name) and parameter.ndim == 2:
            assert not torch.equal(parameter, seen.before[name]), name
    return True


class Row(NamedTuple):
    """Settings, and what they do: an effect, or a refusal per family (under "" of all)."""

    settings: dict[str, Any]
    acts: Callable[[Seen], bool] | None = None
    refused: dict[str, str] = {}  # noqa: RUF012
    has_step: bool = True


def _decided(**settings: Any) -> Row:
    ((name, value),) = settings.items()
    return Row(settings, refused={"": f"{name} .*{value}.*: init_from .* decides the architecture"})


PRETRAINING: dict[str, Row] = {
    "preset": _decided(preset="gpt2-nano"),
    "architecture": _decided(architecture="config.json"),
    "rank": _decided(rank=4),
    "rank_overrides": Row(
        {"rank_overrides": {"*.mlp.*": 2}}, refused={"": "rank_overrides .*: init_from .* decides"}
    ),
    "rank_multiple": _decided(rank_multiple=4),
    "embedding_rank": _decided(embedding_rank=4),
    "compression": _decided(compression=2.0),
    "recipe": _decided(recipe="narrow"),
    "num_layers": _decided(num_layers=3),
    "width": _decided(width=24),
    "num_heads": _decided(num_heads=2),
    "num_positions": _decided(num_positions=32),
    "vocab_size": _decided(vocab_size=23),
    "initialization": _decided(initialization="cola"),
    "factor_activation": _decided(factor_activation="silu"),
    "factor_expansion": _decided(factor_expansion=0.5),
    "init_from": Row(
        {}, lambda seen: seen.layers(LowRankLinear) == seen.expected(*seen.family.mlp)
    ),
    "dropout": Row(
        {"dropout": 0.3},
        lambda seen: {m.p for b in seen.blocks for m in b.modules() if isinstance(m, nn.Dropout)}
        == {0.3},
        {
            name: rf"dropout 0\.3: a {family.title} has no dropout"
            for name, family in FAMILIES.items()
            if not family.dropouts
        },
    ),
    "recompute": Row({"recompute": "block"}, _recomputes),
    "recompute, low_rank": Row({"recompute": "low_rank"}, _recomputes),
    "compile": Row(
        {"compile": True},
        _is_compiled,
        has_step=False,  # the compiler takes a minute
    ),
    "residual_dtype": Row(
        {"residual_dtype": "bfloat16"},
        lambda seen: all(len(block._forward_pre_hooks) == 1 for block in seen.blocks),
        has_step=False,  # the steps here are in float64
    ),
    "residual_dtype, without effect": Row(
        {"residual_dtype": "bfloat16"},
        refused={"": "residual_dtype bfloat16 has no effect with trainer.precision 64-true: set b"},
    ),
    "self_guided": Row(
        {"self_guided": 1.0}, lambda seen: seen.guided == seen.expected(*seen.family.mlp)
    ),
    "factor_decay": Row(
        {"factor_decay": "product"},
        lambda seen: len(seen.groups("product_decay")[0]["params"]) == 4 * len(seen.family.mlp),
    ),
    "optimizer": Row(
        {"optimizer": "spectron"},
        lambda seen: len(seen.groups("is_low_rank")[0]["params"]) == 4 * len(seen.family.mlp),
    ),
    "spectron_learning_rate": Row(
        {"optimizer": "spectron", "spectron_learning_rate": 0.02},
        lambda seen: seen.groups("is_low_rank")[0]["initial_lr"] == 0.02,
    ),
    "spectron_momentum": Row(
        {"optimizer": "spectron", "spectron_momentum": 0.5},
        lambda seen: seen.groups("is_low_rank")[0]["momentum"] == 0.5,
    ),
    "spectron_adjust_lr": Row(
        {"optimizer": "spectron", "spectron_adjust_lr": "original"},
        lambda seen: seen.groups("is_low_rank")[0]["adjust_lr"] == "original",
    ),
    "embedding_optimizer": Row(
        {"optimizer": "spectron", "embedding_optimizer": "same"},
        refused={"": "embedding_optimizer same is about factors of the embedding, and here it is"},
    ),
    "head_map": Row(
        {"head_map": "own"},
        refused={"": "head_map own: init_from .* decides the architecture; leave head_map at sh"},
    ),
    "embedding_learning_rate": Row(
        {"embedding_learning_rate": 0.25},
        lambda seen: (
            {id(p) for p in seen.network.get_input_embeddings().parameters()}
            <= {
                id(p)
                for group in seen.module.trainer.optimizers[0].param_groups
                for p in group["params"]
                if group["initial_lr"] == 0.25
            }
        ),
    ),
    "spectron_dense": Row(
        {
            "optimizer": "spectron", "spectron_dense": True, "spectron_learning_rate": RATE,
            "weight_decay": 0.0, "warmup": 0,
        },
        _moves_dense_matrices,
    ),
    "optimizer, lora_muon": Row(
        {"optimizer": "lora_muon"},
        lambda seen: len(seen.groups("is_low_rank")[0]["params"]) == 4 * len(seen.family.mlp),
    ),
    "lora_muon_learning_rate": Row(
        {"optimizer": "lora_muon", "lora_muon_learning_rate": 0.03},
        lambda seen: seen.groups("is_low_rank")[0]["initial_lr"] == 0.03,
    ),
    "lora_muon_momentum": Row(
        {"optimizer": "lora_muon", "lora_muon_momentum": 0.5},
        lambda seen: seen.groups("is_low_rank")[0]["momentum"] == 0.5,
    ),
    "lora_muon_dense": Row(
        {
            "optimizer": "lora_muon", "lora_muon_dense": True, "lora_muon_learning_rate": RATE,
            "weight_decay": 0.0, "warmup": 0,
        },
        _moves_dense_matrices,
    ),
    "quantization_aware": Row({"quantization_aware": "int8", "quantization_start": 0.0}, _rounds),
    "quantization_start": Row(
        {"quantization_aware": "nf4", "quantization_start": 1.0},
        lambda seen: all(torch.equal(x, seen.before[name]) for name, x in seen.moved.items()),
    ),
}  # fmt: skip
PRETRAINING_ALIKE = {
    "loss_chunk_size", "learning_rate", "final_learning_rate_ratio", "warmup", "weight_decay",
    "beta1", "beta2", "schedule", "cooldown", "teacher", "teacher_quantize",
    "teacher_dtype", "teacher_weight", "teacher_temperature",
}  # fmt: skip
"""Settings that treat all parameters alike, or the head alone."""


def _options(seen: Seen) -> set[Any]:
    return {layer.options for layer in adapted_layers(seen.network).values()}


def _is_adapted(seen: Seen, *layers: str) -> bool:
    return adapted_layers(seen.network).keys() == seen.expected(*layers)


FINETUNING: dict[str, Row] = {
    "base": Row({}, lambda seen: _is_adapted(seen, *seen.family.linear_layers)),
    "quantize": Row(
        {"quantize": "int8"},
        lambda seen: (
            seen.layers(FrozenMatrix)
            == {f"{name}.base_layer" for name in seen.expected(*seen.family.linear_layers)}
        ),
    ),
    "rank": Row({"rank": 2}, lambda seen: {x.rank for x in _options(seen)} == {2}),
    "alpha": Row({"alpha": 5.0}, lambda seen: {x.scale for x in _options(seen)} == {5 / 3}),
    "dropout": Row({"dropout": 0.2}, lambda seen: {x.dropout for x in _options(seen)} == {0.2}),
    "rslora": Row({"rslora": True}, lambda seen: {x.rslora for x in _options(seen)} == {True}),
    "dora": Row(
        {"dora": True},
        lambda seen: all(
            layer.lora_magnitude_vector is not None and layer.lora_magnitude_vector.grad is not None
            for layer in adapted_layers(seen.network).values()
        ),
    ),
    "target_modules": Row(
        {"target_modules": lambda family: [family.attention[0], family.mlp[-1]]},
        lambda seen: _is_adapted(seen, seen.family.attention[0], seen.family.mlp[-1]),
    ),
    "target_modules, wrong": Row(
        {"target_modules": ["c_atn"]},
        refused={"": "target_modules 'c_atn' matches no linear layer; there are"},
    ),
    "recompute": Row({"recompute": "block"}, _recomputes),
    "recompute, offload": Row({"recompute": "offload"}, _recomputes),
    "compile": Row({"compile": True}, _is_compiled, has_step=False),
    "compile, offload": Row(
        {"compile": True, "recompute": "offload"},
        refused={"": "compile true with recompute offload: .* take recompute block"},
    ),
}
FINETUNING_ALIKE = {
    "revision", "dtype", "learning_rate", "lora_plus_ratio", "final_learning_rate_ratio",
    "warmup", "weight_decay", "beta1", "beta2", "optimizer", "supervised_logits_only",
    "kl_weight", "kl_positions", "loss_chunk_size", "random_base", "teacher", "teacher_quantize",
    "teacher_dtype", "teacher_weight", "teacher_temperature",
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "rows", "alike"),
    [
        (LowRankPretraining, PRETRAINING, PRETRAINING_ALIKE),
        (QuantizedFinetuning, FINETUNING, FINETUNING_ALIKE),
    ],
)
def test_every_setting_has_its_row(
    module: type[LightningModule], rows: dict[str, Row], alike: set[str]
) -> None:
    walked = {name.partition(",")[0] for name in rows}
    assert not walked & alike
    settings = set(inspect.signature(module.__init__).parameters) - {"self"}
    assert walked | alike == settings


def _walk(row: Row, family: Family, run: Callable[[dict[str, Any]], Seen]) -> None:
    settings = {
        name: value(family) if callable(value) else value for name, value in row.settings.items()
    }
    refusal = row.refused.get(family.model_type, row.refused.get(""))
    if refusal is not None:
        with pytest.raises(ValueError, match=refusal):
            run(settings)
        return
    assert row.acts is not None
    assert row.acts(run(settings))


# What torch.compile imports.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", PRETRAINING)
def test_a_setting_of_pretraining_acts_on_every_family_or_is_refused(
    name: str, family: Family, mixed: Path, tmp_path: Path
) -> None:
    def run(settings: dict[str, Any]) -> Seen:
        torch.manual_seed(3)
        module = _Pretraining(init_from=str(mixed), **({"learning_rate": RATE} | settings))
        if row.has_step:
            return _step(module, family, tmp_path)
        module.configure_model()
        return Seen(module, family, {}, {}, set())

    row = PRETRAINING[name]
    _walk(row, family, run)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", FINETUNING)
def test_a_setting_of_finetuning_acts_on_every_family_or_is_refused(
    name: str, family: Family, tmp_path: Path
) -> None:
    TINY[family.model_type]().save_pretrained(tmp_path / "base")
    plain: dict[str, Any] = {"quantize": None, "dtype": "float32", "rank": 3}

    def run(settings: dict[str, Any]) -> Seen:
        torch.manual_seed(3)
        module = QuantizedFinetuning(base=str(tmp_path / "base"), **(plain | settings))
        if row.has_step:
            return _step(module, family, tmp_path, exact=False)
        module.configure_model()
        return Seen(module, family, {}, {}, set())

    row = FINETUNING[name]
    _walk(row, family, run)
