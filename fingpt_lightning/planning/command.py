"""``fingpt plan``: what a run would need, by the parser, model and data of ``fingpt fit``."""

import argparse
import contextlib
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LightningCLI
from rich.console import Console
from torch import Tensor, nn
from typing_extensions import override

from callbacks.memory import MemoryMonitor
from fingpt_lightning.data import FinancialInstructions
from fingpt_lightning.data.batch import IGNORED_LABEL
from fingpt_lightning.data.instructions import tokenizer_of_base
from fingpt_lightning.files import refuse_unwritable, write_json
from fingpt_lightning.low_rank import (
    LowRankEmbedding,
    LowRankLinear,
    embedding_factors,
    low_rank_factors,
)
from fingpt_lightning.metric_keys import MEMORY_PARTS
from fingpt_lightning.models.device import free_bytes
from fingpt_lightning.models.families import family_of
from fingpt_lightning.models.quantization.fake_quantization import RoundedWeights
from fingpt_lightning.modules import LowRankPretraining
from fingpt_lightning.modules.language_modeling import LanguageModelingModule
from fingpt_lightning.modules.optimization import moved_as_dense
from fingpt_lightning.modules.recipe import FACTOR_OPTIMIZERS
from fingpt_lightning.pipeline import Balance, Workload
from fingpt_lightning.pipeline.schedule import largest_layout
from fingpt_lightning.planning.blueprint import (
    Blueprint,
    TeacherCosts,
    blueprint,
    teacher_costs,
)
from fingpt_lightning.planning.fake_step import StepBytes, count_step, fake_batch, with_more_blocks
from fingpt_lightning.planning.plan import (
    MemoryPlan,
    StagePlan,
    TilePlan,
    batches_seen,
    factor_saving,
    jsonable,
    optimizer_bytes,
    rank_plans,
    run_length,
    tile_plan,
)
from fingpt_lightning.planning.table import plan_table, stages_table
from fingpt_lightning.profiling import measured_peak_flops_per_s
from fingpt_lightning.strategies import PipelineStrategy
from fingpt_lightning.units import MIB, format_bytes, peak_flops_per_s

Build = Callable[[list[str]], LightningCLI]

_CALIBRATION_STEPS = 5
_LOOKED_AT = 200
"""Batches of which the largest is planned: rows of instructions differ in length."""
_WARMUP_STEPS = 2
_FREE_SHARE = 0.8
"""Share of free memory that a calibration may take by account, which leaves libraries out."""
_LABELS_PER_ROW = 4
_GPT2_VOCABULARY = 50257
_MAX_COUNTED_BLOCKS = 4
_MEASURED = ("weights", "gradients", "optimizer", "activations")
_COMPUTE = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class _Data(NamedTuple):
    """The largest batch, and how many there are; ``note`` explains assumed values."""

    batch: Any
    tokens_per_batch: float
    num_batches: int | None
    vocabulary_size: int
    note: str | None


class _Notes(Callback):
    """When each batch ended, and the most memory of all of them."""

    def __init__(self) -> None:
        self.ended_s: list[float] = []
        self.bytes: dict[str, int] = {}

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.ended_s.append(time.perf_counter())
        for part in _MEASURED:
            value = trainer.callback_metrics.get(MEMORY_PARTS[part])
            if value is not None:
                self.bytes[part] = max(self.bytes.get(part, 0), round(value.item() * MIB))


def run(options: argparse.Namespace, build: Build) -> None:
    """Prints the plan; no run folder is made and nothing is logged.

    Args:
        options: Result of `planning.options.parse_options`.
        build: Function that parses and builds what the words of a Trainer command name, and runs
            nothing.

    Raises:
        ConfigError: The command line or a config is wrong, as with ``fingpt fit``.
        ValueError: The model's shapes are not known, or ``--json`` leads nowhere.
    """
    if options.json is not None:
        refuse_unwritable(options.json, "json")
    with tempfile.TemporaryDirectory() as folder:
        plan, notes = _plan(options.words, build, options.calibrate, folder)
    console = Console()
    console.print(plan_table(plan))
    if plan["stages"]:
        console.print(stages_table(plan["stages"]))
    for line in (*notes, _verdict(plan)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if options.json is not None:
        write_json(options.json, plan)


def _plan(
    words: list[str], build: Build, calibrate: bool, folder: str
) -> tuple[dict[str, Any], list[str]]:
    own = [
        *("--trainer.default_root_dir", folder, "--trainer.enable_progress_bar", "false"),
        # In another rhythm than the trainer's a monitor's figures reach the loggers alone.
        *("--trainer.fast_dev_run", str(_CALIBRATION_STEPS), "--trainer.log_every_n_steps", "1"),
    ]
    cli = build(["fit", *words, *own])
    trainer, settings = cli.trainer, cli.config["fit"]
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    # In a calibration they would write files and talk.
    trainer.callbacks = []  # type: ignore[attr-defined]
    data = _read_data(cli)
    notes = [data.note] if data.note else []
    length = int(cli.datamodule.block_length)
    device = trainer.strategy.root_device
    precision = str(trainer.precision)
    made = blueprint(cli.model, data.vocabulary_size, length, precision, device)
    if isinstance(cli.model, LowRankPretraining) and (text := cli.model.recipe_text()) is not None:
        notes.append(text)
    step = _count(cli.model, made, data.batch, precision)
    optimizer = cli.model.hparams.get("optimizer", "adamw")
    gradients = sum(count * width for count, width in made.trained_parameters)
    state = optimizer_bytes(made.trained_parameters, optimizer)
    if optimizer in FACTOR_OPTIMIZERS:
        has_vectors = optimizer == "spectron"
        factors = low_rank_factors(made.network)
        if cli.model.hparams["embedding_optimizer"] == "same":
            factors += embedding_factors(made.network)
        moved = [(min(p.shape) if has_vectors else 0, p) for p in factors]
        moved += [(0, p) for p in moved_as_dense(made.network, cli.model.hparams) or ()]
        state -= factor_saving((rank, p.numel(), p.element_size()) for rank, p in moved)
    # At the optimizer step gradients are whole and activations are gone.
    copies = _copied(cli.model, made, callbacks, device)
    peak = made.weights + copies + state + max(step.peak, gradients)
    teacher = teacher_costs(cli.model, length, data.batch["input_ids"].numel(), device)
    if teacher is not None:
        peak += teacher.weights + teacher.loss
    memory = MemoryPlan(made.weights, gradients, state, step.activations, step.loss, peak)
    batches = None
    replicas = _num_replicas(trainer)
    if data.num_batches is not None:
        batches = batches_seen(data.num_batches // replicas, settings.trainer.limit_train_batches)
    accumulate = settings.trainer.accumulate_grad_batches
    lasts = run_length(settings.trainer.max_steps, settings.trainer.max_epochs, batches, accumulate)
    tokens_a_step = round(data.tokens_per_batch * accumulate * replicas)
    free = free_bytes(device)
    measured: dict[str, int] | None = None
    step_time_s: float | None = None
    if calibrate:
        refusal = _no_calibration(cli, data, memory, free)
        if refusal:
            notes.append(f"not calibrated: {refusal}")
        else:
            measured, step_time_s = _calibrated(cli)
    is_calibrated = step_time_s is not None
    if step_time_s is None and lasts.steps is not None:
        batch_s, note = _time_by_flops(made, teacher, cli.model, data.batch, trainer)
        step_time_s = accumulate * batch_s
        notes.append(note)
    plan = {
        "config": _name(settings),
        "parameters": made.parameters,
        "dense_parameters": made.dense_parameters,
        "same_size_dense": None if made.same_size is None else made.same_size._asdict(),
        "rank_tiles": jsonable(_tiles(made.network)),
        "trained": made.trained,
        "bytes": jsonable(memory),
        "copied_bytes": copies,
        "teacher_bytes": 0 if teacher is None else teacher.weights,
        "offloaded_bytes": _offloaded(cli.model, made, data.batch, device),
        "measured_bytes": measured,
        "steps": lasts.steps,
        "epochs": lasts.epochs,
        "tokens_a_step": tokens_a_step,
        "tokens": None if lasts.steps is None else lasts.steps * tokens_a_step,
        "step_time_s": step_time_s,
        "seconds": lasts.steps * step_time_s if lasts.steps and step_time_s else None,
        "is_calibrated": is_calibrated,
        "device": str(device),
        "num_devices": trainer.world_size,
        "free_bytes": free,
        "stages": jsonable(_stages(cli, made)),
    }
    return plan, notes


def _copied(
    module: LightningModule, made: Blueprint, callbacks: Iterable[Callback], device: torch.device
) -> int:
    """Bytes of the weights that are held a second time: averages, and those behind rounded ones."""
    copies = 0
    for callback in callbacks:
        if isinstance(callback, WeightAveraging) and callback._device in (None, device):
            copies += made.weights
    if (method := module.hparams.get("quantization_aware")) is not None:
        copies += RoundedWeights(made.network, method).kept_bytes
    return copies


def _tiles(network: nn.Module) -> TilePlan | None:
    """How full the ranks of a network's layers and embedding leave a GPU's tiles."""
    layers = [
        (m.rank, m.in_features, m.out_features)
        for m in network.modules()
        if isinstance(m, LowRankLinear)
    ]
    layers += [
        (m.rank, m.num_embeddings, m.embedding_dim)
        for m in network.modules()
        if isinstance(m, LowRankEmbedding)
    ]
    return tile_plan(layers)


def _read_data(cli: LightningCLI) -> _Data:
    """A batch of the data, or one of full rows where they are not there to be read."""
    datamodule: Any = cli.datamodule
    settings = cli.config["fit"].data.get("init_args") or {}
    refusal = None
    if _reads_hub(settings):
        refusal = "they lie on the hub"
    elif not _has_tokenizer(settings):
        refusal = f"tokenizer {settings['tokenizer']} is not on this machine"
    else:
        note = _take_tokenizer(cli)
        try:
            datamodule.prepare_data()
            datamodule.setup("fit")
            loader = datamodule.train_dataloader()
            batch, tokens_per_batch = _largest(itertools.islice(loader, _num_looked_at(cli)))
            return _Data(batch, tokens_per_batch, len(loader), datamodule.vocabulary_size, note)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            refusal = " ".join(str(error).split())
    shape = (int(datamodule.batch_size), int(datamodule.block_length))
    labels = torch.zeros(shape, dtype=torch.int64)
    if not isinstance(cli.model, LowRankPretraining):
        labels[:, _LABELS_PER_ROW:] = IGNORED_LABEL
    batch = {"input_ids": torch.zeros(shape, dtype=torch.int64), "labels": labels}
    note = (
        f"the data were not read ({refusal}): {shape[0]} full rows of {shape[1]} tokens are assumed"
    )
    return _Data(batch, math.prod(shape), None, _GPT2_VOCABULARY, note)


def _num_looked_at(cli: LightningCLI) -> int:
    """Batches that are read: of what the run will see, a part that takes a moment."""
    trainer = cli.config["fit"].trainer
    if not isinstance(cli.datamodule, FinancialInstructions):
        return 1  # blocks are all equal
    if trainer.max_steps is None or trainer.max_steps < 0:
        return _LOOKED_AT
    num_batches: int = trainer.max_steps * trainer.accumulate_grad_batches
    return max(1, min(_LOOKED_AT, num_batches))


def _largest(batches: Iterable[Any]) -> tuple[Any, float]:
    """The batch with the most tokens, and how many they have on average."""
    largest: Any = None
    sizes: list[int] = []
    for batch in batches:
        sizes.append(int(batch["input_ids"].numel()))
        if sizes[-1] == max(sizes):
            largest = batch
    return largest, statistics.fmean(sizes)


def _take_tokenizer(cli: LightningCLI) -> str | None:
    """Gives data without a tokenizer that of the module's base; a sentence where it is not here.

    In a run the data find the base through the trainer's module, which a plan has not attached.
    """
    datamodule, base = cli.datamodule, getattr(cli.model, "base", None)
    if not isinstance(datamodule, FinancialInstructions) or base is None:
        return None
    if datamodule.tokenizer_name is not None:
        return None
    if not Path(base).expanduser().exists():
        return (
            f"model.base {base} is not on this machine: lengths of rows are counted by a tokenizer"
            " that was trained on them, and will differ"
        )
    datamodule.tokenizer_name = tokenizer_of_base(base)
    return None


def _reads_hub(settings: Any) -> bool:
    files = json.dumps([settings.get("train_files"), settings.get("mixture")], default=str)
    tasks_of_hub = settings.get("tasks") and settings.get("data_dir") is None
    return "hf://" in files or bool(tasks_of_hub)


def _has_tokenizer(settings: Any) -> bool:
    tokenizer = settings.get("tokenizer")
    return tokenizer is None or Path(tokenizer).expanduser().exists()


def _count(module: LightningModule, made: Blueprint, batch: Any, precision: str) -> StepBytes:
    """What a step holds; of a deep network of equal blocks from two and from three of them."""
    blocks = made.network.get_submodule(family_of(made.network).blocks)
    assert isinstance(blocks, nn.ModuleList)
    whole = list(blocks)
    shapes = {tuple((n, p.shape) for n, p in block.named_parameters()) for block in whole}
    if len(whole) <= _MAX_COUNTED_BLOCKS or len(shapes) > 1:
        return _counted(module, made, batch, precision)
    found = []
    for num_blocks in (2, 3):
        del blocks[:]
        blocks.extend(whole[:num_blocks])
        found.append(_counted(module, made, batch, precision))
    blocks.extend(whole[3:])
    two, three = found
    return with_more_blocks(two, three, len(whole))


def _counted(module: LightningModule, made: Blueprint, batch: Any, precision: str) -> StepBytes:
    assert isinstance(module, LanguageModelingModule)
    device = made.network.device
    given = fake_batch(batch, made.mode, device)
    num_labels = int((batch["labels"] != IGNORED_LABEL).sum())
    on_labels_only = bool(module.hparams.get("supervised_logits_only"))

    def loss(hidden: Tensor) -> Tensor:
        labels = given["labels"]
        if on_labels_only:
            # Which positions have labels is in the numbers, which fake tensors have not.
            places = torch.zeros(num_labels, dtype=torch.int64, device=device)
            hidden = hidden.flatten(0, 1).index_select(0, places)[None]
            labels = torch.zeros(1, num_labels, dtype=torch.int64, device=device)
        sums = LanguageModelingModule.loss_sum_and_tokens(module, hidden, labels)
        return module.backward_start(sums.loss_sum)

    dtype = _COMPUTE.get(precision)
    context: Any = torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()
    return count_step(lambda: module.hidden_states(given), loss, made.mode, context)


def _offloaded(module: LightningModule, made: Blueprint, batch: Any, device: torch.device) -> int:
    """Bytes of the blocks' inputs that are kept on the host, of all activations."""
    if module.hparams.get("recompute") != "offload" or device.type == "cpu":
        return 0
    config = made.network.config
    width, num_blocks = int(config.hidden_size), int(config.num_hidden_layers)
    itemsize = next(iter(made.network.parameters())).itemsize
    return int(batch["input_ids"].numel()) * width * num_blocks * itemsize


def _no_calibration(cli: LightningCLI, data: _Data, memory: MemoryPlan, free: int) -> str | None:
    """Why no real step is made; None where one can be."""
    if cli.trainer.world_size > 1:
        return f"the run has {cli.trainer.world_size} processes"
    if data.num_batches is None:
        return "the data were not read"
    if memory.peak > _FREE_SHARE * free:
        return f"it would take {format_bytes(memory.peak)} of {format_bytes(free)}"
    base = getattr(cli.model, "base", None) or cli.model.hparams.get("init_from")
    if base is not None and not Path(base).expanduser().exists():
        return f"{base} is not on this machine"
    return None


def _calibrated(cli: LightningCLI) -> tuple[dict[str, int], float]:
    """A few real steps: bytes as `MemoryMonitor` measures them, and seconds per step."""
    notes = _Notes()
    trainer, module = cli.trainer, cli.model
    del module._modules["network"]  # the one without numbers
    trainer.limit_val_batches = 0
    trainer.callbacks = [MemoryMonitor(every_n_steps=1), notes]  # type: ignore[attr-defined]
    trainer.fit(module, datamodule=cli.datamodule)
    times_s = [after - before for before, after in itertools.pairwise(notes.ended_s)]
    batch_s = statistics.median(times_s[_WARMUP_STEPS - 1 :] or times_s)
    return notes.bytes, batch_s * int(cli.config["fit"].trainer.accumulate_grad_batches)


def _time_by_flops(
    made: Blueprint,
    teacher: TeacherCosts | None,
    module: LightningModule,
    batch: Any,
    trainer: Trainer,
) -> tuple[float, str]:
    """Seconds of a batch at the peak of the device, and a sentence that names the peak."""
    device, precision = trainer.strategy.root_device, str(trainer.precision)
    # Forward pass and gradients of the inputs; those of weights, and a second forward pass.
    passes = 2 + isinstance(module, LowRankPretraining)
    passes += module.hparams.get("recompute") in ("block", "offload")
    num_tokens = batch["input_ids"].numel()
    num_logits = num_tokens
    if module.hparams.get("supervised_logits_only"):
        num_logits = int((batch["labels"] != IGNORED_LABEL).sum())
    of_blocks = sum(cost.flops_per_token for cost in made.costs.blocks)
    flops = passes * (of_blocks * num_tokens + made.costs.back.flops_per_token * num_logits)
    if teacher is not None:
        flops += teacher.flops_per_token * num_tokens
    is_bf16 = "bf16" in precision or module.hparams.get("dtype") == "bfloat16"
    name = "bf16" if is_bf16 else "fp16" if precision.startswith("16") else "fp32"
    peak, source = None, "its data sheet"
    if device.type == "cuda":
        peak = peak_flops_per_s(torch.cuda.get_device_name(device), name)
    if peak is None:
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        peak, source = measured_peak_flops_per_s(device, dtypes[name]), "products timed just now"
    seconds = flops / (peak * trainer.world_size / _num_replicas(trainer))
    note = (
        f"no step was timed: the time is that of the operations at {peak / 1e12:.3g} TFLOP/s, the"
        f" peak of {device.type} in {name} by {source}; a run takes longer"
    )
    return float(seconds), note


def _stages(cli: LightningCLI, made: Blueprint) -> list[StagePlan]:
    """What each rank of the pipeline holds; nothing without a pipeline."""
    strategy = cli.trainer.strategy
    if not isinstance(strategy, PipelineStrategy):
        return []
    own = cli.config["fit"].trainer.strategy.get("init_args") or {}
    layout = strategy.layout
    rows = int(cli.datamodule.batch_size)
    if own.get("num_microbatches", "auto") == "auto":
        layout = largest_layout(layout.schedule, layout.num_ranks, layout.stages_per_rank, rows)
    width = next(iter(made.network.parameters())).itemsize
    tokens = max(1, rows // layout.num_microbatches) * int(cli.datamodule.block_length)
    num_shards = _num_replicas(cli.trainer) if own.get("data_parallel") == "shard" else 1
    workload = Workload(tokens, bytes_per_activation=width, num_shards=num_shards)
    balance = Balance(own.get("balance", "time"))
    return rank_plans(made.costs, layout, workload, balance, own.get("blocks_per_stage"))


def _num_replicas(trainer: Trainer) -> int:
    strategy = trainer.strategy
    if isinstance(strategy, PipelineStrategy):
        return trainer.world_size // strategy.layout.num_ranks
    return trainer.world_size


def _verdict(plan: Mapping[str, Any]) -> str:
    needed = plan["bytes"]["peak"] - plan["offloaded_bytes"]
    what = "the run"
    if plan["stages"]:
        needed = max(s["weights_and_state"] + s["activations"] for s in plan["stages"])
        what = "the fullest rank"
    free, device = plan["free_bytes"], plan["device"]
    sizes = f"{what} accounts for {format_bytes(needed)} of {format_bytes(free)} free on {device}"
    if needed > free:
        return f"does not fit: {sizes}"
    return f"fits: {sizes}; Python and its libraries come on top"


def _name(settings: Any) -> str:
    configs = settings.get("config") or []
    return Path(str(configs[0])).name if configs else "the defaults"
