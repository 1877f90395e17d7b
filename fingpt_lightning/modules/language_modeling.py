"""What all our LightningModules share: the step, exact token weighting, logging, the guard.

Axes: B batch, T tokens, D width.
"""

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Float64, Int
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.tuner import lr_finder
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typing_extensions import override

from fingpt_lightning.data.batch import IGNORED_LABEL, KnowsBytes, TokenBatch
from fingpt_lightning.data.predicted_rows import PredictedRow, QuestionBatch
from fingpt_lightning.evaluation.results import prediction_row
from fingpt_lightning.evaluation.runner import predict
from fingpt_lightning.hub.names import check_hub_name
from fingpt_lightning.hub.pushing import Pushed, push_to_hub, refuse_no_access, upload
from fingpt_lightning.low_rank.adapters import FrozenBase
from fingpt_lightning.low_rank.cpu_products import faster_products
from fingpt_lightning.metric_keys import (
    TRAIN_BYTES,
    TRAIN_GRADIENT_NORM,
    TRAIN_LEARNING_RATE,
    TRAIN_LOSS,
    TRAIN_TOKENS,
    split_keys,
)
from fingpt_lightning.models.attention import causal_marker
from fingpt_lightning.models.families import head_of, logit_cap
from fingpt_lightning.models.finite import check_stored, not_finite
from fingpt_lightning.models.formats.checkpoint import describe_network
from fingpt_lightning.models.formats.tokenizer import num_rows_reached
from fingpt_lightning.models.vocabulary_loss import LossSums, row_sums, vocabulary_loss
from fingpt_lightning.modules.finite_steps import FiniteSteps, StepFigure, can_skip
from fingpt_lightning.modules.optimization import cosine_with_warmup, trapezoid
from fingpt_lightning.modules.saving import check_savable
from fingpt_lightning.modules.teacher import Teacher

COOLDOWN = 0.2
"""Share of the steps in which the rate of a warmup-stable-decay schedule falls by default."""
_LOSS_SCALE = 1024.0
"""Divides the summed loss before the backward pass, undone exactly after it.

A power of two; it keeps float16 gradients of a sum over many tokens from overflowing.
"""


@runtime_checkable
class TextSource(Protocol):
    """The interface that a module needs of the datamodule it is trained with."""

    vocabulary_size: int
    block_length: int
    eos_token_id: int

    def tokenizer_reference(self) -> dict[str, str | int]:
        """Name, digest and size of the tokenizer, in plain types."""


@runtime_checkable
class PartialNetwork(Protocol):
    """A strategy under which each process holds a part of the network."""

    def keep_own_part(self, network: PreTrainedModel, base: FrozenBase | None = None) -> None:
        """Takes out of a network laid out on the meta device what other processes hold.

        Args:
            network: Network to train, all of it unless ``base`` freezes it.
            base: Description of the frozen base; None where nothing is frozen.
        """

    def state_names(self) -> list[str]:
        """Keys of the whole module's state dict; all processes call this together."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole module's, on the first process; all call this together."""

    def gradient_norm(self, parameters: list[nn.Parameter]) -> Tensor:
        """Over the parameters of all processes, which call this together."""

    def parameters_changed(self) -> None:
        """Takes note that the module lost parameters; all processes call this together."""


class LanguageModelingModule(LightningModule):
    """Next-token training whose gradients are those of one big batch.

    Every supervised token weighs the same, however tokens are spread over microbatches of an
    accumulation window and over ranks: the backward pass runs on sums, and the gradients are
    divided once, before clipping, by the number of tokens of the whole window on all ranks.
    (Lightning alone averages over batches: its issue 20350.)

    A subclass sets `network` in ``configure_model``, after it gave it to `keep_own_part`. The seam
    for strategies that run the step themselves is `network`, `loss_sum_and_tokens`, `log_step` with
    `backward_start`, `log_evaluation` and `block_predictions`.

    Keys: ``train/loss`` (nats per token over the window and all ranks), ``train/learning_rate``,
    ``train/gradient_norm`` (before clipping), ``train/tokens`` (supervised so far, all ranks);
    ``val/loss``, ``val/perplexity``, ``test/loss``, ``test/perplexity``. With a teacher
    ``train/loss`` is the mix of divergence and cross-entropy; the others are cross-entropies.
    Where the datamodule knows the bytes of its text (`KnowsBytes`), ``val/bits_per_byte``,
    ``test/bits_per_byte`` and, beside them, ``train/bytes`` (what ``train/tokens`` stand for).

    Raises:
        FloatingPointError: A step's loss or gradient norm is not finite. The weights stay those
            before the step, and the last checkpoint on disk the last good one; on CUDA it is raised
            within the next step, before a validation and before a checkpoint (see `FiniteSteps`).
            Outside of fit, the loss of a split is not finite.
    """

    network: PreTrainedModel
    architecture_settings: ClassVar[tuple[str, ...]] = ()
    """Hyper-parameters that a checkpoint and the module that loads it must share."""

    def __init__(self) -> None:
        super().__init__()
        self.loss_chunk_size: int | None = None
        self._tokens_seen = 0
        self._new_tokens: Tensor | None = None
        self._finite_steps = FiniteSteps()
        self.teacher: Teacher | None = None
        self._window: LossSums | None = None
        self._evaluated: LossSums | None = None
        self._batch_idx = 0
        self._loader_states: list[dict[str, Any]] = []
        self._group_settings: list[dict[str, Any]] = []
        self._configured_rate: float | None = None

    @property
    def tokens_seen(self) -> int:
        """Supervised tokens so far on all ranks; reading it waits for the device."""
        if self._new_tokens is not None:
            self._tokens_seen += int(self._new_tokens)
            self._new_tokens = None
        return self._tokens_seen

    @tokens_seen.setter
    def tokens_seen(self, num_tokens: int) -> None:
        self._tokens_seen, self._new_tokens = num_tokens, None

    @property
    def num_rows_needed(self) -> int:
        """Rows of the embedding that the data's ordinary text needs; 0 without data."""
        source = self.text_source
        if source is None:
            return 0
        tokenizer = getattr(source, "tokenizer", None)
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            return num_rows_reached(tokenizer)
        return source.vocabulary_size

    @property
    def text_source(self) -> TextSource | None:
        """The datamodule of the attached trainer, if it is one of text."""
        datamodule = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        return datamodule if isinstance(datamodule, TextSource) else None

    def hidden_states(self, batch: TokenBatch) -> Float[Tensor, "B T D"]:
        """The network's final hidden states, normed, before the head.

        Raises:
            ValueError: The batch has rows that share what they begin with.
        """
        if "packing" in batch:
            raise ValueError(
                "data.batching packs several rows into one, which"
                f" {type(self).__name__} would not keep apart: set data.batching padded"
            )
        return self.hidden_states_of(self.network, batch)

    def hidden_states_of(
        self, network: PreTrainedModel, batch: TokenBatch
    ) -> Float[Tensor, "B T D"]:
        """The final hidden states of any network on a batch that `hidden_states` takes.

        Args:
            network: Network, such as that of a teacher.
            batch: Batch of the data.
        """
        ids, positions = batch["input_ids"], batch.get("position_ids")
        output = network.base_model(
            input_ids=ids,
            position_ids=positions,
            # Positions may say that several texts follow one another in a row.
            attention_mask=causal_marker(network, ids) if positions is None else None,
            use_cache=False,
        )
        return cast("Tensor", output.last_hidden_state)

    def training_sums(self, batch: TokenBatch, hidden: Float[Tensor, "B T D"]) -> LossSums:
        """The loss of one microbatch in training: with a teacher, the divergence from it too."""
        if self.teacher is None:
            return self.batch_loss(batch, hidden)
        teacher_hidden = self.teacher.hidden_states(batch, self.hidden_states_of)
        return self.teacher.loss(
            self.network, hidden, teacher_hidden, batch["labels"], self.loss_chunk_size
        )

    def load_teacher(self) -> None:
        """Loads the teacher where the attached trainer trains with one.

        Raises:
            ValueError: The strategy gives each process a part of the network, or the teacher does
                not fit.
        """
        if self.teacher is None or not self.is_fitting:
            return
        if self.partial_network is not None:
            raise ValueError(
                f"model.teacher {self.teacher.path} is a second network, which the schedule of a"
                " pipeline does not run: set it null, or take ddp"
            )
        self.teacher.load(self, self.network)

    def loss_sum_and_tokens(
        self, hidden: Float[Tensor, "B T D"], labels: Int[Tensor, "B T"]
    ) -> LossSums:
        """The summed loss of one microbatch and the number of its supervised tokens."""
        head, cap = head_of(self.network), logit_cap(self.network)
        return vocabulary_loss(head, hidden, labels, self.loss_chunk_size, cap)

    @property
    def partial_network(self) -> PartialNetwork | None:
        """The attached trainer's strategy, where it leaves each process a part of the network."""
        strategy = None if self._trainer is None else self.trainer.strategy
        return strategy if isinstance(strategy, PartialNetwork) else None

    def keep_own_part(self, network: PreTrainedModel, base: FrozenBase | None = None) -> None:
        """Takes out of a network on the meta device what the strategy gives other processes."""
        if self.partial_network is not None:
            self.partial_network.keep_own_part(network, base)

    def backward_start(self, loss_sum: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The loss from which the backward pass begins: the optimizer's hooks undo the scale."""
        return loss_sum / _LOSS_SCALE

    def log_step(self, sums: LossSums) -> None:
        """Adds one microbatch to the accumulation window; logged when the optimizer steps."""
        self._window = _added(self._window, sums)

    def log_evaluation(self, sums: LossSums) -> None:
        """Adds one batch to the split that is being evaluated; logged when it ends."""
        self._evaluated = _added(self._evaluated, sums)

    def block_predictions(
        self, batch: TokenBatch, sums: Float64[Tensor, "B 2"]
    ) -> list[PredictedRow]:
        """What is predicted for blocks of text: loss and, with a tokenizer, bits per byte.

        Args:
            batch: Batch with the places of its rows.
            sums: Summed loss in nats and number of supervised tokens of each row.

        Raises:
            ValueError: The rows have no places.
            FloatingPointError: A loss is NaN or infinite.
        """
        if "place" not in batch:
            raise ValueError(
                "predict needs rows with a place, which the batches of TextBlocks have and those of"
                f" {type(getattr(self.trainer, 'datamodule', None)).__name__} have not"
            )
        tokenizer = getattr(self.text_source, "tokenizer", None)
        places = batch["place"].tolist()
        predicted = []
        for row, (place, (loss_sum, num_tokens)) in enumerate(
            zip(places, sums.tolist(), strict=True)
        ):
            if place < 0:
                continue
            if not math.isfinite(loss_sum):
                raise not_finite(self.network, f"block {place}: the loss {loss_sum}")
            fields = {"block": place, "num_tokens": int(num_tokens), "loss": loss_sum / num_tokens}
            if isinstance(tokenizer, PreTrainedTokenizerFast):
                labels = batch["labels"][row]
                tokens = labels[labels != IGNORED_LABEL].tolist()
                text = str(tokenizer.decode(tokens, skip_special_tokens=True))
                num_bytes = len(text.encode())
                bits = loss_sum / math.log(2) / num_bytes if num_bytes else None
                fields |= {"num_bytes": num_bytes, "bits_per_byte": bits, "text": text}
            predicted.append(PredictedRow(place, fields))
        return predicted

    def _answered(self, batch: QuestionBatch) -> list[PredictedRow]:
        network, tokenizer = self.network, getattr(self.text_source, "tokenizer", None)
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        if any(isinstance(parameter, DTensor) for parameter in network.parameters()):
            raise ValueError(
                "predict answers no questions with sharded parameters: take ddp or one device, or"
                " fingpt evaluate"
            )
        predicted = []
        for name, group in groupby(batch.questions, lambda question: question.name):
            questions = list(group)
            task, examples = questions[0].task, [question.example for question in questions]
            answers = predict(network, tokenizer, task, examples, too_long=batch.too_long)
            predicted += [
                PredictedRow(asked.place, prediction_row(name, task, asked.example, answer))
                for asked, answer in zip(questions, answers, strict=True)
            ]
        return predicted

    @override
    def on_train_start(self) -> None:
        self._finite_steps = FiniteSteps()
        loop = self.trainer.fit_loop.epoch_loop
        if loop.batch_progress.total.ready == 0:
            # A BatchSizeFinder of Lightning 2.6 leaves it set: the first step would be the second.
            loop.restarting = False
        # Lightning 2.6 leaves the loader at the start of its epoch where the schedule has requested
        # `estimated_stepping_batches` before (issue 20550): then its loader is already made when
        # the positions are loaded. Where it did load them, this does the same again.
        states, self._loader_states = self._loader_states, []
        loader = self.trainer.train_dataloader
        if states and isinstance(loader, Stateful):
            loader.load_state_dict(states[0])
        self._take_settings()

    def _take_settings(self) -> None:
        """Has a resumed run go on with this run's rates, decays and so on, not the checkpoint's.

        Raises:
            ValueError: Lightning's rate finder is to try one rate where there are several.
        """
        rates = {own["lr"] for own in self._group_settings}
        found = self.hparams.get("learning_rate", self._configured_rate)
        for own in self._group_settings:
            # A LearningRateFinder sets the hyper-parameter when the optimizer is there already.
            own["lr"] = found if own["lr"] == self._configured_rate else own["lr"]
        self._configured_rate = found
        for config in self.trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if type(scheduler).__module__ == lr_finder.__name__ and len(rates) > 1:
                shown = ", ".join(f"{rate:g}" for rate in sorted(rates))
                raise ValueError(
                    "the rate finder tries one learning rate for all parameters, of which this"
                    f" model's optimizer {self.hparams.get('optimizer')} has several ({shown}): try"
                    " rates with fingpt sweep, or find that of an optimizer with one"
                )
            if not isinstance(scheduler, LambdaLR) or not self._group_settings:
                continue
            groups = scheduler.optimizer.param_groups
            for number, (group, own) in enumerate(zip(groups, self._group_settings, strict=True)):
                scheduler.base_lrs[number] = own["lr"]
                rate = own["lr"] * scheduler.lr_lambdas[number](scheduler.last_epoch)
                group.update(own | {"initial_lr": own["lr"], "lr": rate})

    @override
    def on_train_batch_start(self, batch: TokenBatch, batch_idx: int) -> None:
        self._batch_idx = batch_idx
        if self.hparams.get("dropout"):
            # The seed follows from step and process: a resumed run drops what an uninterrupted run
            # drops, and replicas do not all drop the same.
            trainer = self.trainer
            base = os.environ.get("PL_GLOBAL_SEED", "0")
            place = f"{base} {trainer.current_epoch} {batch_idx} {trainer.global_rank}"
            digest = hashlib.blake2b(place.encode(), digest_size=8).digest()
            torch.manual_seed(int.from_bytes(digest, "little"))

    def prepared(self, batch: TokenBatch) -> TokenBatch:
        """The batch, still on the host, with what the step would have to ask the device for."""
        return batch

    def batch_loss(self, batch: TokenBatch, hidden: Float[Tensor, "B T D"]) -> LossSums:
        """`loss_sum_and_tokens` of a prepared batch."""
        return self.loss_sum_and_tokens(hidden, batch["labels"])

    @override
    @faster_products()
    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        sums = self.training_sums(batch, self.hidden_states(batch))
        self.log_step(sums)
        return self.backward_start(sums.loss_sum)

    @override
    @faster_products()
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(loss, *args, **kwargs)

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        assert self._window is not None
        self._finite_steps.read()
        loss_sum, num_tokens = self._over_ranks(self._window)
        self._window = None
        loss = loss_sum / num_tokens
        self._check_finite(TRAIN_LOSS, loss, optimizer)
        # Lightning divides by the microbatches of a full window, the strategy by the replicas.
        averaged_over = self.trainer.accumulate_grad_batches * self._num_replicas()
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if gradients:
            _scale(gradients, _LOSS_SCALE * averaged_over / num_tokens.double())
        new = num_tokens if self._new_tokens is None else self._new_tokens + num_tokens
        self._new_tokens = new.detach()
        self.log(TRAIN_LOSS, loss, prog_bar=self._is_bar_of_lightning)
        # Numbers of Python would be copied to the device, and the host would wait for it.
        rate = torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float32)
        self.log(TRAIN_LEARNING_RATE, rate)
        self.log(TRAIN_TOKENS, (self._new_tokens + self._tokens_seen).float())

    @property
    def _is_bar_of_lightning(self) -> bool:
        # What such a bar shows is read from the device at each step, whether it is drawn or not.
        return isinstance(self.trainer.progress_bar_callback, TQDMProgressBar | RichProgressBar)

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        trained = [p for p in self.parameters() if p.grad is not None]
        norm = self._gradient_norm(trained)
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            # With a gradient scaler an overflow is its business: it skips the step.
            self._check_finite(TRAIN_GRADIENT_NORM, norm, optimizer)
        self._finite_steps.skip_unless_finite(optimizer)
        self.log(TRAIN_GRADIENT_NORM, norm)
        if gradient_clip_val is None:
            return
        if gradient_clip_algorithm in (None, "norm"):
            clip_grads_with_norm_(trained, gradient_clip_val, norm, foreach=True)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    @override
    @faster_products()
    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self.log_evaluation(self.batch_loss(batch, self.hidden_states(batch)))

    @override
    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    @override
    @faster_products()
    def predict_step(self, batch: TokenBatch | QuestionBatch, batch_idx: int) -> list[PredictedRow]:
        """The answers to questions as `fingpt evaluate` gives them, or the losses of blocks."""
        if isinstance(batch, QuestionBatch):
            return self._answered(batch)
        hidden = self.hidden_states(batch)
        sums = row_sums(self.loss_sum_and_tokens, hidden, batch["labels"])
        return self.block_predictions(batch, sums)

    @override
    def on_validation_start(self) -> None:
        if self.is_fitting:
            self._finite_steps.read()

    @override
    def on_train_epoch_end(self) -> None:
        self._finite_steps.read()

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_evaluated("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_evaluated("test")

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._finite_steps.read()
        checkpoint["tokens_seen"] = self.tokens_seen
        if self.teacher is not None:
            checkpoint["teacher_revision"] = self.teacher.revision
        source = self.text_source
        reference = None if source is None else source.tokenizer_reference()
        describe_network(checkpoint, self.network.config, reference)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.is_fitting:
            fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
            self._loader_states = fit_loop.get("state_dict", {}).get("combined_loader", [])
            if self.teacher is not None:
                self.teacher.check_revision(checkpoint)
        self.tokens_seen = checkpoint.get("tokens_seen", 0)
        self._check_stored(checkpoint)
        saved = checkpoint.get("tokenizer")
        if saved is None or self.text_source is None:
            return
        now = self.text_source.tokenizer_reference()
        if saved["sha256"] != now["sha256"]:
            raise ValueError(
                f"data.tokenizer {now['name_or_path']!r} differs from the one the checkpoint was"
                f" trained with: {saved['name_or_path']!r} of {saved['vocabulary_size']} tokens"
            )

    def _check_stored(self, checkpoint: dict[str, Any]) -> None:
        """Raises where a weight of a checkpoint is not one of floating-point numbers."""
        state = checkpoint.get("state_dict", {})
        for name, parameter in self.named_parameters(remove_duplicate=False):
            stored = state.get(name)
            if not isinstance(stored, Tensor) or not parameter.is_floating_point():
                continue
            try:
                check_stored(name.removeprefix("network."), stored)
            except ValueError as error:
                raise ValueError(f"ckpt_path {self.trainer.ckpt_path}: {error}") from None

    def check_architecture(self, checkpoint: dict[str, Any]) -> None:
        """Raises unless a checkpoint was trained with our `architecture_settings`.

        Raises:
            ValueError: One of them differs.
        """
        saved = checkpoint.get("hyper_parameters", {})
        for key in self.architecture_settings:
            if key in saved and saved[key] != self.hparams[key]:
                raise ValueError(
                    f"model.{key} is {self.hparams[key]}, the checkpoint was trained with"
                    f" {saved[key]}"
                )

    def check_optimizer(self, checkpoint: dict[str, Any], plain: Mapping[str, Any]) -> None:
        """Raises where the state of a checkpoint's optimizer is of no use to ours.

        Args:
            checkpoint: Checkpoint to resume from.
            plain: The hyper-parameters that the optimizer's state depends on, with what a
                checkpoint that does not name them was trained with.

        Raises:
            ValueError: One of them differs.
        """
        saved = checkpoint.get("hyper_parameters", {})
        for key, default in plain.items():
            before, now = saved.get(key, default), self.hparams[key]
            if before != now:
                raise ValueError(
                    f"model.{key} is {now}, whose state is not that of {before}, with which the"
                    " checkpoint was trained"
                )

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the trained model with its tokenizer and a model card, for others to load.

        Under several processes the first one writes.

        Args:
            folder: Folder that is made; one that was written so before is replaced.

        Raises:
            FileExistsError: The folder is there, and something else.
            ValueError: There is no network yet, or each process has a part of it.
        """
        check_savable(self)
        if self._trainer is None or self.trainer.is_global_zero:
            self.write_model(Path(folder).expanduser())

    def write_model(self, folder: Path) -> None:
        """Writes what `save_pretrained` promises, on one process."""
        raise NotImplementedError

    def push_to_hub(
        self,
        name: str,
        *,
        folder: str | Path | None = None,
        private: bool = False,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> Pushed | None:
        """Uploads what `save_pretrained` writes to a repository of the Hugging Face hub.

        Args:
            name: OWNER/NAME of the repository, as in `fingpt_lightning.push_to_hub`.
            folder: Folder that is written and stays; None takes a temporary one.
            private: Whether only its owner sees the repository.
            revision: Branch that is made; None commits to ``main``.
            commit_message: First line of the commit's message.

        Returns:
            Address of the model; None on all processes but the first.

        Raises:
            FileExistsError: The folder is there, and something else.
            PushError: The hub cannot be reached or refuses the upload.
            ValueError: A name cannot be one, there is no network yet, or each process has a part.
        """
        check_hub_name(name)
        check_savable(self)
        if self._trainer is not None and not self.trainer.is_global_zero:
            return None
        refuse_no_access()
        if folder is not None:
            folder = Path(folder).expanduser()
            self.write_model(folder)
            return push_to_hub(
                folder,
                name,
                private=private,
                revision=revision,
                commit_message=commit_message,
            )
        with TemporaryDirectory() as parent:
            made = Path(parent) / name.partition("/")[2]
            self.write_model(made)
            return upload(made, name, private, revision, commit_message)

    @property
    def is_fitting(self) -> bool:
        """Whether this is in a trainer that trains."""
        return self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING

    def with_schedule(self, optimizer: Optimizer) -> OptimizerLRScheduler:
        """An optimizer and its schedule, by the hyper-parameters of warm-up and last rate.

        A module without the hyper-parameter ``schedule`` has the cosine.

        Raises:
            ValueError: The trainer's settings give the run no end.
        """
        num_steps = self.trainer.estimated_stepping_batches
        if num_steps == float("inf"):
            raise ValueError(
                "trainer.max_steps or trainer.max_epochs must be set: the schedule needs an end"
            )
        self._group_settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        self._configured_rate = self.hparams.get("learning_rate")
        scheduler = LambdaLR(optimizer, self._rate_factor(int(num_steps)))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _rate_factor(self, num_steps: int) -> Callable[[int], float]:
        hparams = self.hparams
        warmup_steps = _steps_of(hparams["warmup"], num_steps)
        final_ratio = hparams["final_learning_rate_ratio"]
        kind = hparams.get("schedule", "cosine")
        if kind == "cosine":
            return cosine_with_warmup(num_steps, warmup_steps, final_ratio)
        cooldown_steps = num_steps
        if kind == "wsd":
            cooldown_steps = _steps_of(hparams["cooldown"] or COOLDOWN, num_steps)
        return trapezoid(num_steps, warmup_steps, cooldown_steps, final_ratio)

    def fused_adamw(self, groups: list[dict[str, Any]], **settings: Any) -> AdamW:
        """AdamW in one kernel; but a fused one cannot clip behind a gradient scaler (float16)."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return AdamW(groups, fused=scaler is None, **settings)

    def _gradient_norm(self, trained: list[nn.Parameter]) -> Tensor:
        if self.partial_network is not None:
            return self.partial_network.gradient_norm(trained)
        norm = get_total_norm([p.grad for p in trained if p.grad is not None], foreach=True)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _num_replicas(self) -> int:
        sampler_kwargs = self.trainer.distributed_sampler_kwargs or {}
        return int(sampler_kwargs.get("num_replicas", 1))

    def _over_ranks(self, sums: LossSums) -> LossSums:
        reduce = self.trainer.strategy.reduce
        return LossSums(*(cast("Tensor", reduce(part, reduce_op="sum")) for part in sums))

    def _log_evaluated(self, split: str) -> None:
        if self._evaluated is None:
            return
        loss_sum, num_tokens = self._over_ranks(self._evaluated)
        self._evaluated = None
        loss = loss_sum / num_tokens
        loss_key, perplexity_key, bits_key = split_keys(split)
        if not (self.is_fitting or torch.isfinite(loss)):
            # While fitting, the next step ends the run and keeps the weights before.
            raise not_finite(self.network, f"{loss_key} {loss.item()}: the losses of the split")
        # Equal on all ranks already; Lightning warns of figures that it did not reduce itself.
        self.log(loss_key, loss, prog_bar=True, sync_dist=True)
        self.log(perplexity_key, loss.exp(), sync_dist=True)
        if (bytes_per_token := self._bytes_per_token(split)) is not None:
            self.log(bits_key, loss / (math.log(2) * bytes_per_token), sync_dist=True)
        if self.is_fitting:
            # In the same row, so that a chart of it can go by tokens or bytes.
            self.log(TRAIN_TOKENS, float(self.tokens_seen), sync_dist=True)
            if (bytes_per_token := self._bytes_per_token("train")) is not None:
                self.log(TRAIN_BYTES, self.tokens_seen * bytes_per_token, sync_dist=True)

    def _bytes_per_token(self, split: str) -> float | None:
        source = self.text_source
        return source.bytes_per_token(split) if isinstance(source, KnowsBytes) else None

    def _check_finite(self, key: str, value: Tensor, optimizer: Optimizer) -> None:
        step = (
            f"step {self.trainer.global_step}, learning rate"
            f" {optimizer.param_groups[0]['lr']:.3g}, batch {self._batch_idx} of epoch"
            f" {self.current_epoch}"
        )
        is_late = can_skip(optimizer, value)
        self._finite_steps.add(StepFigure(key, value.detach(), step), is_late=is_late)


def _scale(gradients: list[Tensor], factor: Float[Tensor, ""]) -> None:
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        torch._foreach_mul_(gradients, factor.item())  # a shard takes no plain tensor
        return
    # One kernel takes those that have the factor's dtype.
    for dtype in {gradient.dtype for gradient in gradients}:
        alike = [gradient for gradient in gradients if gradient.dtype == dtype]
        if torch.finfo(dtype).bits < torch.finfo(factor.dtype).bits:
            for gradient in alike:  # the factor keeps its digits, the product is rounded once
                gradient.copy_(gradient.to(factor.dtype).mul_(factor))
        else:
            torch._foreach_mul_(alike, factor.to(dtype))


def _steps_of(length: int | float, num_steps: int) -> int:
    """A part of a run: an int is steps, a float the share of all steps."""
    return round(length * num_steps) if isinstance(length, float) else length


def _added(so_far: LossSums | None, sums: LossSums) -> LossSums:
    loss_sum = sums.loss_sum.detach()
    if so_far is None:
        return LossSums(loss_sum, sums.num_tokens)
    return LossSums(so_far.loss_sum + loss_sum, so_far.num_tokens + sums.num_tokens)
