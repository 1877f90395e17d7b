"""``fingpt evaluate`` and the function `evaluate`: a model, some tasks, a table and files."""

import argparse
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from fingpt_lightning.evaluation import runner
from fingpt_lightning.evaluation.batches import default_batch_tokens
from fingpt_lightning.evaluation.options import check_options
from fingpt_lightning.evaluation.results import (
    EVALUATION_PACKAGES,
    check_output,
    remarks,
    table,
    write_results,
)
from fingpt_lightning.evaluation.runner import Scoring, TaskResult, read_tasks, scorings_of
from fingpt_lightning.models.dequantization import CHOICES
from fingpt_lightning.models.device import AUTO_DTYPE, find_device
from fingpt_lightning.models.families import max_positions
from fingpt_lightning.models.formats.peft_adapter import adapter_digest
from fingpt_lightning.models.formats.tokenizer import chat_template_in_use, tokenizer_sha256
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.profiling.versions import installed_versions
from fingpt_lightning.tasks.chat import AUTO, choose_chat_template
from fingpt_lightning.tasks.encoding import TooLong
from fingpt_lightning.terminal.command_line import options_as_arguments
from fingpt_lightning.terminal.messages import check_choice
from fingpt_lightning.terminal.progress import shown_progress

_TABLE_WIDTH = 110


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
    with options_as_arguments():
        check_options(
            argparse.Namespace(
                overwrite=overwrite,
                output=output,
                num_fewshot=num_fewshot,
                fewshot_seed=fewshot_seed,
            )
        )
    started_at, started_s = datetime.now(UTC), time.perf_counter()
    if output is not None:
        check_output(Path(output), overwrite)
    check_choice("scoring", scoring, list(Scoring))
    check_choice("too_long", too_long, list(TooLong))
    check_choice("dequantize", dequantize, CHOICES)
    if batch_tokens is not None and batch_tokens < 1:
        raise ValueError(f"batch_tokens {batch_tokens} is below 1")
    how = Scoring(scoring)
    names = tasks.split(",") if isinstance(tasks, str) else tasks
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise ValueError("tasks: no name is given")
    seed = 1 if fewshot_seed is None else fewshot_seed
    runs = read_tasks(
        names,
        data_dir,
        split,
        strict=strict,
        limit=limit,
        scoring=how,
        calibrate=calibrate,
        separator=separator,
        encoding=encoding,
        num_fewshot=num_fewshot,
        fewshot_seed=seed,
    )
    found_device = find_device(device)
    loaded = load_model(
        model,
        dtype=dtype,
        device=found_device,
        quantize=quantize,
        dequantize=dequantize,
        adapter=adapter,
        tokenizer=tokenizer,
    )
    reader = loaded.require_tokenizer()
    remark = choose_chat_template(reader, chat_template, str(model), loaded.source.base.path)
    template = chat_template_in_use(reader)
    network = loaded.network
    batch_tokens = batch_tokens or default_batch_tokens(network.device.type)
    results = {}
    named = [(*one, run) for run in runs for one in scorings_of(run.task, how).items()]
    for name, own_scoring, run in named:
        what = f"evaluating {name}"
        with shown_progress(what, len(run.examples), "rows", in_log=False) as show:
            result = runner.evaluate(
                network,
                reader,
                run,
                scoring=own_scoring,
                calibrate=calibrate,
                batch_tokens=batch_tokens,
                too_long=TooLong(too_long),
                on_answered=show,
            )
        results[name] = result._replace(name=name)
    adapter_place = loaded.source.adapter
    head = {
        "model": loaded.description,
        "revision": loaded.revision,
        "adapter": None if adapter_place is None else str(adapter_place),
        "adapter_sha256": None if adapter_place is None else adapter_digest(adapter_place),
        "tokenizer_sha256": tokenizer_sha256(reader),
        "settings": {
            "dtype": str(network.config.dtype).removeprefix("torch."),
            "quantize": quantize,
            "dequantize": dequantize,
            "scoring": scoring,
            "calibrate": calibrate,
            "limit": limit,
            "too_long": too_long,
            "chat_template_sha256": template and sha256(template.encode()).hexdigest(),
            "num_fewshot": num_fewshot,
            "fewshot_seed": seed if num_fewshot else None,
            "batch_tokens": batch_tokens,
            "device": _device_name(network.device),
        },
        "started_at": started_at.isoformat(timespec="seconds"),
        "seconds": time.perf_counter() - started_s,
        "versions": installed_versions(EVALUATION_PACKAGES),
    }
    num_positions = max_positions(network.config)
    lines = (line for line in (remark, *loaded.remarks) if line is not None)
    evaluation = Evaluation(loaded.description, results, head, num_positions, tuple(lines))
    if output is not None:
        evaluation.write(Path(output))
    return evaluation


def run(options: argparse.Namespace) -> None:
    """Evaluates a model as the options request, prints a table, and then writes the files.

    Args:
        options: Result of `parse_options`.

    Raises:
        ValueError: A model, a task, a row or the output folder is not valid.
        FileNotFoundError: A path does not exist.
    """
    output = options.output
    if output is not None:
        check_output(output, options.overwrite)
    # The table is printed before files are written: a full disk does not cost the figures.
    evaluation = evaluate(**vars(options) | {"output": None, "overwrite": False})
    results = list(evaluation.results.values())
    # Rich takes 80 columns for a file, which would cut the figures.
    console = Console(width=max(Console().width, _TABLE_WIDTH), soft_wrap=True)
    console.print(evaluation.model, highlight=False, markup=False)
    for line in evaluation.model_remarks:
        console.print(line, highlight=False, markup=False)
    console.print(table(results), soft_wrap=False)
    for remark in remarks(results, evaluation.num_positions):
        console.print(remark)
    if output is not None:
        evaluation.write(output)
        console.print(f"{output}: results.json, predictions.jsonl", highlight=False)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
