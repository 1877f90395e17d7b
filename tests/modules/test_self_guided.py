import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.models.expansion import expand
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.modules import LowRankPretraining
from fingpt_lightning.strategies import FullySharded, PipelineStrategy
from tests.models.tiny_models import ids
from tests.modules.test_recipes import NUM_STEPS, SIZES, checkpoint_of, fit_recipe
from tests.reference.guided_run import guided_run
from tests.support.lightning_ranks import RanksEnvironment
from tests.support.ranks import run_ranks
from tests.support.token_data import TokenData

GUIDED: dict[str, Any] = {"self_guided": 0.5}  # three of six steps
# One of two ranks has no pairs then.
DENSE_FRONT: dict[str, Any] = GUIDED | {"rank_overrides": {"*.h.0.*": None}}
LONGER: dict[str, Any] = {"self_guided": 0.8}  # five: the checkpoint of the fourth step has guides
KEY = "transformer.h.1.attn.c_proj"
pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


class _Steps(Callback):
    """What is held after each step, as a callback sees it."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self.num_guides: list[int] = []
        self.num_in_optimizer: list[tuple[int, int]] = []
        self.guides: list[weakref.ref[Any]] = []

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.guides:
            self.guides = [weakref.ref(layer.guide) for layer in _guided(pl_module)]

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        guided = _guided(pl_module)
        self.num_guides.append(len(guided))
        self.shares.extend({float(_share(layer)) for layer in guided})
        (optimizer,) = trainer.optimizers
        grouped = [p for group in optimizer.param_groups for p in group["params"]]
        self.num_in_optimizer.append((len(grouped), len(optimizer.state)))


def _checkpoints(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1)


def _guided(module: nn.Module) -> list[LowRankLinear]:
    pairs = (m for m in module.modules() if isinstance(m, LowRankLinear))
    return [pair for pair in pairs if pair.guide is not None]


def _share(layer: LowRankLinear) -> Tensor:
    assert layer.guide_share is not None
    return layer.guide_share


def _start(**settings: Any) -> LowRankPretraining:
    """The module of `fit_recipe` before its first step, in float64."""
    torch.manual_seed(3)
    module = LowRankPretraining(**(SIZES | settings | {"vocab_size": 23}))
    with DoublePrecision().module_init_context():
        module.configure_model()
    return module


def test_steps_are_those_of_the_formulas_in_float64(tmp_path: Path) -> None:
    settings = GUIDED | {"embedding_rank": None, "rank_overrides": {"*.h.0.mlp.c_fc": None}}
    ours = fit_recipe(tmp_path, settings).network.state_dict()
    start = dict(_start(**settings).network.named_parameters())
    dense = _start(**settings).network
    expand(dense)
    conv = {name for name, module in dense.named_modules() if type(module).__name__ == "Conv1D"}
    stored_so = {
        name: tensor.T if name in {f"{layer}.weight" for layer in conv} else tensor
        for name, tensor in start.items()
    }

    def logits(weights: dict[str, Tensor], input_ids: Tensor) -> Tensor:
        own = {
            name: tensor.T if name.removesuffix(".weight") in conv else tensor
            for name, tensor in weights.items()
        }
        result: Tensor = functional_call(dense, own, (input_ids,), {"use_cache": False}).logits
        return result

    data = TokenData(4)
    batches = [(batch["input_ids"], batch["labels"]) for batch in data.train_dataloader()]
    truth = guided_run(
        logits, stored_so, (batches * NUM_STEPS)[:NUM_STEPS], guided_steps=3, peak_lr=0.01,
        final_ratio=0.1, betas=(0.9, 0.95), decay=0.1, clip=0.5,
    )  # fmt: skip
    assert truth.keys() | {"lm_head.weight"} == ours.keys()
    for name, tensor in truth.items():
        expected = tensor.T if name.removesuffix(".weight") in conv else tensor
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-9)


def test_the_last_guided_step_leaves_nothing_of_the_guides(tmp_path: Path) -> None:
    steps = _Steps()
    module = fit_recipe(tmp_path, GUIDED, callbacks=[steps], enable_checkpointing=False)
    assert steps.shares == pytest.approx([1.0, 0.75])
    # Before a callback could write a checkpoint of that step.
    assert steps.num_guides == [8, 8, 0, 0, 0, 0]
    num_parameters = len(list(module.parameters()))
    assert steps.num_in_optimizer == [(num_parameters + 8,) * 2] * 2 + [(num_parameters,) * 2] * 4
    gc.collect()
    assert len(steps.guides) == 8
    assert all(guide() is None for guide in steps.guides)
    assert not list(module.buffers())
    plain = _start()
    assert module.state_dict().keys() == plain.state_dict().keys()


def test_recomputing_and_accumulating_change_nothing(tmp_path: Path) -> None:
    truth = fit_recipe(tmp_path, GUIDED).state_dict()
    again = fit_recipe(tmp_path, GUIDED | {"recompute": "low_rank"}).state_dict()
    halves = fit_recipe(
        tmp_path, GUIDED, batch_size=2, accumulate_grad_batches=2, callbacks=[],
        enable_checkpointing=False,
    ).state_dict()  # fmt: skip
    for key, weight in truth.items():
        torch.testing.assert_close(again[key], weight, rtol=0, atol=1e-12)
        torch.testing.assert_close(halves[key], weight, rtol=0, atol=1e-10)


def test_a_checkpoint_past_the_guided_steps_resumes_without_guides(tmp_path: Path) -> None:
    whole = fit_recipe(tmp_path / "one", GUIDED).state_dict()
    saved = torch.load(checkpoint_of(tmp_path / "one"), weights_only=True)
    assert saved["state_dict"].keys() == whole.keys()
    steps = _Steps()
    resumed = fit_recipe(
        tmp_path / "two", GUIDED, resume_from=checkpoint_of(tmp_path / "one"),
        callbacks=[_checkpoints(tmp_path), steps],
    ).state_dict()  # fmt: skip
    assert steps.num_guides == [0, 0]
    for key, weight in whole.items():
        assert torch.equal(resumed[key], weight), key


def test_fewer_guided_steps_than_a_checkpoint_has_end_at_once_and_none_are_refused(
    tmp_path: Path,
) -> None:
    fit_recipe(tmp_path, LONGER)
    steps = _Steps()
    fit_recipe(
        tmp_path, GUIDED, resume_from=checkpoint_of(tmp_path),
        callbacks=[_checkpoints(tmp_path / "two"), steps],
    )  # fmt: skip
    assert steps.num_guides == [0, 0]
    with pytest.raises(ValueError, match=r"self_guided is 0.0, the checkpoint is from .* with 0.8"):
        fit_recipe(tmp_path, {}, resume_from=checkpoint_of(tmp_path))


def test_a_checkpoint_of_a_guided_step_is_read_as_its_pairs_alone(tmp_path: Path) -> None:
    validated: dict[str, Any] = {"limit_val_batches": 2, "check_val_every_n_epoch": 2}
    module = fit_recipe(tmp_path, LONGER, **validated)
    loss = module.trainer.callback_metrics["val/loss"]
    path = checkpoint_of(tmp_path)
    assert len([key for key in torch.load(path, weights_only=True)["state_dict"] if "guide" in key])
    message = (
        r"from the guided steps of a run \(model.self_guided\): its low-rank layers are taken"
        " without"
    )
    with pytest.warns(UserWarning, match=message):
        again = LowRankPretraining.load_from_checkpoint(path, weights_only=True)
    with pytest.warns(UserWarning, match=f"step=4.ckpt is {message}"):
        source = load_model(path, dtype="float64")
    assert not _guided(again)
    assert not _guided(source.network)
    truth = source.network(ids()).logits
    torch.testing.assert_close(again.eval().network(ids()).logits.double(), truth)
    pair = source.network.get_submodule(KEY)
    saved = torch.load(path, weights_only=True)["state_dict"]
    torch.testing.assert_close(pair.up.double(), saved[f"network.{KEY}.up"])
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
        plugins=[DoublePrecision()], callbacks=[_checkpoints(tmp_path)],
    )  # fmt: skip
    fresh = LowRankPretraining(**(SIZES | LONGER))
    with pytest.warns(UserWarning, match=message):
        (found,) = trainer.validate(
            fresh, datamodule=TokenData(4), ckpt_path=path, verbose=False, weights_only=True
        )
    assert found["val/loss"] == pytest.approx(loss.item(), abs=1e-9)
    export(source._replace(tokenizer=None), "low_rank", tmp_path / "out", tolerance=1.0)
    read = load_model(tmp_path / "out", dtype="float64").network
    torch.testing.assert_close(read(ids()).logits, truth, rtol=0, atol=1e-5)


def test_guiding_without_pairs_is_refused(tmp_path: Path) -> None:
    module = fit_recipe(tmp_path, {"rank": None, "embedding_rank": None})
    module.trainer.save_checkpoint(tmp_path / "dense.ckpt")
    for settings in ({"rank": None}, {"rank": 12}):
        with pytest.raises(
            ValueError, match=r"model.self_guided 0.5 is about low-rank layers, and "
        ):
            fit_recipe(tmp_path, GUIDED | settings)
    on = LowRankPretraining(init_from=str(tmp_path / "dense.ckpt"), **GUIDED)
    with pytest.raises(
        ValueError, match=r"self_guided 0.5 is about low-rank layers, and the network has no"
    ):
        on.configure_model()


def _on_two(process_rank: int, num_ranks: int, name: str) -> dict[str, Any]:
    folder = Path(name)

    def fit(
        case: str, strategy: Any, settings: dict[str, Any] = LONGER, **options: Any
    ) -> dict[str, Any]:
        ranks: dict[str, Any] = {
            "strategy": strategy, "devices": num_ranks,
            "plugins": [RanksEnvironment(), DoublePrecision()],
        }  # fmt: skip
        module = fit_recipe(folder / case, settings, **ranks, **options)
        assert not _guided(module)
        return {case: dict(module.state_dict())}

    def pipeline(schedule: str = "1F1B") -> PipelineStrategy:
        return PipelineStrategy(schedule=schedule, num_microbatches=2)

    one = checkpoint_of(folder / "one")
    results = {
        **fit("ddp", DDPStrategy(), batch_size=2),
        **fit("ddp of one", DDPStrategy(), batch_size=2, resume_from=one),
        **fit("pipeline", pipeline()),
        **fit("pipeline of one", pipeline(), resume_from=one),
        **fit("pipeline past", pipeline(), GUIDED, resume_from=checkpoint_of(folder / "past")),
        **fit("pipeline, dense front", pipeline(), DENSE_FRONT),
    }
    with pytest.raises(ValueError, match=r"splits each matrix, which model.self_guided 0.8"):
        fit("sharded", FullySharded(), batch_size=2)
    return results


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_are_guided_as_one_and_take_each_others_checkpoints(tmp_path: Path) -> None:
    longer = fit_recipe(tmp_path / "one", LONGER).state_dict()
    past = fit_recipe(tmp_path / "past", GUIDED).state_dict()
    dense_front = fit_recipe(tmp_path / "dense front", DENSE_FRONT).state_dict()
    others = {"pipeline past": past, "pipeline, dense front": dense_front}
    per_rank = run_ranks(_on_two, 2, str(tmp_path), timeout_s=300)
    for case in per_rank[0]:
        truth = others.get(case, longer)
        seen = set[str]()
        for results in per_rank:
            for key, weight in results[case].items():
                torch.testing.assert_close(weight, truth[key], rtol=0, atol=1e-10)
            seen |= results[case].keys()
        assert seen == truth.keys(), case
    for case in ("ddp", "pipeline"):
        path = checkpoint_of(tmp_path / case)
        back = fit_recipe(tmp_path / "back", LONGER, resume_from=path).state_dict()
        for key, weight in longer.items():
            torch.testing.assert_close(back[key], weight, rtol=0, atol=1e-10)
