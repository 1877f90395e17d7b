"""Pretraining a network whose linear layers are low-rank layers, or its dense baseline."""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import override

from fingpt_lightning.data.batch import TokenBatch
from fingpt_lightning.low_rank import (
    Initialization,
    LoRAMuon,
    ModelBudget,
    RankRule,
    Spectron,
    decay_products,
    embedding_factors,
    low_rank_factors,
)
from fingpt_lightning.models import (
    Recompute,
    compile_blocks,
    lay_out_network,
    model_budget,
    recompute_blocks,
)
from fingpt_lightning.models.attention import IMPLEMENTATION as BLOCKED_ATTENTION
from fingpt_lightning.models.families import family_of, max_positions
from fingpt_lightning.models.formats.hf_folder import transformers_reads, write_network
from fingpt_lightning.models.formats.tokenizer import tokenizer_sha256
from fingpt_lightning.models.from_scratch import (
    check_ranks,
    materialize,
    narrow_shape,
    rank_ratio_of,
    same_size_dense,
)
from fingpt_lightning.models.layout import fill, lay_out
from fingpt_lightning.models.loading import DTYPES, build_model, open_stored, standalone_copy
from fingpt_lightning.models.low_rank_config import drop_guides, has_own_head_map, is_guide
from fingpt_lightning.models.residual_stream import RESIDUAL_DTYPES, keep_residual_in
from fingpt_lightning.models.shapes import (
    AnyShape,
    StoredShape,
    check_dropout,
    preset_shape,
    stored_shape,
)
from fingpt_lightning.models.sources import ModelSource
from fingpt_lightning.modules.language_modeling import LanguageModelingModule, TextSource
from fingpt_lightning.modules.optimization import (
    adamw_8bit,
    decay_groups,
    factor_groups,
    moved_as_dense,
    split_embedding,
)
from fingpt_lightning.modules.quantization_aware import RoundingSchedule
from fingpt_lightning.modules.ranges import (
    check_below_1,
    check_compression,
    check_from_1_or_share,
    check_optimization,
)
from fingpt_lightning.modules.recipe import (
    DEFAULTS,
    FACTOR_OPTIMIZERS,
    PLAIN,
    check_recipe,
    check_recipe_name,
    check_schedule,
    low_rank_changes,
    with_recipe,
)
from fingpt_lightning.modules.saving import save_module
from fingpt_lightning.modules.self_guided import GuideSchedule
from fingpt_lightning.modules.sharding import shard
from fingpt_lightning.modules.teacher import WITHOUT_TEACHER, Teacher
from fingpt_lightning.modules.weight_averaging import prepare_averaging
from fingpt_lightning.terminal.messages import check_choice, nearest, print_status
from fingpt_lightning.terminal.progress import announced
from fingpt_lightning.units import format_count

HEAD_MAPS = ("shared", "own")
_PRESET = "gpt2-small"
_RANK_RATIO = 0.25
_DRAWN_STD = 0.02
# What the optimizer's state depends on, and the values of checkpoints that lack it.
_STATE_SETTINGS = {
    "optimizer": "adamw", "factor_decay": "factors", "spectron_dense": False,
    "lora_muon_dense": False, "embedding_optimizer": "adamw",
}  # fmt: skip


class _Start(NamedTuple):
    """The description of ``init_from``, known before its weights are read."""

    config: PreTrainedConfig
    shapes: Mapping[str, tuple[int, ...]]
    tokenizer_sha256: str | None
    source: ModelSource


class LowRankPretraining(LanguageModelingModule):
    """A network trained with low-rank layers in place of its linear layers, from scratch or on.

    It is of any family in `FAMILIES`; a model to train on may come from ``fingpt decompose``.

    Args:
        preset: gpt2-nano, gpt2-small, gpt2-medium, gpt2-large or gpt2-xl; llama-60m, llama-130m,
            llama-350m or llama-1b; null is gpt2-small.
        architecture: A ``config.json`` of any family, or a folder with one, in place of a preset
            and all sizes; the vocabulary is the tokenizer's.
        rank: An int is the rank of every linear layer of the blocks, a float in (0, 1] the share
            r / min(in, out); null is the dense baseline. A layer whose factors would not be smaller
            stays dense. Query, key and value are one layer with one ``down``. ``auto`` is what
            ``compression`` or ``init_from`` request, and 0.25 without them.
        rank_overrides: Other ranks by name pattern, such as ``{"*.mlp.*": 0.5}``; one for a part of
            a fused layer, such as ``{"*.c_attn.v": 0.5}`` (q, k or v of a GPT-2), gives each part
            factors of its own.
        rank_multiple: Number whose nearest multiple each rank is rounded to, the embedding's too,
            where it leaves the factors smaller than their layer: 128 fills the tiles of a GPU's
            products. ``compression`` is then met as nearly as such ranks can.
        embedding_rank: The rank of embedding and head, tied or not; null keeps the full tables, or
            is the recipe's.
        head_map: Map from the width to the rank in a factorized head that shares the embedding's
            table: ``shared``, the embedding's own; ``own``, another one, which starts as it; null
            is ``shared``, or the recipe's.
        compression: All parameters of the dense baseline over all of this network, embedding
            included; the one rank ratio that comes nearest is found. In place of ``rank``.
        recipe: ``narrow`` reaches ``compression`` by a smaller width with dense blocks and a
            factorized embedding, the best that was measured at one size, in place of ``rank``. It
            decides the width, and where they are null ``embedding_rank``, ``head_map``,
            ``optimizer``, ``embedding_optimizer``, ``spectron_dense`` and the rates of these.
        init_from: Folder, hub name, GGUF file, checkpoint or run folder of the model to train on,
            which decides the architecture, in place of all settings above and those of sizes; and
            the tokenizer, where the data name none.
        num_layers: Number of decoder blocks, in place of the preset's.
        width: Width of the hidden states, in place of the preset's; with ``recipe`` that of the
            dense baseline.
        num_heads: Number of attention heads, in place of the preset's.
        num_positions: Most tokens per row, in place of the preset's.
        vocab_size: Size of the vocabulary; null takes the tokenizer's of the data.
        dropout: Probability after embedding, attention and MLP.
        recompute: Results that each block computes again in the backward pass: ``none``; ``block``,
            all but its input; ``low_rank``, all but its input, the thin activations of its factors
            and attention's result.
        compile: Whether torch.compile fuses the blocks: some percent faster after a minute.
        residual_dtype: Dtype of the residual stream, to which the blocks add, with
            ``trainer.precision`` bf16-mixed: ``bfloat16`` halves its memory traffic and the inputs
            that blocks keep, and rounds every sum to 8 bits.
        loss_chunk_size: Tokens whose logits over the vocabulary are held at a time; null is as many
            as take 100 MiB on a CPU and 512 MiB on a GPU.
        learning_rate: Highest learning rate of the schedule; null is 0.0006, or the recipe's.
        final_learning_rate_ratio: Ratio of the last to the highest learning rate.
        warmup: Length of the warm-up: an int is steps, a float the share of all steps.
        schedule: Learning rate after the warm-up: ``cosine``, half a cosine down to the last rate;
            ``linear``, a line; ``wsd`` (warmup-stable-decay), constant until the ``cooldown``, then
            a line.
        cooldown: Length of the last part of ``wsd``, as ``warmup``; null is 0.2 of all steps.
        weight_decay: Weight decay of matrices; biases and norms do not decay.
        beta1: AdamW's decay of the gradient's mean.
        beta2: AdamW's decay of the gradient's square.
        initialization: Initialization of the factors: ``svd``, the truncated singular value
            decomposition of the dense draw; ``cola``, both factors normal; ``orthogonal``, both
            with orthogonal directions of one length, the product's variance that of the dense draw.
        factor_activation: ``silu`` between the two factors of each low-rank layer. No dense layer
            computes the same then: export to ``hf`` and ``gguf``, quantization and merging refuse
            it.
        factor_expansion: The alpha of a fixed path past ``up`` during training, which is folded
            into ``up`` when a checkpoint is read as a network; 0 for none.
        self_guided: Share of the steps, in [0, 1], in which each low-rank layer is trained beside a
            dense matrix W that starts as ``up down``: a W x + (1 - a) up down x, a from 1 to 0 by
            half a cosine. Then W is dropped. Validations, and whatever reads a checkpoint as a
            network, take the factors alone.
        factor_decay: ``factors`` decays each factor by ``weight_decay``; ``product`` decays their
            product up down.
        optimizer: ``adamw``; ``adamw_8bit``, its state in 8 bits; ``spectron``, which moves factor
            matrices along orthogonalized momentum by a bounded step, and all else by AdamW;
            ``lora_muon``, which moves them so that their product takes the step of Muon; null is
            ``adamw``, or the recipe's.
        embedding_optimizer: ``adamw``, or ``same`` for factors of embedding and head that are moved
            as those of the blocks are, with ``spectron`` or ``lora_muon``; ``mixed``, with one of
            these two, moves their table by AdamW and the map from it to the width as a dense matrix
            of a block; null is ``adamw``, or the recipe's.
        embedding_learning_rate: Highest learning rate of the embedding and the head, factors or
            full tables; null is the rate of what else their optimizer moves, or the recipe's.
        spectron_learning_rate: Highest learning rate of the factors with ``spectron``: about the
            spectral norm by which a step changes a product; null is 0.07, or the recipe's.
        spectron_momentum: Momentum of ``spectron``.
        spectron_dense: Whether, with ``spectron``, layers of the blocks that stay dense are moved
            alike, by ``spectron_learning_rate`` in the spectral norm: a dense baseline on equal
            terms; null is false, or the recipe's.
        spectron_adjust_lr: ``original`` multiplies the step of a factor of ``spectron`` by
            sqrt(max(1, rows / columns)), as its authors' code does; ``none`` is their formula.
        lora_muon_learning_rate: Highest learning rate of the factors with ``lora_muon``: about the
            spectral norm by which a step changes a product, and that of Muon for a dense matrix.
        lora_muon_momentum: Momentum of ``lora_muon``.
        lora_muon_dense: Whether, with ``lora_muon``, layers of the blocks that stay dense are moved
            by Muon at ``lora_muon_learning_rate``.
        quantization_aware: ``int8`` or ``nf4`` trains the end of the run with weights rounded as
            an export in that format stores them; null does not.
        quantization_start: Share of the steps from which on weights are rounded, in [0, 1].
        teacher: Folder, hub name, GGUF file, checkpoint or run folder of a frozen model with the
            same tokenizer, such as the one that ``init_from`` was decomposed from: at every
            position with a label the network learns its whole distribution. Each device holds it.
        teacher_quantize: ``nf4`` or ``int8`` for the teacher's linear layers; null keeps them.
        teacher_dtype: Dtype of the teacher's other weights and of its products.
        teacher_weight: Share w, in (0, 1], of the divergence KL(teacher || network) in the loss
            w T^2 KL + (1 - w) cross-entropy.
        teacher_temperature: Divisor T of the logits of both networks in the divergence.

    Raises:
        ValueError: A value outside its range; the message names it.

    Source: https://arxiv.org/abs/2402.13533, section 3.
    """

    architecture_settings = (
        "preset", "architecture", "num_layers", "width", "num_heads", "num_positions",
        "vocab_size", "rank", "rank_overrides", "rank_multiple", "embedding_rank", "head_map",
        "compression", "recipe", "factor_activation", "factor_expansion",
    )  # fmt: skip

    def __init__(
        self,
        preset: str | None = None,
        architecture: str | None = None,
        rank: int | float | Literal["auto"] | None = "auto",
        rank_overrides: dict[str, int | float | None] | None = None,
        rank_multiple: int = 1,
        embedding_rank: int | float | None = None,
        head_map: Literal["shared", "own"] | None = None,
        compression: float | None = None,
        recipe: Literal["narrow"] | None = None,
        init_from: str | None = None,
        num_layers: int | None = None,
        width: int | None = None,
        num_heads: int | None = None,
        num_positions: int | None = None,
        vocab_size: int | None = None,
        dropout: float = 0.0,
        recompute: Literal["none", "block", "low_rank"] = "none",
        compile: bool = False,
        residual_dtype: Literal["float32", "bfloat16"] = "float32",
        loss_chunk_size: int | None = None,
        learning_rate: float | None = None,
        final_learning_rate_ratio: float = 0.1,
        warmup: int | float = 0.05,
        schedule: Literal["cosine", "linear", "wsd"] = "cosine",
        cooldown: int | float | None = None,
        weight_decay: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.95,
        initialization: Literal["svd", "cola", "orthogonal"] = "svd",
        factor_activation: Literal["none", "silu"] = "none",
        factor_expansion: float = 0.0,
        self_guided: float = 0.0,
        factor_decay: Literal["factors", "product"] = "factors",
        optimizer: Literal["adamw", "adamw_8bit", "spectron", "lora_muon"] | None = None,
        embedding_optimizer: Literal["adamw", "same", "mixed"] | None = None,
        embedding_learning_rate: float | None = None,
        spectron_learning_rate: float | None = None,
        spectron_momentum: float = 0.95,
        spectron_dense: bool | None = None,
        spectron_adjust_lr: Literal["none", "original"] = "none",
        lora_muon_learning_rate: float = 0.02,
        lora_muon_momentum: float = 0.95,
        lora_muon_dense: bool = False,
        quantization_aware: Literal["nf4", "int8"] | None = None,
        quantization_start: float = 0.8,
        teacher: str | None = None,
        teacher_quantize: Literal["nf4", "int8"] | None = None,
        teacher_dtype: Literal["float32", "bfloat16", "float16", "float64"] = "bfloat16",
        teacher_weight: float = 1.0,
        teacher_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if compression is not None:
            check_compression(compression)
            if rank != "auto" and not (rank is None and recipe is not None):
                raise ValueError(
                    f"rank {rank} and compression {compression}: give one of them; beside"
                    " compression rank stays auto"
                )
        for name, number in {"rank": rank, "embedding_rank": embedding_rank}.items():
            if isinstance(number, int | float):
                check_from_1_or_share("the full rank", **{name: number})
        if init_from is not None:
            given = {
                "preset": preset, "architecture": architecture,
                "rank": None if rank == "auto" else repr(rank),
                "rank_overrides": rank_overrides,
                "rank_multiple": None if rank_multiple == 1 else rank_multiple,
                "embedding_rank": embedding_rank,
                "head_map": None if head_map == "shared" else head_map,
                "compression": compression, "recipe": recipe,
                "num_layers": num_layers, "width": width,
                "num_heads": num_heads, "num_positions": num_positions, "vocab_size": vocab_size,
                "initialization": None if initialization == "svd" else initialization,
                "factor_activation": None if factor_activation == "none" else factor_activation,
                "factor_expansion": factor_expansion or None,
            }  # fmt: skip
            defaults = {"rank": "auto", "rank_multiple": "1", "head_map": "shared"} | {
                key: str(value) for key, value in PLAIN.items()
            }
            for name, value in given.items():
                if value is not None:
                    default = defaults.get(name, "null")
                    raise ValueError(
                        f"{name} {value}: init_from {init_from} decides the architecture; leave"
                        f" {name} at {default}"
                    )
        sizes = {
            "num_layers": num_layers, "width": width, "num_heads": num_heads,
            "num_positions": num_positions,
        }  # fmt: skip
        self.shape = _shape_of(preset, architecture, sizes)
        check_recipe_name(recipe, compression, rank_overrides)
        _check_multiple(rank_multiple, recipe, rank, rank_overrides, embedding_rank)
        settings = with_recipe(
            recipe,
            {
                "embedding_rank": embedding_rank, "head_map": head_map,
                "learning_rate": learning_rate, "optimizer": optimizer,
                "embedding_optimizer": embedding_optimizer,
                "embedding_learning_rate": embedding_learning_rate,
                "spectron_learning_rate": spectron_learning_rate,
                "spectron_dense": spectron_dense,
            },
            head_is_tied=bool(self.shape.config(1).tie_word_embeddings),
        )  # fmt: skip
        if init_from is None:
            check_dropout(self.shape.config(1).model_type, dropout)
        rank_now = _RANK_RATIO if isinstance(rank, str) else rank
        try:
            check_ranks(
                self.shape, RankRule(rank_now, rank_overrides or {}), settings["embedding_rank"]
            )
        except ValueError as error:
            raise ValueError(f"recipe {recipe}: {error}" if recipe else str(error)) from None
        _check_head_map(
            settings["head_map"],
            settings["embedding_rank"],
            settings["embedding_optimizer"],
            self.shape,
        )
        if recompute not in list(Recompute):
            hint = nearest(recompute, Recompute)
            raise ValueError(f"recompute {recompute!r} is none of {', '.join(Recompute)}{hint}")
        check_choice("residual_dtype", residual_dtype, RESIDUAL_DTYPES)
        if vocab_size is not None and vocab_size < 1:
            raise ValueError(f"vocab_size {vocab_size} is below 1")
        check_optimization(
            learning_rate=settings["learning_rate"],
            final_learning_rate_ratio=final_learning_rate_ratio,
            warmup=warmup,
            weight_decay=weight_decay,
            beta1=beta1,
            beta2=beta2,
            loss_chunk_size=loss_chunk_size,
        )
        check_below_1(dropout=dropout)
        check_schedule(schedule, warmup, cooldown)
        check_recipe(
            {
                "initialization": initialization, "factor_activation": factor_activation,
                "factor_expansion": factor_expansion, "self_guided": self_guided,
                "factor_decay": factor_decay, "spectron_momentum": spectron_momentum,
                "spectron_adjust_lr": spectron_adjust_lr,
                "lora_muon_learning_rate": lora_muon_learning_rate,
                "lora_muon_momentum": lora_muon_momentum, "lora_muon_dense": lora_muon_dense,
                "quantization_aware": quantization_aware, "weight_decay": weight_decay,
            }
            | settings
        )  # fmt: skip
        self.rounding = RoundingSchedule.checked(quantization_aware, quantization_start)
        self.guiding = GuideSchedule(self_guided)
        self.loss_chunk_size = loss_chunk_size
        self._start: _Start | None = None
        self._is_dense_baseline = False
        self.save_hyperparameters()
        initial: Any = self._hparams_initial  # those that loggers get
        for hparams in (self.hparams, initial):
            hparams.update(settings)
        self.resolved_settings = settings
        self.teacher = Teacher.checked(self.hparams)
        # Drawn now, so that nothing that draws before the network is built changes the network.
        self.initialization_seed = int(torch.randint(2**31, ()))

    @property
    def init_from(self) -> str | None:
        """The model that is trained on, where there is one."""
        path: str | None = self.hparams["init_from"]
        return path

    @property
    def rank_rule(self) -> RankRule:
        """The rank of each linear layer of a network from scratch.

        Raises:
            ValueError: ``compression`` is out of reach, or the vocabulary is not known yet.
        """
        hparams = self.hparams
        rank, overrides = hparams["rank"], hparams["rank_overrides"] or {}
        if hparams["recipe"] is not None:
            rank = None
        elif rank == "auto":
            rank = _RANK_RATIO
            if hparams["compression"] is not None:
                rank = rank_ratio_of(
                    hparams["compression"],
                    self.shape,
                    self._vocab_size(),
                    overrides,
                    hparams["embedding_rank"],
                    hparams["head_map"] == "own",
                    hparams["rank_multiple"],
                )
        return RankRule(rank, overrides, hparams["rank_multiple"])

    @property
    def network_shape(self) -> AnyShape:
        """The sizes of a network from scratch; with a recipe it is narrower than its baseline.

        Raises:
            ValueError: ``compression`` is out of reach, or the vocabulary is not known yet.
        """
        hparams = self.hparams
        if hparams["recipe"] is None:
            return self.shape
        return narrow_shape(
            hparams["compression"],
            self.shape,
            self._vocab_size(),
            hparams["embedding_rank"],
            hparams["head_map"] == "own",
        )

    def recipe_text(self) -> str | None:
        """What the recipe decided, in one line; None without one.

        Raises:
            ValueError: As in `network_shape`.
        """
        hparams = self.hparams
        if hparams["recipe"] is None:
            return None
        network, baseline = self.laid_out(), int(self.shape.config(1).hidden_size)
        embedding: Any = network.get_input_embeddings()
        budget = self.budget()
        kind, rate = hparams["optimizer"], hparams["learning_rate"]
        rates = [f"{kind} at {rate:g}"]
        if kind in FACTOR_OPTIMIZERS:
            rates = [f"{kind} at {hparams[f'{kind}_learning_rate']:g}", f"AdamW at {rate:g}"]
        if hparams["embedding_learning_rate"] is not None:
            rates.append(f"the embedding at {hparams['embedding_learning_rate']:g}")
        is_tied = bool(self.shape.config(1).tie_word_embeddings)
        head = f"head_map {hparams['head_map']}" if is_tied else "a head with factors of its own"
        return (
            f"recipe {hparams['recipe']}: width {network.config.hidden_size} of {baseline},"
            f" embedding rank {embedding.rank}, {head},"
            f" {', '.join(rates)}; {format_count(budget.total_parameters)} parameters,"
            f" {budget.total_compression_ratio:.2f}x smaller"
        )

    def check_block_length(self, block_length: int) -> None:
        """Raises unless sequences of ``block_length`` tokens fit the positions.

        Raises:
            ValueError: They do not.
        """
        path = self.init_from
        if path is not None:
            if not Path(path).expanduser().exists():
                return  # it is looked for when the run starts
            longest, hint = self._num_positions(), "lower it"
            of = f"model.init_from {path}"
        else:
            longest, hint = self.shape.num_positions, "lower it or raise model.num_positions"
            of = f"model.preset {self.hparams['preset'] or _PRESET}"
            if self.hparams["architecture"] is not None:
                of, hint = f"model.architecture {self.hparams['architecture']}", "lower it"
        if block_length > longest:
            raise ValueError(
                f"data.block_length {block_length} is longer than the {longest} positions of {of};"
                f" {hint}"
            )

    @override
    def setup(self, stage: str) -> None:
        source = self.text_source
        if source is None:
            return
        self.check_block_length(source.block_length)
        if self.init_from is not None:
            self._check_tokenizer(source)
            return
        vocab_size = self.hparams["vocab_size"]
        if vocab_size is None:
            self.hparams["vocab_size"] = source.vocabulary_size
        elif vocab_size < source.vocabulary_size:
            raise ValueError(
                f"model.vocab_size {vocab_size} is below the {source.vocabulary_size} tokens of"
                " the data's tokenizer"
            )

    def _check_tokenizer(self, source: TextSource) -> None:
        start, reference = self._stored_start(), source.tokenizer_reference()
        if start.tokenizer_sha256 is None and getattr(source, "tokenizer_name", "") is None:
            raise ValueError(
                f"model.init_from {self.init_from} has no tokenizer beside it: data.tokenizer has"
                " to name the one that it was trained with"
            )
        if start.tokenizer_sha256 not in (None, reference["sha256"]):
            raise ValueError(
                f"data.tokenizer {reference['name_or_path']!r} is not the one of model.init_from"
                f" {self.init_from}, which data.tokenizer null takes"
            )
        if self.num_rows_needed > start.config.vocab_size:
            raise ValueError(
                f"model.init_from {self.init_from} knows {start.config.vocab_size} tokens, the"
                f" data's tokenizer has {self.num_rows_needed}"
            )

    @override
    def configure_model(self) -> None:
        prepare_averaging(self)
        if "network" not in self._modules:
            # The trainer is in this context too, unless a callback calls this.
            with self._precision_context():
                self._make_network()
        self.load_teacher()
        if self.is_fitting:
            self.guiding.attach(self.network)

    def _precision_context(self) -> AbstractContextManager[None]:
        if self._trainer is None:
            return nullcontext()
        return self.trainer.precision_plugin.tensor_init_context()

    def _make_network(self) -> None:
        self._check_recipe_fits()
        if self.is_fitting and (text := self.recipe_text()) is not None:
            print_status(text)
        if self.is_fitting and self.hparams["compression"] == 1:
            print_status(
                "compression 1: as many parameters as the dense baseline, so that nothing gets"
                " smaller; above 1 it does"
            )
        if self.init_from is not None:
            with announced(f"loading {self.init_from}"):
                self.network = self._loaded()
        else:
            network = self.laid_out()
            self.keep_own_part(network)
            start = Initialization(self.hparams["initialization"])
            with announced(f"initializing the network ({start.value})"):
                materialize(network, self.initialization_seed, start)
            self.network = network
        self._keep_residual()
        recompute_blocks(self.network, self.hparams["recompute"])
        if self.hparams["compile"]:
            compile_blocks(self.network)
        self.rounding.attach(self)
        shard(self, self.network)

    def _keep_residual(self) -> None:
        dtype = self.hparams["residual_dtype"]
        if dtype == "float32":
            return
        if self.is_fitting and not self._is_bf16_mixed:
            raise ValueError(
                f"model.residual_dtype {dtype} has no effect with trainer.precision"
                f" {self.trainer.precision}: set bf16-mixed, or model.residual_dtype float32"
            )
        keep_residual_in(self.network, DTYPES[dtype])

    @property
    def _is_bf16_mixed(self) -> bool:
        precision = self.trainer.precision_plugin
        return isinstance(precision, MixedPrecision) and precision.precision == "bf16-mixed"

    @override
    def on_train_batch_start(self, batch: TokenBatch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.guiding.begin_step(self.trainer)
        self.rounding.apply(self.trainer)

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.rounding.restore()
        super().on_before_optimizer_step(optimizer)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Before the callbacks of this step, one of which may write a checkpoint.
        self.guiding.drop_after(self.trainer.global_step + 1, self.trainer)

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        if self.is_fitting:
            self.rounding.apply(self.trainer)

    @override
    def on_validation_end(self) -> None:
        self.rounding.restore()

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        hparams = self.hparams
        optimizer = self._optimizer(
            hparams["optimizer"], (hparams["beta1"], hparams["beta2"]), hparams["learning_rate"]
        )
        if self._decays_products:
            decay_products(optimizer)
        return self.with_schedule(optimizer)

    def _optimizer(self, kind: str, betas: tuple[float, float], lr: float) -> Optimizer:
        if kind in FACTOR_OPTIMIZERS or self._decays_products:
            groups = self._factor_groups()
        else:
            groups = decay_groups(self.named_parameters(), self.hparams["weight_decay"])
        if (settings := self._embedding_settings()) is not None:
            groups = split_embedding(groups, self.network, settings)
        if kind == "adamw_8bit":
            return adamw_8bit(groups, betas, lr)
        if kind in FACTOR_OPTIMIZERS:
            precision = self.trainer.precision_plugin
            return (LoRAMuon if kind == "lora_muon" else Spectron)(
                groups,
                lr,
                betas=betas,
                fused=getattr(precision, "scaler", None) is None,
                product_dtype=torch.bfloat16 if self._is_bf16_mixed else None,
            )
        return self.fused_adamw(groups, lr=lr, betas=betas)

    def _factor_groups(self) -> list[dict[str, Any]]:
        decay = self.hparams["weight_decay"]
        factor_settings: dict[str, Any] = {"weight_decay": decay}
        dense: dict[str, Any] = {"weight_decay": decay}
        if self._decays_products:
            factor_settings = {"weight_decay": 0.0, "product_decay": decay}
        if self.hparams["optimizer"] in FACTOR_OPTIMIZERS:
            steps = self._factor_steps()
            expansion = self.hparams["factor_expansion"]
            factor_settings |= steps | {"is_low_rank": True, "expansion": expansion}
            dense |= steps | {"is_dense": True}
        moved = None
        if self.hparams["optimizer"] in FACTOR_OPTIMIZERS:
            moved = moved_as_dense(self.network, self.hparams)
        if moved is None:
            return factor_groups(self.network, decay, factor_settings)
        return factor_groups(self.network, decay, factor_settings, dense, moved)

    def _factor_steps(self) -> dict[str, Any]:
        """Settings of every group whose matrices `FACTOR_OPTIMIZERS` move."""
        kind = self.hparams["optimizer"]
        steps = {
            "lr": self.hparams[f"{kind}_learning_rate"],
            "momentum": self.hparams[f"{kind}_momentum"],
        }
        if kind == "spectron":
            steps["adjust_lr"] = self.hparams["spectron_adjust_lr"]
        return steps

    def _embedding_settings(self) -> dict[str, Any] | None:
        """Settings of a group of embedding and head; None leaves them with the other matrices."""
        rate = self.hparams["embedding_learning_rate"]
        settings: dict[str, Any] = {"weight_decay": self.hparams["weight_decay"]}
        if self.hparams["embedding_optimizer"] == "same":
            settings |= self._factor_steps() | {"is_low_rank": True, "is_embedding": True}
        elif rate is None:
            return None
        return settings if rate is None else settings | {"lr": rate}

    @property
    def _decays_products(self) -> bool:
        return bool(self.hparams["factor_decay"] == "product")

    def _check_recipe_fits(self) -> None:
        """Raises where a setting has no effect or is not possible in this run."""
        hparams = self.hparams
        changes = low_rank_changes(hparams)
        if of_embedding := changes.pop("embedding_optimizer", None):
            if not embedding_factors(self.laid_out()):
                raise ValueError(
                    f"model.embedding_optimizer {of_embedding} is about factors of the embedding,"
                    " and here it is one table: set adamw, or model.embedding_rank"
                )
            if of_embedding == "same" and has_own_head_map(self.laid_out().config):
                raise ValueError(
                    "model.embedding_optimizer same moves pairs of factors, and in"
                    f" {self.init_from} two share a table: set mixed or adamw"
                )
            for key in ("optimizer", "spectron_adjust_lr"):
                changes.pop(key, None)  # they act on these factors
        if changes and not low_rank_factors(self.laid_out()):
            key, value = next(iter(changes.items()))
            of_none = ", as model.rank is null" if hparams["rank"] is None else ""
            if hparams["recipe"] is not None:
                of_none = f", as model.recipe is {hparams['recipe']}"
            raise ValueError(
                f"model.{key} {value} is about low-rank layers, and the network has none{of_none}:"
                f" set {PLAIN[key]}"
            )
        if self.device_mesh is None:
            return
        for key in ("optimizer", "factor_decay", "self_guided"):
            if hparams[key] != PLAIN[key]:
                by_recipe = ""
                if hparams["recipe"] is not None and key in DEFAULTS:
                    by_recipe = f" (model.recipe {hparams['recipe']} sets it where it is null)"
                raise ValueError(
                    f"trainer.strategy {type(self.trainer.strategy).__name__} splits each matrix,"
                    f" which model.{key} {hparams[key]}{by_recipe} is not made for; set"
                    f" {PLAIN[key]}, or take ddp or PipelineStrategy with data_parallel replicate"
                )

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_architecture(checkpoint)
        if self.is_fitting:
            self.check_optimizer(checkpoint, _STATE_SETTINGS)
            self._check_groups(checkpoint)
            self._check_guidance(checkpoint)
        if not self.is_fitting:
            drop_guides(checkpoint["state_dict"], "the checkpoint")
        elif not any(map(is_guide, checkpoint["state_dict"])):
            self.guiding.drop(self.trainer)  # it is past its guided steps
        elif not self.hparams["self_guided"]:
            raise ValueError(
                "model.self_guided is 0.0, the checkpoint is from the guided steps of a run with"
                f" {checkpoint['hyper_parameters']['self_guided']}"
            )
        super().on_load_checkpoint(checkpoint)

    def _check_groups(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("hyper_parameters", {})
        before = saved.get("embedding_learning_rate")
        now, kind = (self.hparams[f"embedding_{key}"] for key in ("learning_rate", "optimizer"))
        if kind == "adamw" and (before is None) != (now is None):
            before, now = ("null" if rate is None else rate for rate in (before, now))
            raise ValueError(
                f"model.embedding_learning_rate is {now}, the checkpoint was trained with {before}:"
                " its optimizer has another number of groups; set both or neither"
            )

    def _check_guidance(self, checkpoint: dict[str, Any]) -> None:
        before = checkpoint.get("hyper_parameters", {}).get("self_guided", 0.0)
        if (guided := self.hparams["self_guided"]) and not before:
            raise ValueError(
                f"model.self_guided is {guided}, the checkpoint is of a run that was not guided"
            )

    @override
    def write_model(self, folder: Path) -> None:
        copied = standalone_copy(self.network)
        save_module(
            self,
            folder,
            lambda made: write_network(copied, made, copied.dtype),
            start=self.init_from,
            needs_us=not transformers_reads(copied),
            is_adapter=False,
        )

    def laid_out(self) -> PreTrainedModel:
        """The whole network on the meta device: names and sizes, no memory."""
        if self.init_from is not None:
            start = self._stored_start()
            return lay_out(
                copy.deepcopy(start.config), {} if self._is_dense_baseline else start.shapes
            )
        source = self.text_source
        return lay_out_network(
            self.network_shape,
            self._vocab_size(),
            rank=self.rank_rule,
            embedding_rank=self.hparams["embedding_rank"],
            dropout=self.hparams["dropout"],
            eos_token_id=None if source is None else source.eos_token_id,
            factor_activation=self.hparams["factor_activation"],
            expansion=self.hparams["factor_expansion"],
            has_own_head_map=self.hparams["head_map"] == "own",
        )

    def _vocab_size(self) -> int:
        vocab_size: int | None = self.hparams["vocab_size"]
        if vocab_size is None and self.text_source is not None:
            # Before `setup`, where a callback has the network built in its own.
            vocab_size = self.text_source.vocabulary_size
        if vocab_size is None:
            raise ValueError("vocab_size is null and there is no data whose tokenizer gives it")
        return vocab_size

    def _stored_start(self) -> _Start:
        """What ``init_from`` holds, its weights unread."""
        if self._start is None:
            assert self.init_from is not None
            stored = open_stored(self.init_from)
            if stored.weights.quantized is not None:
                raise ValueError(
                    f"model.init_from {self.init_from} is stored in"
                    f" {stored.weights.quantized.method}; train on from the model it was made of"
                )
            sha256 = None if stored.tokenizer is None else tokenizer_sha256(stored.tokenizer)
            weights = stored.weights
            self._start = _Start(weights.config, dict(weights.shapes), sha256, stored.source)
        return self._start

    def _loaded(self) -> PreTrainedModel:
        """The network of ``init_from``, ready for training."""
        assert self.init_from is not None
        start = self._stored_start()
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        if self._is_dense_baseline:
            network = self.laid_out()
            shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
            drawn = ((n, torch.empty(x).normal_(std=_DRAWN_STD)) for n, x in shapes.items())
            fill(network, drawn, dtype, device)
        else:
            network = build_model(
                start.source, dtype=dtype, device=device, keep_part=self.keep_own_part
            ).network
        _set_dropout(network, self.hparams["dropout"])
        network.config.use_cache = False
        network.config._attn_implementation = BLOCKED_ATTENTION
        network.train()  # a loaded one is in evaluation mode
        return network

    def _num_positions(self) -> int:
        if self.init_from is None:
            return self.shape.num_positions
        return max_positions(self._stored_start().config)

    def budget(self, sequence_length: int | None = None) -> ModelBudget:
        """Parameters, bytes and operations of the network and its dense baseline.

        Args:
            sequence_length: Tokens per sequence; None takes the data's, else all positions.
        """
        if sequence_length is None:
            source = self.text_source
            sequence_length = self._num_positions() if source is None else source.block_length
        # Laid out anew: a process may hold only a part of it.
        budget = model_budget(self.laid_out(), sequence_length)
        if self.hparams["recipe"] is not None:
            dense = lay_out_network(self.shape, self._vocab_size())
            budget = budget.beside(model_budget(dense, sequence_length))
        is_smaller = budget.total_parameters < budget.dense_total_parameters
        if self.init_from is not None or isinstance(self.shape, StoredShape) or not is_smaller:
            return budget
        same_size = same_size_dense(
            self.shape, self._vocab_size(), budget.total_parameters, sequence_length
        )
        return replace(budget, same_size=same_size)

    def dense_baseline(self) -> "LowRankPretraining":
        """The module of the same settings with every layer dense, its network not yet built."""
        settings = {k: v for k, v in self.hparams.items() if not k.startswith("_")}
        plain = {key: PLAIN[key] for key in low_rank_changes(settings)}
        # What another network's pass costs is no matter of the factors.
        plain |= {"teacher": None, **WITHOUT_TEACHER}
        if self.init_from is not None:
            twin = type(self)(**(settings | plain))
            twin._is_dense_baseline = True
            return twin
        dense: dict[str, Any] = {
            "rank": None, "rank_overrides": None, "rank_multiple": 1, "embedding_rank": None,
            "compression": None, "recipe": None, "head_map": "shared",
        }  # fmt: skip
        return type(self)(**(settings | dense | plain))


def _shape_of(
    preset: str | None, architecture: str | None, sizes: dict[str, int | None]
) -> AnyShape:
    if architecture is None:
        return preset_shape(_PRESET if preset is None else preset, **sizes)
    for name, value in ({"preset": preset} | sizes).items():
        if value is not None:
            raise ValueError(
                f"{name} {value}: architecture {architecture} decides the sizes; leave {name} at"
                " null"
            )
    return stored_shape(architecture)


def _check_multiple(
    rank_multiple: int,
    recipe: str | None,
    rank: int | float | str | None,
    rank_overrides: Mapping[str, int | float | None] | None,
    embedding_rank: int | float | None,
) -> None:
    """Raises unless the ranks may be rounded to the multiples of a number.

    Raises:
        ValueError: ``rank_multiple`` is below 1, or there is no rank to round.
    """
    if rank_multiple < 1:
        raise ValueError(f"rank_multiple {rank_multiple} is below 1")
    if rank_multiple == 1:
        return
    if recipe is not None:
        raise ValueError(
            f"rank_multiple {rank_multiple}: recipe {recipe} decides the ranks; leave rank_multiple"
            " at 1"
        )
    if rank is None and embedding_rank is None and not rank_overrides:
        raise ValueError(
            f"rank_multiple {rank_multiple} has no effect where rank and embedding_rank are null:"
            " set one of them, or rank_multiple 1"
        )


def _check_head_map(
    head_map: str, embedding_rank: int | float | None, embedding_optimizer: str, shape: AnyShape
) -> None:
    """Raises unless the head may have this map.

    Raises:
        ValueError: ``head_map`` is unknown, or another setting does not fit it.
    """
    if head_map not in HEAD_MAPS:
        hint = nearest(head_map, HEAD_MAPS)
        raise ValueError(f"head_map {head_map!r} is none of {', '.join(HEAD_MAPS)}{hint}")
    if head_map == "shared":
        return
    if embedding_rank is None:
        raise ValueError(
            f"head_map {head_map} is about a factorized embedding: set embedding_rank, or"
            " head_map shared"
        )
    if not shape.config(1).tie_word_embeddings:
        raise ValueError(
            f"head_map {head_map}: the head of this architecture is not tied to the embedding and"
            " has factors of its own; set head_map shared"
        )
    if embedding_optimizer == "same":
        raise ValueError(
            f"embedding_optimizer same moves pairs of factors, and with head_map {head_map} two"
            " share a table: set embedding_optimizer mixed or adamw"
        )


def _set_dropout(network: PreTrainedModel, dropout: float) -> None:
    """Sets the dropout of a network whose stored config has another.

    Raises:
        ValueError: The network has no place for dropout.
    """
    family = family_of(network)
    check_dropout(family.model_type, dropout)
    found = [module for module in network.modules() if isinstance(module, nn.Dropout)]
    for module in found:
        module.p = dropout
    for key in family.dropouts:
        setattr(network.config, key, dropout)
