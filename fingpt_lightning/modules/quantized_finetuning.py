"""Finetuning adapters on a frozen, quantized base.

Axes: B batch, T tokens, N supervised tokens, D width, V vocabulary.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import Optimizer
from transformers import PreTrainedModel
from typing_extensions import override

from fingpt_lightning.data.batch import IGNORED_LABEL, TokenBatch
from fingpt_lightning.low_rank.adapters import AdapterOptions, FrozenBase
from fingpt_lightning.low_rank.cpu_products import faster_products
from fingpt_lightning.models import LossSums, compile_blocks, recompute_blocks
from fingpt_lightning.models.adapting import (
    ALL_LINEAR,
    WholeAdapters,
    adapt,
    base_quantization,
    described_adapters,
    linear_names,
    matching_names,
    save_adapter,
    without_adapters,
)
from fingpt_lightning.models.families import logits_of, max_positions
from fingpt_lightning.models.formats.checkpoint import describe_adapters, load_contents
from fingpt_lightning.models.formats.hf_folder import transformers_reads
from fingpt_lightning.models.formats.peft_adapter import (
    ADAPTER_FOLDER,
    BEST_ADAPTER_FOLDER,
    Base,
    read_adapter_config,
)
from fingpt_lightning.models.layout import features_of
from fingpt_lightning.models.loading import DTYPES, load_model
from fingpt_lightning.models.packed_attention import run_packed, use_packed_attention
from fingpt_lightning.models.quantization.layers import BYTES_PER_NUMBER
from fingpt_lightning.models.recompute import OFFLOAD
from fingpt_lightning.models.sources import ModelSource
from fingpt_lightning.modules.base_model import RandomLlama, random_llama
from fingpt_lightning.modules.language_modeling import LanguageModelingModule
from fingpt_lightning.modules.optimization import adamw_8bit
from fingpt_lightning.modules.ranges import check_above_0, check_from_0, check_optimization
from fingpt_lightning.modules.saving import save_module
from fingpt_lightning.modules.teacher import Teacher
from fingpt_lightning.modules.weight_averaging import prepare_averaging
from fingpt_lightning.terminal.progress import announced

_OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")
_RECOMPUTE = ("none", "block", "offload")


class QuantizedFinetuning(LanguageModelingModule):
    """Low-rank adapters trained on a base that stays as it is, in 4, 8 or more bits.

    Checkpoints hold the adapters and the optimizer, not the base; wherever an adapter may be named,
    so may they. When training ends, the run folder holds the adapters as they are then, as
    ``adapter/`` in PEFT's format.

    Args:
        base: Folder, hub name, GGUF file, checkpoint or run folder of the model to start from;
            null for ``random_base``.
        revision: Branch, tag or commit of a hub name.
        quantize: ``nf4``, ``int8``, or null for a base in ``dtype``.
        dtype: Dtype of the base's other weights and of all products; adapters are kept in float32.
        rank: Rank of every adapter.
        alpha: Numerator of the weight of the adapters, ``alpha / rank``; null is twice the rank.
        dropout: Probability with which an adapter's input features are dropped. What rows of a
            batch share is dropped alike for all of them.
        rslora: Whether to weigh adapters by ``alpha / sqrt(rank)``.
        dora: Whether to learn the lengths of the weights' rows too.
        target_modules: ``all-linear``, or the layers to adapt by the ends of their names.
        learning_rate: Highest learning rate of the schedule.
        lora_plus_ratio: Ratio of the learning rate of the adapters' second matrices to that of the
            first.
        final_learning_rate_ratio: Ratio of the last to the highest learning rate.
        warmup: Length of the warm-up: an int is steps, a float the share of all steps.
        weight_decay: Weight decay of the adapters' matrices.
        beta1: AdamW's decay of the gradient's mean.
        beta2: AdamW's decay of the gradient's square.
        optimizer: ``adamw``, fused; ``adamw_8bit``, with its state in 8 bits; or
            ``paged_adamw_8bit``, whose state moves to the host when a GPU is full.
        recompute: Results that the backward pass computes again: ``none``; ``block``, all of a
            block but its input; ``offload``, the same with the inputs kept in the host's memory.
        compile: Whether torch.compile fuses the blocks, within a minute or two. Not with
            ``recompute: offload``, nor with any recomputing over rows that ``data.batching`` packs.
        supervised_logits_only: Whether logits are computed only where there are labels; the loss is
            the same.
        kl_weight: Weight of the divergence from the base's predictions, in nats per token, at
            positions without labels, such as those of the prompts: it guards what the base knew.
        kl_positions: Most positions of a microbatch at which the divergence is taken.
        loss_chunk_size: Tokens whose logits over the vocabulary are held at a time; null is as many
            as take 100 MiB on a CPU and 512 MiB on a GPU.
        random_base: Sizes of a random Llama in place of ``base``, to try a config out.
        teacher: Folder, hub name, GGUF file, checkpoint or run folder of a frozen model with the
            same tokenizer, such as the one that ``base`` was decomposed from: at every position
            with a label the network learns its whole distribution. Each device holds all of it.
        teacher_quantize: ``nf4`` or ``int8`` for the teacher's linear layers; null keeps them.
        teacher_dtype: Dtype of the teacher's other weights and of its products.
        teacher_weight: Share w, in (0, 1], of the divergence KL(teacher || network) in the loss
            w T^2 KL + (1 - w) cross-entropy.
        teacher_temperature: Divisor T of the logits of both networks in the divergence.

    Keys: those of `LanguageModelingModule`; ``train/loss`` includes the weighted divergence,
    ``val/loss`` does not.

    Raises:
        ValueError: A value outside its range; the message names it.

    Source: https://arxiv.org/abs/2402.13533, section 4; https://arxiv.org/abs/2305.14314 (QLoRA),
    https://arxiv.org/abs/2402.12354 (LoRA+).
    """

    architecture_settings = ("rank", "alpha", "rslora", "dora", "target_modules")

    def __init__(
        self,
        base: str | None = None,
        revision: str | None = None,
        quantize: Literal["nf4", "int8"] | None = "nf4",
        dtype: Literal["float32", "bfloat16", "float16", "float64"] = "bfloat16",
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        target_modules: list[str] | str = ALL_LINEAR,
        learning_rate: float = 0.0005,
        lora_plus_ratio: float = 1.0,
        final_learning_rate_ratio: float = 0.1,
        warmup: int | float = 0.05,
        weight_decay: float = 0.0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw",
        recompute: Literal["none", "block", "offload"] = "none",
        compile: bool = False,
        supervised_logits_only: bool = True,
        kl_weight: float = 0.0,
        kl_positions: int = 64,
        loss_chunk_size: int | None = None,
        random_base: RandomLlama | None = None,
        teacher: str | None = None,
        teacher_quantize: Literal["nf4", "int8"] | None = None,
        teacher_dtype: Literal["float32", "bfloat16", "float16", "float64"] = "bfloat16",
        teacher_weight: float = 1.0,
        teacher_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if (base is None) == (random_base is None):
            raise ValueError("give either base, the model to start from, or random_base, its sizes")
        for name, value, allowed in (
            ("dtype", dtype, tuple(DTYPES)),
            ("optimizer", optimizer, _OPTIMIZERS),
            ("recompute", recompute, _RECOMPUTE),
            ("quantize", quantize, ("nf4", "int8", None)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} {value!r} is none of {', '.join(map(str, allowed))}")
        check_optimization(
            learning_rate=learning_rate,
            final_learning_rate_ratio=final_learning_rate_ratio,
            warmup=warmup,
            weight_decay=weight_decay,
            beta1=beta1,
            beta2=beta2,
            loss_chunk_size=loss_chunk_size,
        )
        if compile and recompute == OFFLOAD:
            raise ValueError(
                f"compile true with recompute {recompute}: the compiler cannot move the blocks'"
                " inputs; take recompute block, or compile false"
            )
        check_above_0(lora_plus_ratio=lora_plus_ratio)
        check_from_0(kl_weight=kl_weight)
        if kl_positions < 1:
            raise ValueError(f"kl_positions {kl_positions} is below 1")
        self.options = AdapterOptions(rank, alpha, dropout, rslora, dora)
        self.base = base
        self.random_base = random_base
        self.loss_chunk_size = loss_chunk_size
        self.base_revision = ""
        self._source: ModelSource | None = None
        self.strict_loading = False  # a checkpoint holds no base
        self.save_hyperparameters(ignore=["random_base"])
        self.teacher = Teacher.checked(self.hparams)
        self.hparams["random_base"] = None if random_base is None else dict(vars(random_base))
        self.register_load_state_dict_post_hook(_miss_no_base)  # type: ignore[no-untyped-call]
        # Drawn now, so that nothing that draws before the adapters are made changes them.
        self.initialization_seed = int(torch.randint(2**31, ()))

    @override
    def configure_model(self) -> None:
        prepare_averaging(self)
        if "network" not in self._modules:
            self._make_network()
        self.load_teacher()

    def _make_network(self) -> None:
        self._check_strategy()
        hparams = self.hparams
        dtype, device = DTYPES[hparams["dtype"]], self._base_device()
        if self.base is not None:
            how = hparams["quantize"]
            with announced(f"loading {self.base}{f', quantized to {how}' if how else ''}"):
                loaded = load_model(
                    self.base,
                    dtype=dtype,
                    device=device,
                    quantize=how,
                    revision=hparams["revision"],
                    keep_part=self._keep_part,
                )
            self.network, self.base_revision = loaded.network, loaded.revision
            self._source = loaded.source
        else:
            source = self.text_source
            if source is None:
                raise ValueError("random_base needs data whose tokenizer gives its vocabulary")
            assert self.random_base is not None
            self.network = random_llama(
                self.random_base,
                source.vocabulary_size,
                source.eos_token_id,
                dtype=dtype,
                device=device,
                quantize=hparams["quantize"],
                seed=0,
                keep_part=self._keep_part,
            )
        self._check_fits_data()
        self._layer_options = dict.fromkeys(self._linear, self.options)
        if self._source is not None and self._source.adapter is not None:
            # Read once: a checkpoint can be written when the adapter of the start is gone.
            stored = read_adapter_config(self._source.adapter)
            self._layer_options = {name: stored.options_of(name) for name in self._linear}
        else:
            held = set(linear_names(self.network))
            own = [name for name in self._adapted if name in held]
            adapt(self.network, self.options, own, self.initialization_seed)
        _no_base_dropout(self.network)
        self.network.train()  # a loaded one is in evaluation mode
        use_packed_attention(self.network)
        recompute_blocks(self.network, hparams["recompute"])
        if hparams["compile"]:
            compile_blocks(self.network)

    @override
    def hidden_states(self, batch: TokenBatch) -> Float[Tensor, "B T D"]:
        return self.hidden_states_of(self.network, batch)

    @override
    def hidden_states_of(
        self, network: PreTrainedModel, batch: TokenBatch
    ) -> Float[Tensor, "B T D"]:
        if "packing" not in batch:
            return super().hidden_states_of(network, batch)
        return run_packed(network, batch["input_ids"], batch["position_ids"], batch["packing"])

    @override
    def prepared(self, batch: TokenBatch) -> TokenBatch:
        made = batch.copy()
        if self.hparams["supervised_logits_only"]:
            made["supervised"] = self._pinned(_places_of_labels(batch["labels"]))
        is_evaluating = self._trainer is not None and not self._trainer.training
        if self.hparams["kl_weight"] and not is_evaluating:
            made["compared"] = self._pinned(self._places_to_compare(batch["labels"]))
        return made

    def _pinned(self, places: Tensor) -> Tensor:
        # The host does not wait for copies out of such memory.
        return places.pin_memory() if self.device.type == "cuda" else places

    @override
    def batch_loss(self, batch: TokenBatch, hidden: Float[Tensor, "B T D"]) -> LossSums:
        return self.loss_sum_and_tokens(hidden, batch["labels"], batch.get("supervised"))

    @override
    def loss_sum_and_tokens(
        self,
        hidden: Float[Tensor, "B T D"],
        labels: Int[Tensor, "B T"],
        places: Int[Tensor, "N"] | None = None,
    ) -> LossSums:
        if not self.hparams["supervised_logits_only"]:
            return super().loss_sum_and_tokens(hidden, labels)
        labels_1N, hidden_1ND = _labelled(labels, places, hidden)
        return super().loss_sum_and_tokens(hidden_1ND, labels_1N)

    @override
    def training_sums(self, batch: TokenBatch, hidden: Float[Tensor, "B T D"]) -> LossSums:
        if self.teacher is None or not self.hparams["supervised_logits_only"]:
            return super().training_sums(batch, hidden)
        teacher_hidden = self.teacher.hidden_states(batch, self.hidden_states_of)
        labels_1N, hidden_1ND, teacher_1ND = _labelled(
            batch["labels"], batch.get("supervised"), hidden, teacher_hidden
        )
        return self.teacher.loss(
            self.network, hidden_1ND, teacher_1ND, labels_1N, self.loss_chunk_size
        )

    @override
    @faster_products()
    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        weight = self.hparams["kl_weight"]
        if not weight:
            return super().training_step(batch, batch_idx)
        hidden = self.hidden_states(batch)
        sums = self.training_sums(batch, hidden)
        divergence = self.divergence_from_base(batch, hidden)
        sums = LossSums(sums.loss_sum + weight * sums.num_tokens * divergence, sums.num_tokens)
        self.log_step(sums)
        return self.backward_start(sums.loss_sum)

    def divergence_from_base(
        self, batch: TokenBatch, hidden: Float[Tensor, "B T D"]
    ) -> Float[Tensor, ""]:
        """KL(base || network) in nats per token, mean over positions without labels, evenly spread.

        Positions behind the last label of a row of the batch are left out: they may be padding.

        Raises:
            ValueError: The batch does not have such positions.

        Cost: one more forward pass, without gradients.
        """
        places = batch.get("compared")
        if places is None:
            places = self._places_to_compare(batch["labels"])
        with torch.no_grad(), without_adapters(self.network):
            base_hidden = self.hidden_states(batch)
        log_p, base_log_p = (
            F.log_softmax(logits_of(self.network, states.flatten(0, 1)[places]).float(), -1)
            for states in (hidden, base_hidden)
        )
        return F.kl_div(log_p, base_log_p, reduction="batchmean", log_target=True)

    def _places_to_compare(self, labels: Int[Tensor, "B T"]) -> Int[Tensor, "M"]:
        is_labeled = labels != IGNORED_LABEL
        is_before_a_label = is_labeled.flip(1).cumsum(1).flip(1) > 0
        places = (is_before_a_label & ~is_labeled).flatten().nonzero().squeeze(1)
        if not len(places):
            raise ValueError(
                f"model.kl_weight {self.hparams['kl_weight']:g} compares with the base where"
                " nothing is trained, as on prompts, and these data train every token: set 0"
            )
        return places[:: max(1, -(-len(places) // self.hparams["kl_positions"]))]

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        return self.with_schedule(self._optimizer())

    def base_text(self) -> str:
        """Name of the base, and how it is stored."""
        how = self.hparams["quantize"] or self.hparams["dtype"]
        return f"{'random Llama' if self.base is None else self.base} in {how}"

    def adapter_text(self) -> str:
        """Kind and rank of the adapter."""
        kind = "DoRA" if self.options.dora else "LoRA"
        return f"{kind} of rank {self.options.rank}"

    def trained_share(self) -> float:
        """Trained parameters over all, those of the base counted unquantized."""
        trained = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        frozen = 0
        for parameter in self.network.parameters():
            state = getattr(parameter, "quant_state", None)
            if not parameter.requires_grad:
                frozen += parameter.numel() if state is None else math.prod(state.shape)
        return trained / (trained + frozen)

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapters' weights; the base is where it came from."""
        prefix = kwargs.get("prefix", "")
        trained = {f"{prefix}{name}" for name, p in self.named_parameters() if p.requires_grad}
        whole = cast("dict[str, Any]", super().state_dict(*args, **kwargs))
        # In place: a module around this one, such as an average, keeps what it handed in.
        for name in [n for n in whole if n.startswith(prefix) and n not in trained]:
            del whole[name]
        return whole

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        whole, config = self._all_adapters(checkpoint["state_dict"]), {}
        if whole.state:  # of a pipeline, one process has the state of all
            config = described_adapters(self.network, whole, self._named_base())
        describe_adapters(checkpoint, self.base_revision, config, whole.base_quantize)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_architecture(checkpoint)
        if self.is_fitting:
            self.check_optimizer(checkpoint, {"optimizer": "adamw"})
        if (revision := checkpoint.get("base_revision")) != self.base_revision:
            raise ValueError(
                f"model.base {self.base} has the weights {self.base_revision}, the checkpoint was"
                f" trained on {revision}"
            )
        stored, wanted = set(checkpoint["state_dict"]), set(self.state_dict())
        if self.partial_network is not None:
            wanted = set(self.partial_network.state_names())
        if odd := sorted(stored ^ wanted):
            raise ValueError(
                f"the checkpoint does not fit the adapters: {odd[0]} is in one of them"
            )
        super().on_load_checkpoint(checkpoint)

    @override
    def on_train_end(self) -> None:
        """Writes ``adapter/``, and ``adapter_best/`` of the best checkpoint where there is one."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        whole = self._whole_adapters()
        if not self.trainer.is_global_zero:
            return
        self._save_adapter(ADAPTER_FOLDER, whole)
        best = next(
            (c for c in self.trainer.checkpoint_callbacks if getattr(c, "monitor", "")), None
        )
        path = Path(getattr(best, "best_model_path", ""))
        if path.is_file():
            saved = load_contents(path)
            self._save_adapter(BEST_ADAPTER_FOLDER, self._all_adapters(saved["state_dict"]))

    @override
    def write_model(self, folder: Path) -> None:
        """Writes the adapter, which names its base.

        Raises:
            ValueError: The base is a random one, which nobody else has.
        """
        if self.base is None:
            raise ValueError("an adapter of random_base is of no use to others")
        save_module(
            self,
            folder,
            lambda made: save_adapter(self.network, made, *self._named_base()),
            start=self.base,
            needs_us=not transformers_reads(self.network),
            is_adapter=True,
        )

    def _save_adapter(self, name: str, whole: WholeAdapters | None) -> None:
        folder = Path(self.trainer.default_root_dir) / name
        save_adapter(self.network, folder, *self._named_base(), whole)
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def _named_base(self) -> Base:
        return Base("random", None) if self._source is None else self._source.base.absolute()

    def _optimizer(self) -> Optimizer:
        hparams = self.hparams
        betas = (hparams["beta1"], hparams["beta2"])
        groups = self._parameter_groups()
        if hparams["optimizer"] == "adamw":
            return self.fused_adamw(groups, betas=betas)
        is_paged = hparams["optimizer"] == "paged_adamw_8bit"
        if is_paged and self.network.device.type != "cuda":
            raise ValueError(
                f"model.optimizer {hparams['optimizer']} moves its state between GPU and host;"
                f" on {self.network.device.type} take adamw_8bit"
            )
        return adamw_8bit(groups, betas, hparams["learning_rate"], is_paged)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """First matrices, second matrices, lengths: by learning rate and decay."""
        rate, decay = self.hparams["learning_rate"], self.hparams["weight_decay"]
        kinds = {
            "lora_A": {"lr": rate, "weight_decay": decay},
            "lora_B": {"lr": rate * self.hparams["lora_plus_ratio"], "weight_decay": decay},
            "lora_magnitude_vector": {"lr": rate, "weight_decay": 0.0},
        }
        groups = []
        for kind, settings in kinds.items():
            found = [p for name, p in self.named_parameters() if name.endswith(f".{kind}")]
            # A process without adapters still has the groups of all.
            is_elsewhere = self.partial_network is not None and (
                kind != "lora_magnitude_vector" or self.options.dora
            )
            if found or is_elsewhere:
                groups.append({"params": found, **settings})
        return groups

    def _base_device(self) -> torch.device:
        return torch.device("cpu") if self._trainer is None else self.trainer.strategy.root_device

    def _check_strategy(self) -> None:
        if self.device_mesh is not None:
            raise ValueError(
                f"trainer.strategy {type(self.trainer.strategy).__name__} splits each matrix, which"
                " a base under adapters is not made for; take ddp, with all of it on each device,"
                " or PipelineStrategy with data_parallel replicate, with some of its blocks"
            )
        if self.partial_network is not None and self.hparams["kl_weight"]:
            raise ValueError(
                f"model.kl_weight {self.hparams['kl_weight']} takes a second forward pass, which"
                " the schedule of a pipeline has not: set it 0"
            )

    def _keep_part(self, network: PreTrainedModel) -> None:
        """Records the layers to adapt in a network just laid out, and keeps our part of it."""
        hparams = self.hparams
        self._linear = linear_names(network)
        self._adapted = matching_names(self._linear, hparams["target_modules"])
        adapters = {}
        for name in self._adapted:
            in_features, out_features = features_of(network.get_submodule(name))
            adapters[name] = self.options.rank * (in_features + out_features)
        plain = DTYPES[hparams["dtype"]].itemsize
        in_matrix = BYTES_PER_NUMBER.get(hparams["quantize"], plain)
        self.keep_own_part(network, FrozenBase(plain, in_matrix, adapters))

    def _whole_adapters(self) -> WholeAdapters | None:
        """Adapters of all processes, where each has a part; they call it together."""
        if self.partial_network is None:
            return None
        return self._all_adapters(self.partial_network.lightning_module_state_dict())

    def _all_adapters(self, state: Mapping[str, Tensor]) -> WholeAdapters:
        return WholeAdapters(
            self._layer_options,
            {name.removeprefix("network."): tensor for name, tensor in state.items()},
            self._linear,
            # A process of a pipeline may hold no adapted layer.
            self.hparams["quantize"] or base_quantization(self.network),
        )

    def _check_fits_data(self) -> None:
        source = self.text_source
        if source is None:
            return
        config = self.network.config
        num_positions = max_positions(config)
        if source.block_length > num_positions:
            raise ValueError(
                f"data.max_length {source.block_length} is longer than the {num_positions}"
                f" positions of {self.base or 'random_base'}"
            )
        batching, recompute = getattr(source, "batching", "padded"), self.hparams["recompute"]
        if self.hparams["compile"] and recompute != "none" and batching != "padded":
            raise ValueError(
                f"model.compile true with model.recompute {recompute}: nothing would be compiled"
                f" over rows that data.batching {batching} packs; set model.recompute none,"
                " data.batching padded, or model.compile false"
            )
        if self.num_rows_needed > config.vocab_size:
            raise ValueError(
                f"data.tokenizer has {self.num_rows_needed} tokens, {self.base}"
                f" {config.vocab_size}: take the base's own"
            )


def _labelled(
    labels: Int[Tensor, "B T"],
    places: Int[Tensor, "N"] | None,
    *states: Float[Tensor, "B T _"],
) -> list[Tensor]:
    """The labels, and the states of some networks, of the places that have one, in one row.

    Args:
        labels: Labels of a batch.
        places: Places in the flattened batch that have a label; None looks for them.
        states: States of the batch.
    """
    places = _places_of_labels(labels) if places is None else places
    parts = (labels.flatten(), *(hidden.flatten(0, 1) for hidden in states))
    return [part.index_select(0, places)[None] for part in parts]


def _miss_no_base(module: nn.Module, found: _IncompatibleKeys) -> None:
    """Lets a strict reader of a state dict, such as an average's, do without the frozen base."""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    frozen |= {name for name, _ in module.named_buffers()}
    # A module around this one has its own names in front.
    found.missing_keys[:] = [
        key
        for key in found.missing_keys
        if not any(key == name or key.endswith(f".{name}") for name in frozen)
    ]


def _places_of_labels(labels: Int[Tensor, "B T"]) -> Int[Tensor, "N"]:
    """Places in the flattened batch; on a device the host waits for their number."""
    return (labels.flatten() != IGNORED_LABEL).nonzero().squeeze(1)


def _no_base_dropout(network: nn.Module) -> None:
    """Switches the base's own dropout off: it would differ between rows that share a beginning."""
    for part in network.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(getattr(part, "attention_dropout", None), float):
            part.__dict__["attention_dropout"] = 0.0
