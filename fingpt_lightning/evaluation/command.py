"""``fingpt evaluate`` and the function `evaluate`: a model, some tasks, a table and files."""

import argparse
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fingpt_lightning.evaluation import runner
from fingpt_lightning.evaluation.batches import default_batch_tokens
from fingpt_lightning.evaluation.options import check_options
from fingpt_lightning.evaluation.results import (
    EVALUATION_PACKAGES,
    remarks,
    table,
    write_results,
)
from fingpt_lightning.evaluation.run_evaluations import check_output
from fingpt_lightning.evaluation.runner import Scoring, TaskResult, read_tasks, scorings_of
from fingpt_lightning.evaluation.scoring import Prediction
from fingpt_lightning.evaluation.sharded import (
    NamedRun,
    answer_shard,
    identities,
    merged_head,
    merged_results,
    settings_of_head,
)
from fingpt_lightning.models.dequantization import CHOICES
from fingpt_lightning.models.device import AUTO_DTYPE, device_name, find_device
from fingpt_lightning.models.families import max_positions
from fingpt_lightning.models.formats.peft_adapter import adapter_digest
from fingpt_lightning.models.formats.tokenizer import chat_template_in_use, tokenizer_sha256
from fingpt_lightning.models.loading import LoadedModel, load_model
from fingpt_lightning.models.sources import named_adapter_digest
from fingpt_lightning.profiling import keep_freed_memory
from fingpt_lightning.profiling.versions import installed_versions
from fingpt_lightning.shards.folders import (
    FinishedShard,
    begun_shard,
    device_remark,
    finish_shard,
    merged_shards,
    shard_folder,
)
from fingpt_lightning.tasks.chat import AUTO, choose_chat_template
from fingpt_lightning.tasks.encoding import TooLong
from fingpt_lightning.terminal.command_line import options_as_arguments
from fingpt_lightning.terminal.messages import check_choice
from fingpt_lightning.terminal.progress import shown_progress

_TABLE_WIDTH = 110
_OF_SHARDS = ("shard", "merge", "shard_command")


class Evaluation(NamedTuple):
    """The answers of a model to some tasks.

    Attributes:
        model: Path or name of the model, with its kind.
        results: Answers and metrics by name of the task; with scoring ``both``, also those of
            ``TASK_generated``.
        head: Model, settings, time and versions, as ``results.json`` has them.
        num_positions: Largest number of tokens that the model reads.
        model_remarks: Lines about the chat template, the dtype and dequantized weights, where there
            is something to tell.
    """

    model: str
    results: dict[str, TaskResult]
    head: dict[str, Any]
    num_positions: int
    model_remarks: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Writes ``results.json``, ``predictions.jsonl`` and pictures; the folder is made."""
        write_results(folder, self.head, list(self.results.values()))


def evaluate(
    model: str | Path,
    tasks: str | Sequence[str],
    *,
    adapter: str | Path | None = None,
    tokenizer: str | Path | None = None,
    dtype: str = AUTO_DTYPE,
    quantize: str = "auto",
    dequantize: str = "auto",
    device: str | None = None,
    data_dir: str | Path | None = None,
    split: str = "validation",
    separator: str | None = None,
    encoding: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    scoring: str = "choices",
    calibrate: bool = False,
    strict: bool = False,
    too_long: str = "cut",
    chat_template: str = AUTO,
    num_fewshot: int = 0,
    fewshot_seed: int | None = None,
    batch_tokens: int | None = None,
    limit: int | None = None,
) -> Evaluation:
    """Evaluates a model on tasks, as ``fingpt evaluate`` does.

    Data and output are checked before the model is loaded.
    ``evaluate(model, "fpb").results["fpb"].metrics["accuracy"]`` is one of the figures.

    Args:
        model: Hugging Face folder or hub name, GGUF, adapter, checkpoint or run folder.
        tasks: Names or YAML files; one string may hold several, with commas.
        adapter: LoRA adapter for the model: folder, or a finetuning's run folder or checkpoint.
        tokenizer: Folder of the tokenizer, where the model has none beside it.
        dtype: Type of weights and products: float32, bfloat16, float16 or float64; ``auto`` is
            bfloat16 on a GPU that computes in it and on a CPU that was measured at least 1.2 times
            as fast in it, else float32.
        quantize: ``nf4`` or ``int8`` for the linear layers of the blocks, ``none``, or ``auto``
            for what the adapter was trained on.
        dequantize: Whether quantized weights are kept dequantized, for speed, with equal answers:
            ``always``, ``never``, or ``auto``: on a CPU where half of the free memory is enough.
        device: ``cpu``, ``cuda`` or ``cuda:1``; None is CUDA where there is one.
        data_dir: Folder that holds ``TASK/SPLIT.jsonl``; None reads from the Hugging Face hub.
        split: Part of each task's rows.
        separator: Separator of CSV files; None takes the task's or detects it.
        encoding: Encoding of CSV files; None takes that of the byte order mark, else UTF-8.
        output: Folder for the results; None writes none.
        overwrite: Whether results in that folder are replaced.
        scoring: ``choices`` takes the most likely of the possible answers, ``generate`` reads the
            label in a written one, ``both`` gives tasks of labels a result each. Numbers, spans,
            summaries and scores are written in any case.
        calibrate: Whether the bias for labels without content is taken out.
        strict: Whether an empty text is an error; else its row is left out.
        too_long: ``cut`` takes tokens of their text from rows of more tokens than the model reads,
            ``drop`` leaves them out, ``error`` ends with one line.
        chat_template: ``auto`` for the chat template that the model was trained with, else the
            tokenizer's own of an instruct model; ``none``; or a file with a template in Jinja.
        num_fewshot: Number of examples of the split ``train`` before each question.
        fewshot_seed: Seed of their draw; None is 1.
        batch_tokens: Tokens of a batch, padding included; None fits the device.
        limit: Number of rows of each task; None takes all.

    Raises:
        ValueError: A model, task, row, setting or the output folder is not valid.
        FileNotFoundError: A path does not exist.
    """
    given = argparse.Namespace(**locals())
    with options_as_arguments():
        check_options(given)
    started_at, started_s = datetime.now(UTC), time.perf_counter()
    if output is not None:
        check_output(Path(output), overwrite)
    named = _read(given)
    ready = _load(given)
    results = {}
    for name, own_scoring, task_run in named:
        what = f"evaluating {name}"
        with shown_progress(what, len(task_run.examples), "rows", in_log=False) as show:
            result = runner.evaluate(
                ready.network,
                ready.tokenizer,
                task_run,
                scoring=own_scoring,
                calibrate=calibrate,
                batch_tokens=ready.batch_tokens,
                too_long=TooLong(too_long),
                on_answered=show,
            )
        results[name] = result._replace(name=name)
    head = _head(given, ready, started_at, started_s)
    evaluation = Evaluation(head["model"], results, head, ready.num_positions, ready.remarks)
    if output is not None:
        evaluation.write(Path(output))
    return evaluation


class _Ready(NamedTuple):
    loaded: LoadedModel
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    dtype: str
    batch_tokens: int
    num_positions: int
    remarks: tuple[str, ...]


def _read(options: argparse.Namespace) -> list[NamedRun]:
    """The rows of all results, checked, from the arguments of `evaluate`."""
    check_choice("scoring", options.scoring, list(Scoring))
    check_choice("too_long", options.too_long, list(TooLong))
    check_choice("dequantize", options.dequantize, CHOICES)
    if options.num_fewshot < 0:
        raise ValueError(f"num_fewshot {options.num_fewshot} is below 0")
    if options.batch_tokens is not None and options.batch_tokens < 1:
        raise ValueError(f"batch_tokens {options.batch_tokens} is below 1")
    how = Scoring(options.scoring)
    names = options.tasks.split(",") if isinstance(options.tasks, str) else options.tasks
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise ValueError("tasks: no name is given")
    runs = read_tasks(
        names,
        options.data_dir,
        options.split,
        strict=options.strict,
        limit=options.limit,
        scoring=how,
        calibrate=options.calibrate,
        separator=options.separator,
        encoding=options.encoding,
        num_fewshot=options.num_fewshot,
        fewshot_seed=_seed(options),
    )
    return [NamedRun(*one, run) for run in runs for one in scorings_of(run.task, how).items()]


def _seed(options: argparse.Namespace) -> int:
    return 1 if options.fewshot_seed is None else options.fewshot_seed


def _load(options: argparse.Namespace) -> _Ready:
    """The model, from the arguments of `evaluate`."""
    device = find_device(options.device)
    loaded = load_model(
        options.model,
        dtype=options.dtype,
        device=device,
        quantize=options.quantize,
        dequantize=options.dequantize,
        adapter=options.adapter,
        tokenizer=options.tokenizer,
    )
    tokenizer, network = loaded.require_tokenizer(), loaded.network
    remark = choose_chat_template(
        tokenizer, options.chat_template, str(options.model), loaded.source.base.path
    )
    lines = (line for line in (remark, *loaded.remarks) if line is not None)
    dtype = str(network.config.dtype).removeprefix("torch.")
    batch_tokens = options.batch_tokens or default_batch_tokens(network.device.type)
    num_positions = max_positions(network.config)
    return _Ready(loaded, network, tokenizer, dtype, batch_tokens, num_positions, tuple(lines))


def _head(
    options: argparse.Namespace, ready: _Ready, started_at: datetime, started_s: float
) -> dict[str, Any]:
    """What ``results.json`` holds beside the tasks."""
    template, place = chat_template_in_use(ready.tokenizer), ready.loaded.source.adapter
    return {
        "model": ready.loaded.description,
        "revision": ready.loaded.revision,
        "adapter": None if place is None else str(place),
        "adapter_sha256": None if place is None else adapter_digest(place),
        "tokenizer_sha256": tokenizer_sha256(ready.tokenizer),
        "settings": {
            "dtype": ready.dtype,
            "quantize": options.quantize,
            "dequantize": options.dequantize,
            "scoring": options.scoring,
            "calibrate": options.calibrate,
            "limit": options.limit,
            "too_long": options.too_long,
            "chat_template_sha256": template and sha256(template.encode()).hexdigest(),
            "num_fewshot": options.num_fewshot,
            "fewshot_seed": _seed(options) if options.num_fewshot else None,
            "batch_tokens": ready.batch_tokens,
            "device": device_name(ready.network.device),
        },
        "started_at": started_at.isoformat(timespec="seconds"),
        "seconds": time.perf_counter() - started_s,
        "versions": installed_versions(EVALUATION_PACKAGES),
    }


def run(options: argparse.Namespace) -> None:
    """Evaluates a model as the options request, prints a table, and then writes the files.

    With ``--shard`` only that share of the batches is run, into a folder beside the output.

    Args:
        options: Result of `parse_options`.

    Raises:
        ValueError: A model, a task, a row or the output folder is not valid.
        FileNotFoundError: A path does not exist.
    """
    keep_freed_memory()
    given = {key: value for key, value in vars(options).items() if key not in _OF_SHARDS}
    # Rich takes 80 columns for a file, which would cut the figures.
    console = Console(width=max(Console().width, _TABLE_WIDTH), soft_wrap=True)
    if options.shard is not None:
        _run_shard(options, console)
        return
    output = options.output
    if output is not None:
        check_output(output, options.overwrite)
    # The table is printed before files are written: a full disk does not cost the figures.
    if options.merge is None:
        evaluation = evaluate(**given | {"output": None, "overwrite": False})
        _show(evaluation, console)
        if output is not None:
            evaluation.write(output)
    else:
        named = _read(options)
        of_shards = _given(options, named) | _given_where_set(options)
        command = options.shard_command
        with merged_shards(output, options.merge, command, of_shards) as shards:
            if (remark := device_remark(shards)) is not None:
                console.print(remark, highlight=False, markup=False)
            evaluation = _merged(shards, named)
            _show(evaluation, console)
            evaluation.write(output)
    if output is not None:
        console.print(f"{output}: results.json, predictions.jsonl", highlight=False)


def _show(evaluation: Evaluation, console: Console) -> None:
    results = list(evaluation.results.values())
    console.print(evaluation.model, highlight=False, markup=False)
    for line in evaluation.model_remarks:
        console.print(line, highlight=False, markup=False)
    console.print(table(results), soft_wrap=False)
    for remark in remarks(results, evaluation.num_positions):
        console.print(remark)


def _run_shard(options: argparse.Namespace, console: Console) -> None:
    started_at, started_s = datetime.now(UTC), time.perf_counter()
    named = _read(options)
    ready = _load(options)
    folder = shard_folder(options.output, options.shard)
    head = _head(options, ready, started_at, started_s)
    settings = settings_of_head(head) | _given(options, named)

    def answer(one: NamedRun, on_answered: Callable[[int], None]) -> list[Prediction]:
        return runner.answers(
            ready.network,
            ready.tokenizer,
            one.run,
            scoring=one.scoring,
            calibrate=options.calibrate,
            batch_tokens=ready.batch_tokens,
            too_long=TooLong(options.too_long),
            on_answered=on_answered,
            shard=options.shard,
        )

    with begun_shard(folder, settings, options.overwrite) as was_finished:
        num_rows = answer_shard(folder, options.shard, named, answer)
        if not was_finished:
            head = _head(options, ready, started_at, started_s)
            facts = {"head": head, "device": head["settings"]["device"]}
            facts |= {"num_positions": ready.num_positions, "remarks": ready.remarks}
            finish_shard(folder, facts)
    what = ", whole already" if was_finished else ""
    console.print(f"{folder}: {num_rows:,} rows answered{what}", highlight=False, markup=False)


def _given(options: argparse.Namespace, named: Sequence[NamedRun]) -> dict[str, Any]:
    """The settings of shards that are known before a model is loaded."""
    keys = ("tokenizer", "chat_template", "quantize", "calibrate", "limit", "too_long")
    return {
        "path": options.model,
        "adapter": named_adapter_digest(options.adapter),
        **{key: getattr(options, key) for key in keys},
        "fewshot_seed": _seed(options) if options.num_fewshot else None,
        **identities(named),
    }


def _given_where_set(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that are known before a model is loaded unless they are left to the device."""
    given = {} if options.dtype == AUTO_DTYPE else {"dtype": options.dtype}
    return given | ({} if options.batch_tokens is None else {"batch_tokens": options.batch_tokens})


def _merged(shards: Sequence[FinishedShard], named: Sequence[NamedRun]) -> Evaluation:
    head, facts = merged_head(shards), shards[0].facts
    results = {result.name: result for result in merged_results(shards, named)}
    remarks = tuple(facts["remarks"])
    return Evaluation(head["model"], results, head, facts["num_positions"], remarks)
