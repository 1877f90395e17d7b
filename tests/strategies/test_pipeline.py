"""A network parted over gloo processes trains as on one device, step for step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.strategies import DDPStrategy

from fingpt_lightning.modules import LowRankPretraining, QuantizedFinetuning
from fingpt_lightning.modules.base_model import RandomLlama
from fingpt_lightning.pipeline import Schedule
from fingpt_lightning.profiling.memory import module_memory
from fingpt_lightning.strategies import PipelineStrategy
from tests.modules.test_several_devices import LossReader, whole_copy
from tests.support.lightning_ranks import RanksEnvironment
from tests.support.ranks import run_ranks
from tests.support.token_data import TokenData

# Spawned ranks share two cores, perhaps with others.
# One process trains for all of its tests.
pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("pipeline, two ranks")]
NUM_STEPS, BATCH_SIZE, NUM_ROWS = 20, 4, 10
TIED: dict[str, Any] = {
    "preset": "gpt2-nano", "num_layers": 5, "width": 12, "num_heads": 3, "num_positions": 16,
    "rank": None, "learning_rate": 0.01, "warmup": 1,
}  # fmt: skip
LOW_RANK = TIED | {"rank": 3, "embedding_rank": 5}
ROUNDED = LOW_RANK | {"quantization_aware": "int8", "quantization_start": 0.5}
FP32: dict[str, Any] = {"plugins": []}
BF16: dict[str, Any] = {"plugins": [], "precision": "bf16-mixed"}


class StepReader(LossReader):
    """Keeps loss and gradient norm of each optimiser step."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        num_known = len(self.losses)
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        if len(self.losses) > num_known:
            self.norms.append(trainer.callback_metrics["train/gradient_norm"].item())


def fit_one(
    folder: Path,
    sizes: dict[str, Any],
    *,
    batch_size: int = BATCH_SIZE,
    save_at: int | None = None,
    resume_from: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Twenty clipped steps of two batches; the last of the three of an epoch has two rows."""
    torch.manual_seed(3)
    module = LowRankPretraining(**sizes)
    reader = StepReader()
    callbacks: list[Any] = [reader]
    if save_at is not None:
        callbacks.append(
            ModelCheckpoint(folder, "{step}", every_n_train_steps=save_at, save_top_k=-1)
        )
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_steps": NUM_STEPS, "max_epochs": -1,
        "accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0,
        "default_root_dir": folder, "callbacks": callbacks, "log_every_n_steps": 1,
        "enable_checkpointing": save_at is not None, "plugins": [DoublePrecision()],
    }  # fmt: skip
    trainer = Trainer(**(settings | options))
    data = TokenData(batch_size, NUM_ROWS)
    trainer.fit(module, datamodule=data, ckpt_path=resume_from, weights_only=True)
    held = module_memory(module, trainer.optimizers[0])
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    return {
        "losses": reader.losses,
        "norms": reader.norms,
        "weights": {name: whole_copy(weight) for name, weight in module.state_dict().items()},
        "held_bytes": list(held),
        "test/loss": tested["test/loss"],
        "tokens_seen": module.tokens_seen,
        "num_replicas": (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1),
    }


def _saved(folder: Path, step: int) -> Path:
    return folder / f"step={step}.ckpt"


def _strategy(schedule: str = "1F1B", **settings: Any) -> PipelineStrategy:
    return PipelineStrategy(schedule=schedule, **({"num_microbatches": 4} | settings))


def fit_on_ranks(folder: Path, num_ranks: int, strategy: Any, sizes: Any, **options: Any) -> Any:
    ranks: dict[str, Any] = {
        "strategy": strategy, "devices": num_ranks,
        "plugins": [RanksEnvironment(), *options.pop("plugins", [DoublePrecision()])],
    }  # fmt: skip
    return fit_one(folder, sizes, **ranks, **options)


def _on_two(process_rank: int, num_ranks: int, name: str) -> dict[str, Any]:
    folder = Path(name)

    def fit(case: str, strategy: Any, sizes: Any = TIED, **options: Any) -> dict[str, Any]:
        return {case: fit_on_ranks(folder / case, num_ranks, strategy, sizes, **options)}

    saved_by_four, saved_by_one = (_saved(folder / who, 8) for who in ("four", "one"))
    results: dict[str, Any] = {}
    for schedule in Schedule:
        results |= fit(schedule.value, _strategy(schedule))
        results |= fit(f"fp32 {schedule.value}", _strategy(schedule), **FP32)
    results |= fit("low rank", _strategy(activation_checkpointing="low_rank"), LOW_RANK)
    results |= fit("rounded", _strategy(), ROUNDED)
    results |= fit("rounded ddp", DDPStrategy(), ROUNDED, batch_size=2)
    results |= fit("bf16", _strategy(), **BF16)
    results |= fit("two of four", _strategy(), resume_from=saved_by_four, save_at=14)
    saved_by_two = _saved(folder / "two of four", 14)
    results |= fit("ddp of two", DDPStrategy(), resume_from=saved_by_two, batch_size=2)
    results |= fit("two of one", _strategy("ZBVZeroBubble"), resume_from=saved_by_one)
    results |= fit("two of sharded", _strategy(), resume_from=_saved(folder / "sharded", 8))
    return results


def _on_four(process_rank: int, num_ranks: int, name: str) -> dict[str, Any]:
    folder = Path(name)

    def fit(case: str, strategy: Any, **options: Any) -> dict[str, Any]:
        return {case: fit_on_ranks(folder / case, num_ranks, strategy, TIED, **options)}

    def two_by_two(schedule: str = "1F1B", **settings: Any) -> PipelineStrategy:
        return _strategy(schedule, pipeline_size=2, num_microbatches=2, **settings)

    results = {
        **fit("four", _strategy(blocks_per_stage=[2, 1, 1, 1]), save_at=8),
        **fit("two by two", two_by_two(), batch_size=2),
        **fit("sharded", two_by_two(data_parallel="shard"), batch_size=2, save_at=8),
    }
    for kind in ("replicate", "shard"):
        strategy = two_by_two("InterleavedZeroBubble", data_parallel=kind)
        results |= fit(f"bf16 {kind}", strategy, batch_size=2, max_steps=2, **BF16)
    return results | {"refusals": _refusals_of_shards()}


def _refusals_of_shards() -> list[str]:
    """Of modules whose matrices have to be whole."""
    built = LowRankPretraining(**TIED, vocab_size=23)
    built.configure_model()
    modules: list[LightningModule] = [
        LowRankPretraining(**LOW_RANK, optimizer="spectron"),
        LowRankPretraining(**ROUNDED),
        QuantizedFinetuning(random_base=RandomLlama(num_positions=400)),
        built,
    ]
    messages = []
    for module in modules:
        strategy = _strategy(pipeline_size=2, data_parallel="shard", num_microbatches=2)
        trainer = Trainer(
            accelerator="cpu", devices=4, strategy=strategy, plugins=[RanksEnvironment()],
            max_steps=2, logger=False, enable_checkpointing=False,
        )  # fmt: skip
        with pytest.raises(ValueError, match=r".") as error:
            trainer.fit(module, datamodule=TokenData(2, NUM_ROWS))
        messages.append(str(error.value))
    return messages


class Runs:
    """What one process and each of several ranks came to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tied = fit_one(folder / "one", TIED, save_at=8)
        self.low_rank = fit_one(folder / "low rank", LOW_RANK)
        self.rounded = fit_one(folder / "rounded", ROUNDED)
        self.bf16 = fit_one(folder / "bf16", TIED, **BF16)
        self.fp32 = fit_one(folder / "fp32", TIED, **FP32)
        self.four = run_ranks(_on_four, 4, str(folder), timeout_s=600)
        self.two = run_ranks(_on_two, 2, str(folder), timeout_s=600)

    def by_rank(self, case: str) -> Iterator[dict[str, Any]]:
        """The results of every rank in a case."""
        per_rank = self.two if case in self.two[0] else self.four
        return (results[case] for results in per_rank)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def assert_same(per_rank: Iterator[dict[str, Any]], truth: dict[str, Any]) -> None:
    seen = set()
    for ours in per_rank:
        num_steps = len(ours["losses"])
        assert num_steps > 0
        assert ours["losses"] == pytest.approx(truth["losses"][-num_steps:], rel=1e-10)
        assert ours["norms"] == pytest.approx(truth["norms"][-num_steps:], rel=1e-10)
        assert ours["test/loss"] == pytest.approx(truth["test/loss"], rel=1e-10)
        assert ours["tokens_seen"] == truth["tokens_seen"]
        for name, weight in ours["weights"].items():
            torch.testing.assert_close(weight, truth["weights"][name], rtol=0, atol=1e-10)
        seen |= ours["weights"].keys()
    assert seen == truth["weights"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("case", [schedule.value for schedule in Schedule])
def test_every_schedule_trains_as_one_device(runs: Runs, case: str) -> None:
    assert all(len(results["losses"]) == NUM_STEPS for results in runs.by_rank(case))
    assert_same(runs.by_rank(case), runs.tied)


@pytest.mark.slow
@pytest.mark.parametrize("case", [schedule.value for schedule in Schedule])
def test_losses_in_float32_are_those_of_one_device(runs: Runs, case: str) -> None:
    assert len(runs.fp32["losses"]) == NUM_STEPS
    for results in runs.by_rank(f"fp32 {case}"):
        assert results["losses"] == pytest.approx(runs.fp32["losses"], rel=1e-5)


@pytest.mark.slow
def test_four_ranks_and_two_pipelines_of_two_do_too(runs: Runs) -> None:
    for case, num_replicas in (("four", 1), ("two by two", 2), ("sharded", 2)):
        assert_same(runs.by_rank(case), runs.tied)
        assert [results["num_replicas"] for results in runs.by_rank(case)] == [num_replicas] * 4


@pytest.mark.slow
def test_a_recomputed_low_rank_network_does_too(runs: Runs) -> None:
    assert_same(runs.by_rank("low rank"), runs.low_rank)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rounded", "rounded ddp"])
def test_training_with_rounded_weights_does_too(runs: Runs, case: str) -> None:
    assert runs.rounded["losses"][-1] != pytest.approx(runs.low_rank["losses"][-1], rel=1e-8)
    assert_same(runs.by_rank(case), runs.rounded)


@pytest.mark.slow
def test_mixed_precision_is_that_of_one_device(runs: Runs) -> None:
    for results in runs.by_rank("bf16"):
        assert results["losses"] == pytest.approx(runs.bf16["losses"], rel=2e-2)
        assert results["losses"][0] == pytest.approx(runs.bf16["losses"][0], rel=1e-3)
        assert {weight.dtype for weight in results["weights"].values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "num_steps"),
    [("two of four", 12), ("ddp of two", 6), ("two of one", 12), ("two of sharded", 12)],
)
def test_a_run_goes_on_with_another_number_of_stages(runs: Runs, case: str, num_steps: int) -> None:
    assert {len(results["losses"]) for results in runs.by_rank(case)} == {num_steps}
    assert_same(runs.by_rank(case), runs.tied)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_of_stages_is_that_of_one_device(runs: Runs) -> None:
    path = _saved(runs.folder / "four", 8)
    one = fit_one(runs.folder / "one of four", TIED, resume_from=path)
    assert_same(iter([one]), runs.tied)
    ours, truth = (
        torch.load(_saved(runs.folder / who, 8), weights_only=True) for who in ("four", "one")
    )
    assert ours.keys() == truth.keys()
    assert list(ours["state_dict"]) == list(truth["state_dict"])
    embedding, head = (
        ours["state_dict"][f"network.{n}.weight"] for n in ("transformer.wte", "lm_head")
    )
    assert embedding.data_ptr() == head.data_ptr()
    loaded = LowRankPretraining.load_from_checkpoint(path, weights_only=True)
    assert loaded.state_dict().keys() == truth["state_dict"].keys()


@pytest.mark.slow
def test_a_checkpoint_of_shards_is_that_of_one_device(runs: Runs) -> None:
    ours, truth = (
        torch.load(_saved(runs.folder / who, 8), weights_only=True) for who in ("sharded", "one")
    )
    (optimizer,), (expected,) = ours["optimizer_states"], truth["optimizer_states"]
    assert list(ours["state_dict"]) == list(truth["state_dict"])
    assert optimizer["param_groups"] == expected["param_groups"]
    assert optimizer["state"]
    for found, wanted in (
        (ours["state_dict"], truth["state_dict"]),
        (optimizer["state"], expected["state"]),
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_a_rank_holds_its_share_of_a_stage(runs: Runs) -> None:
    whole_stages = [results["held_bytes"] for results in runs.by_rank("two by two")]
    shares = [results["held_bytes"] for results in runs.by_rank("sharded")]
    for stage in (0, 1):
        for whole_stage, *of_ranks in zip(
            whole_stages[stage], shares[stage], shares[stage + 2], strict=True
        ):
            assert sum(of_ranks) == pytest.approx(whole_stage, rel=0.02)  # counts of steps
            assert max(of_ranks) < 0.55 * whole_stage


@pytest.mark.slow
def test_shards_in_mixed_precision_sum_gradients_in_float32(runs: Runs) -> None:
    """Also where those of weights are computed apart."""
    whole_stage, shares = (list(runs.by_rank(f"bf16 {k}")) for k in ("replicate", "shard"))
    for ours, truth in zip(shares, whole_stage, strict=True):
        assert ours["losses"][0] == pytest.approx(truth["losses"][0], rel=1e-6)
        assert ours["norms"][0] == pytest.approx(truth["norms"][0], rel=1e-5)
        assert {weight.dtype for weight in ours["weights"].values()} == {torch.float32}


@pytest.mark.slow
def test_what_needs_whole_matrices_is_refused_on_shards(runs: Runs) -> None:
    for pairs, rounded, base, built in runs.by_rank("refusals"):
        assert (
            "splits each matrix, which model.optimizer spectron is not made for; set adamw" in pairs
        )
        assert "take ddp or PipelineStrategy with data_parallel replicate" in pairs
        assert "quantization_aware int8 rounds whole matrices" in rounded
        assert "splits each matrix, which a base under adapters is not made for" in base
        assert "data_parallel shard: LowRankPretraining holds its stages whole" in built


@pytest.mark.slow
def test_a_rank_holds_weights_gradients_and_optimiser_state_of_its_own_blocks(runs: Runs) -> None:
    per_rank = [results["held_bytes"] for results in runs.by_rank("four")]
    for whole, *shares in zip(runs.tied["held_bytes"], *per_rank, strict=True):
        assert sum(shares) >= whole  # either end has the embedding
        assert max(shares) < 0.55 * whole


def _trainer(**settings: Any) -> Trainer:
    options = {"devices": 2, "precision": "32-true"} | settings.pop("options", {})
    return Trainer(
        accelerator="cpu", strategy=PipelineStrategy(**settings), logger=False,
        enable_progress_bar=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pipeline_size": 3}, r"pipeline_size 3 x data_parallel_size 0 are not the 2 ranks"),
        ({"pipeline_size": 2, "data_parallel_size": 2}, r"2 x data_parallel_size 2 .* 2 ranks"),
        ({"options": {"devices": 1}}, "a pipeline has one: raise trainer.devices"),
        ({"data_parallel_size": 2}, "a pipeline has one"),
        ({"num_microbatches": 1}, "num_microbatches 1 is below the 2 stages of 1F1B"),
        ({"schedule": "1F2B"}, "did you mean 1F1B"),
        ({"num_virtual_stages": 2}, "1F1B has one stage a rank"),
        ({"options": {"precision": "16-true"}}, "16-true: float16 needs a gradient scaler"),
        ({"data_parallel": "shard"}, "data_parallel shard .* data_parallel_size is 1: raise"),
        ({"timeout_s": 0}, "timeout_s 0 is not a number of seconds above 0"),
        ({"pipeline_size": -1}, "pipeline_size -1 is below 1"),
        ({"num_microbatches": 0}, "num_microbatches 0 is below 1"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_process_is_started(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _trainer(**settings)


def _refusals(process_rank: int, num_ranks: int) -> list[str]:
    messages = []
    for sizes, strategy, batch_size in (
        (TIED, _strategy(num_microbatches=3), 4),
        (TIED | {"num_layers": 1}, _strategy(), 4),
        (TIED | {"compile": True}, _strategy("ZBVZeroBubble"), 4),
        (TIED, _strategy(blocks_per_stage=[3, 3]), 4),
        (TIED, PipelineStrategy(), 1),
    ):
        with pytest.raises(ValueError, match=r".") as error:
            fit_on_ranks(Path(), num_ranks, strategy, sizes, batch_size=batch_size)
        messages.append(str(error.value))
    return messages


def test_what_does_not_fit_the_data_or_the_network_is_refused_before_the_first_step() -> None:
    for messages in run_ranks(_refusals, 2, timeout_s=300):
        assert "num_microbatches 3 does not divide data.batch_size 4" in messages[0]
        assert "2 stages are more than the 1 blocks" in messages[1]
        assert "model.compile: ZBVZeroBubble takes the backward pass apart" in messages[2]
        assert "blocks_per_stage [3, 3]" in messages[3]
        assert "data.batch_size 1, cut into num_microbatches auto" in messages[4]
        assert "raise it to 2 or more, or take GPipe" in messages[4]
