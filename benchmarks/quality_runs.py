"""The grid of the quality benchmark, and one training run of it."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from fingpt_lightning.data import TextBlocks
from fingpt_lightning.metric_keys import VAL_LOSS
from fingpt_lightning.modules import LowRankPretraining
from fingpt_lightning.units import MIB

_NUM_POINTS = 10
TUNING = "tuning"
"""The stage in which rates are tried."""
REST = "learning_rate"
"""The setting of `LowRankPretraining` that moves what the optimizer of the matrices does not."""


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Args:
        name: Name of its row.
        model: Settings of `LowRankPretraining` beside those of the grid.
        rates: Learning rates to try.
        tuned: Setting that takes them.
        rest_rates: Learning rates to try, once `tuned` is, for ``rest``. ``model`` holds the one
            that `tuned` is tried with.
        rest: Setting that takes them: by default the rate of what another optimizer moves, the
            embedding, norms and biases.
    """

    name: str
    model: Mapping[str, Any]
    rates: Sequence[float]
    tuned: str = "learning_rate"
    rest_rates: Sequence[float] = ()
    rest: str = REST

    def __post_init__(self) -> None:
        if not self.rates:
            raise ValueError(f"variant {self.name!r} has no rates")
        if self.rest_rates and (self.tuned == self.rest or self.rest not in self.model):
            raise ValueError(
                f"variant {self.name!r}: rest_rates need a {self.rest} beside {self.tuned}"
            )

    @property
    def all_rest_rates(self) -> list[float]:
        """The rest's learning rates to try, the one of ``model`` first; empty if not tuned."""
        if not self.rest_rates:
            return []
        return list(dict.fromkeys([self.model[self.rest], *self.rest_rates]))

    def settings(self, rate: float | None = None, rest_rate: float | None = None) -> dict[str, Any]:
        """``model`` with learning rates: by default the first of `rates`, and that of ``model``."""
        rest = {} if rest_rate is None else {self.rest: rest_rate}
        return {**self.model, **rest, self.tuned: self.rates[0] if rate is None else rate}


@dataclass(frozen=True)
class Grid:
    """The variants, data and durations of a comparison.

    Args:
        model: Settings of `LowRankPretraining` that all share.
        data: Settings of `TextBlocks`.
        variants: Variants; the first is the dense baseline, the second the naive way.
        trainer: Settings of the trainer.
        num_tuning_steps: Number of steps of a run that tries a learning rate.
        num_steps: Number of steps of a run that counts.
        seeds: Seeds of weights and order of the data, a run for each; the first also for tuning.
        num_finalists: Number of variants beside the first two that get the runs that count: the
            best of the tuning of those that are small enough.
        same_size: Name of the dense variant of as many parameters as the small ones, which they
            are compared with in equal time too.
        num_curve_batches: Number of validation batches at each point of a run's curve.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    variants: Sequence[Variant]
    trainer: Mapping[str, Any]
    num_tuning_steps: int
    num_steps: int
    seeds: Sequence[int]
    num_finalists: int = 2
    same_size: str | None = None
    num_curve_batches: int = 20

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if self.same_size is not None and self.same_size not in names:
            raise ValueError(f"same_size {self.same_size!r} is none of {', '.join(names)}")
        if len(self.variants) < 2:
            raise ValueError(f"a grid of {len(self.variants)} variants compares nothing")
        for name in ("num_tuning_steps", "num_steps", "num_curve_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1")
        if not self.seeds:
            raise ValueError("seeds is empty")

    @property
    def tokens_per_step(self) -> int:
        """The settings that all variants share."""
        return int(self.data["batch_size"] * self.data["block_length"])


def read_grid(path: Path) -> Grid:
    """The grid of a YAML file.

    Raises:
        ValueError: A key is missing or unknown.
    """
    contents = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        variants = [Variant(**described) for described in contents.pop("variants")]
        return Grid(variants=variants, **contents)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from error


@dataclass
class Run:
    """The result of one training run: without a loss where it diverged or is still to come."""

    variant: str
    stage: str
    rate: float
    seed: int
    num_steps: int
    rest_rate: float | None = None
    val_loss_nats: float | None = None
    training_time_s: float = 0.0
    curve_steps: Sequence[int] = ()
    curve_loss_nats: Sequence[float] = ()

    def key(self) -> tuple[Any, ...]:
        """The fields that identify this run."""
        return self.variant, self.stage, self.rate, self.seed, self.num_steps, self.rest_rate

    def as_row(self) -> dict[str, Any]:
        """The run for the record."""
        return asdict(self)


class Watch(Callback):
    """Times steps, and keeps the loss at each validation."""

    def __init__(self) -> None:
        self.step_times_s: list[float] = []
        self.steps: list[int] = []
        self.losses: list[float] = []
        self._start_s = 0.0

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start_s = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self.step_times_s.append(time.perf_counter() - self._start_s)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics[VAL_LOSS].item()
        if trainer.state.fn == "fit" and math.isfinite(loss):
            self.steps.append(trainer.global_step)
            self.losses.append(round(loss, 4))


class Workshop:
    """Trains variants of one grid on one text.

    Args:
        grid: Grid that is compared.
        train_files: Files of the text for training.
        val_files: Files of the text for validation.
        cache_dir: Folder of tokens and tokenizer.
        tokenizer: Tokenizer in place of one that is trained on the text.
    """

    def __init__(
        self,
        grid: Grid,
        train_files: Path,
        val_files: Path,
        cache_dir: Path,
        tokenizer: Path | None = None,
    ) -> None:
        self.grid = grid
        self._data = {
            **grid.data,
            "train_files": str(train_files),
            "val_files": str(val_files),
            "cache_dir": str(cache_dir),
            "tokenizer": None if tokenizer is None else str(tokenizer),
        }
        self._folder = cache_dir

    def module(
        self, variant: Variant, rate: float | None = None, rest_rate: float | None = None
    ) -> LowRankPretraining:
        """A variant's module, its network not yet built."""
        return LowRankPretraining(**{**self.grid.model, **variant.settings(rate, rest_rate)})

    def sizes(self, variant: Variant) -> dict[str, int | float]:
        """Parameters that a variant stores, its dense baseline's beside them, FLOP and bytes."""
        module, data = self.module(variant), TextBlocks(**self._data)
        data.prepare_data()
        data.setup()
        module.hparams["vocab_size"] = data.vocabulary_size
        budget = module.budget(data.block_length)
        return {
            "parameters": budget.total_parameters,
            "total_compression_ratio": budget.total_compression_ratio,
            "block_compression_ratio": budget.block_compression_ratio,
            "training_mflop_per_token": budget.training_flops_per_token / 1e6,
            "float32_mib": budget.bytes_at(32) / MIB,
        }

    def train(self, variant: Variant, run: Run) -> Run:
        """Fills in a run; one that diverges has no loss, one that tries a rate has no curve."""
        data, module, watch = self._made(variant, run.rate, run.seed, run.rest_rate)
        trainer = self._trainer(
            watch,
            run.num_steps,
            val_check_interval=max(1, run.num_steps // _NUM_POINTS),
            limit_val_batches=0 if run.stage == TUNING else self.grid.num_curve_batches,
        )
        try:
            trainer.fit(module, datamodule=data)
        except FloatingPointError as error:
            print(error, flush=True)
        else:
            (found,) = self._trainer(Watch(), 1).validate(module, data, verbose=False)
            loss = found[VAL_LOSS]
            run.val_loss_nats = round(loss, 5) if math.isfinite(loss) else None
        run.training_time_s = round(sum(watch.step_times_s), 1)
        run.curve_steps, run.curve_loss_nats = watch.steps, watch.losses
        return run

    def step_times_s(
        self, variants: Sequence[Variant], rates: Mapping[str, float], repeats: int
    ) -> dict[str, list[float]]:
        """Seconds of steps of each variant, taken in turns; the first turn is dropped.

        Args:
            variants: Variants to time.
            rates: Learning rate of each, by name.
            repeats: Number of timed turns, of two steps each.
        """
        taken: dict[str, list[float]] = {variant.name: [] for variant in variants}
        for turn in range(repeats + 1):
            for variant in variants:
                times = self._two_step_times_s(variant, rates[variant.name])
                if turn > 0:
                    taken[variant.name] += times
        return taken

    def _two_step_times_s(self, variant: Variant, rate: float) -> list[float]:
        """The average of a run's steps, where a share of them is guided."""
        share = variant.model.get("self_guided", 0.0)
        mean_s = [0.0, 0.0]
        for guided, weight in ((1.0, share), (0.0, 1 - share)):
            if weight:
                settings = {**variant.model, "self_guided": guided}
                data, module, watch = self._made(replace(variant, model=settings), rate, seed=1)
                self._trainer(watch, 4, limit_val_batches=0).fit(module, datamodule=data)
                # The first makes the optimizer's state.
                timed = watch.step_times_s[2:]
                mean_s = [mean + weight * s for mean, s in zip(mean_s, timed, strict=True)]
        return mean_s

    def _made(
        self, variant: Variant, rate: float, seed: int, rest_rate: float | None = None
    ) -> tuple[TextBlocks, LowRankPretraining, Watch]:
        lightning.seed_everything(seed, verbose=False)
        return TextBlocks(**self._data, seed=seed), self.module(variant, rate, rest_rate), Watch()

    def _trainer(self, watch: Watch, num_steps: int, **settings: Any) -> Trainer:
        options: dict[str, Any] = {
            "accelerator": "cuda" if torch.cuda.is_available() else "cpu", "devices": 1,
            "max_steps": num_steps, "max_epochs": -1, "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "callbacks": [watch],
            "default_root_dir": self._folder,
        }  # fmt: skip
        return Trainer(**(options | dict(self.grid.trainer) | settings))
