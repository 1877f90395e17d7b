"""``fingpt label``: a file of texts in, the same file with labels out."""

import argparse
import math
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console

from fingpt_lightning.deploy.labelled_file import LabelledFile
from fingpt_lightning.deploy.labelled_shards import LabelledShard, merge_labelled
from fingpt_lightning.deploy.labelling import (
    CHUNK_ROWS,
    Columns,
    Labeller,
    checked_rows,
    count_labels,
    label_columns,
    row_chunks,
)
from fingpt_lightning.deploy.loading import ReadyModel, load_with_adapters
from fingpt_lightning.evaluation.results import EVALUATION_PACKAGES
from fingpt_lightning.files import files_sha256
from fingpt_lightning.models.device import AUTO_DTYPE, device_name
from fingpt_lightning.models.formats.peft_adapter import adapter_digest
from fingpt_lightning.models.formats.tokenizer import chat_template_in_use
from fingpt_lightning.models.sources import named_adapter_digest
from fingpt_lightning.profiling import keep_freed_memory
from fingpt_lightning.profiling.versions import installed_versions
from fingpt_lightning.shards.folders import device_remark
from fingpt_lightning.shards.options import Shard
from fingpt_lightning.tasks import Task, find_task
from fingpt_lightning.tasks.row_files import CsvForm, check_csv_settings, open_rows
from fingpt_lightning.terminal.progress import shown_progress


def run(options: argparse.Namespace) -> None:
    """Labels a file, or a shard of it, or merges shards.

    Rows and output are checked before the model is loaded.

    Args:
        options: Result of `parse_options`.

    Raises:
        ValueError: A row, the task, the model or the output is not valid.
        OSError: A path does not exist, or the output exists already.
    """
    keep_freed_memory()
    task = find_task(options.task)
    check_csv_settings(options.input, options.separator, options.encoding)
    form = CsvForm().overridden(options.separator, options.encoding)
    columns = Columns(options.text_column, options.adapter_column)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    output = LabelledFile(options.output, {})
    if options.shard is None:
        output.check_replaceable(options.overwrite)
    if options.merge is not None:
        _merge(options, task, console)
        return
    num_rows, names = checked_rows(
        task, options.input, columns, list(options.adapters or {}), options.output.suffix, form
    )
    names += label_columns(task)
    schema = _schema(options.input, task, form) if options.output.suffix == ".parquet" else None
    model = load_with_adapters(options)
    file = _output_file(options, task, model, schema, num_rows)
    if model.remark:
        console.print(model.remark)
    shard = options.shard or Shard(1, 1)
    num_own_rows = sum(min(CHUNK_ROWS, num_rows - at) for at in _first_rows(shard, num_rows))
    with file.begun(options.overwrite) as num_done:
        if isinstance(file, LabelledShard) and file.was_finished:
            console.print(f"{file.folder}: {num_own_rows:,} rows, whole already")
            return
        labeller = Labeller(
            model.network,
            model.tokenizer,
            task,
            columns,
            calibrate=not options.no_calibrate,
            batch_tokens=options.batch_tokens,
            bank=model.bank,
        )
        num_labelled = min(num_done * CHUNK_ROWS, num_own_rows)
        if num_done:
            console.print(f"going on after {num_labelled:,} of {num_own_rows:,} rows")
        with shown_progress(f"labeling {options.input}", num_own_rows, "rows") as show:
            first_chunk = num_done * shard.count + shard.number - 1
            for number, rows in row_chunks(options.input, first_chunk, form):
                if not shard.has(number):
                    continue
                file.add(number, labeller.label(rows, number * CHUNK_ROWS + 1), names)
                num_labelled += len(rows)
                show(num_labelled)
        file.finish()
    if options.shard is not None:
        console.print(f"{file.folder}: {num_own_rows:,} of {num_rows:,} rows")
        return
    _tell_counts(options.output, task, console)


def _first_rows(shard: Shard, num_rows: int) -> range:
    """The first rows of the chunks of a shard."""
    return range((shard.number - 1) * CHUNK_ROWS, num_rows, shard.count * CHUNK_ROWS)


def _output_file(
    options: argparse.Namespace, task: Task, model: ReadyModel, schema: Any, num_rows: int
) -> LabelledFile:
    if options.shard is None:
        settings = _place(options) | _given(options, task) | _found(options, model)
        return LabelledFile(options.output, settings, schema)
    settings = _given_of_shards(options, task) | _found(options, model)
    settings["versions"] = installed_versions(EVALUATION_PACKAGES)
    num_parts = math.ceil(num_rows / CHUNK_ROWS)
    facts = {"num_parts": num_parts, "device": device_name(model.network.device)}
    return LabelledShard(options.output, settings, schema, options.shard, facts)


def _merge(options: argparse.Namespace, task: Task, console: Console) -> None:
    given = _given_of_shards(options, task)
    if options.dtype != AUTO_DTYPE:
        given["dtype"] = options.dtype
    shards = merge_labelled(options.output, options.merge, options.shard_command, given)
    if (remark := device_remark(shards)) is not None:
        console.print(remark)
    console.print(f"{options.output}: merged from {len(shards)} shards")
    _tell_counts(options.output, task, console)


def _tell_counts(output: Path, task: Task, console: Console) -> None:
    counts: Counter[str | None] = Counter()
    for _, row in open_rows(output):
        counts += count_labels(task, [row])
    what = "answer" if task.is_generated else "label"
    found = ", ".join(f"{label} {counts[label]:,}" for label in task.labels)
    if task.is_generated:
        found = f"{counts['']:,} answers"
    console.print(f"{output}: {counts.total():,} rows: {found}")
    if counts[None]:
        console.print(
            f"{counts[None]:,} rows have no {what}: their text is empty, or the model's context too"
            " short for the prompt"
        )


def _place(options: argparse.Namespace) -> dict[str, object]:
    """What tells the input from another one on this machine."""
    state = options.input.stat()
    return {
        "input": str(options.input.resolve()),
        "input_bytes": state.st_size,
        "input_changed_ns": state.st_mtime_ns,
    }


def _given(options: argparse.Namespace, task: Task) -> dict[str, object]:
    """The settings that are known before a model is loaded."""
    named = options.adapters or {}
    adapters = {name: named_adapter_digest(path) for name, path in named.items()}
    return {
        "model": options.model,
        "adapters": adapters,
        "tokenizer": options.tokenizer,
        "quantize": options.quantize,
        "task": task.name,
        "task_version": task.version,
        "labels": list(task.labels),
        "instruction": task.instruction,
        "templates": [template.pattern for template in task.templates],
        "delimiters": list(task.delimiters),
        "stop": list(task.stop),
        "max_new_tokens": task.max_new_tokens,
        "substitute": {pattern.pattern: by for pattern, by in task.substitute.items()},
        "separator": options.separator,
        "encoding": options.encoding,
        "text_column": options.text_column,
        "adapter_column": options.adapter_column,
        "calibrate": not options.no_calibrate,
        "chunk_rows": CHUNK_ROWS,
    }


def _given_of_shards(options: argparse.Namespace, task: Task) -> dict[str, object]:
    """The same of shards, which may lie on several machines and are to have the same bytes."""
    return {
        "input_sha256": files_sha256((options.input,)),
        "batch_tokens": options.batch_tokens,
        "adapter": named_adapter_digest(options.adapter),
        "chat_template": options.chat_template,
        **_given(options, task),
    }


def _found(options: argparse.Namespace, ready: ReadyModel) -> dict[str, object]:
    """The settings that are found when the model is loaded."""
    adapter, template = ready.loaded.source.adapter, chat_template_in_use(ready.tokenizer)
    return {
        "revision": ready.loaded.revision,
        "adapter_sha256": None if adapter is None else adapter_digest(adapter),
        "dtype": ready.dtype,
        "chat_template_sha256": template and sha256(template.encode()).hexdigest(),
    }


def _schema(file: Path, task: Task, form: CsvForm) -> Any:
    """Schema of the output: the types of the input, or those that fit all its rows.

    Raises:
        ValueError: There are no such types.
    """
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    if file.suffix == ".parquet":
        schema = parquet.read_schema(file)
    else:
        schema = pyarrow.schema([])
        for _, rows in row_chunks(file, 0, form):
            names = dict.fromkeys(name for row in rows for name in row)
            whole = [{name: row.get(name) for name in names} for row in rows]
            try:
                part = pyarrow.Table.from_pylist(whole).schema
                schema = pyarrow.unify_schemas([schema, part], promote_options="permissive")
            except pyarrow.ArrowException as error:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f"{file}: its rows have no common types, which Parquet needs ({reason}); write"
                    " .jsonl"
                ) from None
    label, *probabilities = label_columns(task)  # or the answer, and its number
    schema = schema.append(pyarrow.field(label, pyarrow.string()))
    for name in probabilities:
        schema = schema.append(pyarrow.field(name, pyarrow.float64()))
    return schema
