"""Every way to train, under every schedule: two ranks end with the weights of one process."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import DoublePrecision
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fingpt_lightning.modules import LowRankPretraining, QuantizedFinetuning
from fingpt_lightning.pipeline import Schedule
from fingpt_lightning.strategies import PipelineStrategy
from tests.models.tiny_models import VOCABULARY
from tests.modules.test_recipes import RECIPES, SIZES
from tests.support.exact_llama import exact_norms
from tests.support.lightning_ranks import RanksEnvironment
from tests.support.ranks import run_ranks
from tests.support.token_data import TokenData

NUM_STEPS = 2  # of which half are guided
PRETRAINING: dict[str, dict[str, Any]] = {
    "plain": {},
    **RECIPES,
    "guided, rounded": {
        "self_guided": 0.5,
        "quantization_aware": "int8",
        "quantization_start": 0.5,
        "recompute": "block",
    },
    "recomputed": {"recompute": "low_rank", "self_guided": 0.5},
    "narrow, recomputed": RECIPES["narrow"] | {"recompute": "block"},
}
# Cells that are refused, by recipe, under the schedules that take the backward pass apart.
REFUSED = {"recomputed": "model.recompute low_rank: .* takes the backward pass apart"}
FINETUNING: dict[str, dict[str, Any]] = {
    "lora": {"recompute": "block"},
    "dora": {"dora": True, "rslora": True, "lora_plus_ratio": 4.0},
}
# How each family is cut is walked by benchmarks/families.py.
CASES = [
    *PRETRAINING,
    *(f"{family}: {kind}" for family in ("gpt2", "llama") for kind in FINETUNING),
]


class _Finetuning(QuantizedFinetuning):
    """Its norms compute in float64, where its weights are."""

    def configure_model(self) -> None:
        super().configure_model()
        if self.network.config.model_type == "llama":
            exact_norms(self.network)


def _save_bases(folder: Path) -> None:
    """Bases of four blocks whose linear layers have a bias, in both families."""
    torch.manual_seed(2)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    gpt2 = GPT2Config(n_layer=4, n_embd=12, n_head=3, n_positions=16, **sizes)
    llama = LlamaConfig(
        num_hidden_layers=4, hidden_size=12, intermediate_size=20, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=16, attention_bias=True, mlp_bias=True,
        **sizes,
    )  # fmt: skip
    for network in (GPT2LMHeadModel(gpt2), LlamaForCausalLM(llama)):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        network.save_pretrained(folder / network.config.model_type)


def _module(case: str, folder: Path) -> LightningModule:
    torch.manual_seed(3)
    if case in PRETRAINING:
        return LowRankPretraining(**(SIZES | {"num_layers": 4} | PRETRAINING[case]))
    family, kind = case.split(": ")
    return _Finetuning(
        base=str(folder / family), quantize=None, dtype="float64", rank=3, learning_rate=0.01,
        warmup=1, **FINETUNING[kind],
    )  # fmt: skip


def _is_exact(case: str) -> bool:
    return PRETRAINING.get(case, {}).get("optimizer") != "adamw_8bit"


def _weights(case: str, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """After two clipped steps."""
    # bitsandbytes keeps no state of float64.
    plugins = [*options.pop("plugins", []), *([DoublePrecision()] if _is_exact(case) else [])]
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_steps": NUM_STEPS, "max_epochs": -1,
        "gradient_clip_val": 0.5, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "limit_val_batches": 0, "enable_checkpointing": False,
        "default_root_dir": folder,
    }  # fmt: skip
    trainer = Trainer(**(settings | options), plugins=plugins)
    module = _module(case, folder)
    trainer.fit(module, datamodule=TokenData(4))
    # Maps beside a rank's copy of a shared table, which another rank runs and trains.
    elsewhere: frozenset[str] = getattr(trainer.strategy, "_not_run", frozenset())
    return {
        name: tensor.detach().clone()
        for name, tensor in module.state_dict().items()
        if name not in elsewhere
    }


def _on_two(process_rank: int, num_ranks: int, name: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for case, schedule in itertools.product(CASES, Schedule):
        options: dict[str, Any] = {
            "strategy": PipelineStrategy(schedule=schedule.value, num_microbatches=4),
            "devices": num_ranks, "plugins": [RanksEnvironment()],
        }  # fmt: skip
        try:
            if case in REFUSED and schedule.splits_backward:
                with pytest.raises(ValueError, match=REFUSED[case]):
                    _weights(case, Path(name), **options)
            else:
                results[f"{case} / {schedule.value}"] = _weights(case, Path(name), **options)
        except Exception as error:
            error.add_note(f"{case} under {schedule.value}")
            raise
    return results


def _differing(per_rank: list[dict[str, Any]], truths: dict[str, Any]) -> Iterator[str]:
    for cell in per_rank[0]:
        case = cell.partition(" / ")[0]
        truth, tolerance = truths[case], 1e-10 if _is_exact(case) else 1e-3
        seen = set[str]()
        for results in per_rank:
            for key, weight in results[cell].items():
                if not torch.allclose(weight, truth[key], rtol=0, atol=tolerance):
                    yield f"{cell}: {key} by {(weight - truth[key]).abs().max():.2g}"
            seen |= results[cell].keys()
        if seen != truth.keys():
            yield f"{cell}: {sorted(seen ^ truth.keys())[0]}"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_every_recipe_trains_under_every_schedule_as_in_one_process(tmp_path: Path) -> None:
    _save_bases(tmp_path)
    truths = {case: _weights(case, tmp_path) for case in CASES}
    per_rank = run_ranks(_on_two, 2, str(tmp_path), timeout_s=800)
    num_refused = len(REFUSED) * sum(schedule.splits_backward for schedule in Schedule)
    assert len(per_rank[0]) == len(CASES) * len(Schedule) - num_refused
    assert list(_differing(per_rank, truths)) == []
