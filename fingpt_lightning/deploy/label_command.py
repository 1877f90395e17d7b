"""``fingpt label``: a file of texts in, the same file with labels out."""

import argparse
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console

from fingpt_lightning.deploy.labelled_file import LabelledFile
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
from fingpt_lightning.models.formats.peft_adapter import adapter_digest
from fingpt_lightning.models.formats.tokenizer import chat_template_in_use
from fingpt_lightning.models.sources import find_adapter
from fingpt_lightning.tasks import Task, find_task
from fingpt_lightning.tasks.row_files import CsvForm, check_csv_settings, open_rows
from fingpt_lightning.terminal.progress import shown_progress


def run(options: argparse.Namespace) -> None:
    """Labels a file; its rows and the output are checked before the model is loaded.

    Args:
        options: Result of `parse_options`.

    Raises:
        ValueError: A row, the task, the model or the output is not valid.
        OSError: A path does not exist, or the output exists already.
    """
    task = find_task(options.task)
    check_csv_settings(options.input, options.separator, options.encoding)
    form = CsvForm().overridden(options.separator, options.encoding)
    columns = Columns(options.text_column, options.adapter_column)
    adapters = options.adapters or {}
    LabelledFile(options.output, {}).check_replaceable(options.overwrite)
    num_rows, names = checked_rows(
        task, options.input, columns, list(adapters), options.output.suffix, form
    )
    names += label_columns(task)
    schema = _schema(options.input, task, form) if options.output.suffix == ".parquet" else None
    model = load_with_adapters(options)
    file = LabelledFile(options.output, _settings(options, task, model), schema)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if model.remark:
        console.print(model.remark)
    with file.begun(options.overwrite) as num_done:
        labeller = Labeller(
            model.network,
            model.tokenizer,
            task,
            columns,
            calibrate=not options.no_calibrate,
            batch_tokens=options.batch_tokens,
            bank=model.bank,
        )
        if num_done:
            done = min(num_done * CHUNK_ROWS, num_rows)
            console.print(f"going on after {done:,} of {num_rows:,} rows")
        with shown_progress(f"labelling {options.input}", num_rows, "rows") as show:
            for number, rows in row_chunks(options.input, num_done, form):
                first = number * CHUNK_ROWS
                file.add(number, labeller.label(rows, first + 1), names)
                show(first + len(rows))
        file.finish()
    counts: Counter[str | None] = Counter()
    for _, row in open_rows(options.output):
        counts += count_labels(task, [row])
    what = "answer" if task.is_generated else "label"
    found = ", ".join(f"{label} {counts[label]:,}" for label in task.labels)
    if task.is_generated:
        found = f"{counts['']:,} answers"
    console.print(f"{options.output}: {num_rows:,} rows: {found}")
    if counts[None]:
        console.print(
            f"{counts[None]:,} rows have no {what}: their text is empty, or the model's context too"
            " short for the prompt"
        )


def _settings(options: argparse.Namespace, task: Task, ready: ReadyModel) -> dict[str, object]:
    model, template = ready.loaded, chat_template_in_use(ready.tokenizer)
    state, adapter = options.input.stat(), model.source.adapter
    named = options.adapters or {}
    adapters = {name: adapter_digest(find_adapter(path)) for name, path in named.items()}
    return {
        "input": str(options.input.resolve()),
        "input_bytes": state.st_size,
        "input_changed_ns": state.st_mtime_ns,
        "model": options.model,
        "revision": model.revision,
        "adapter": None if adapter is None else adapter_digest(adapter),
        "adapters": adapters,
        "tokenizer": options.tokenizer,
        "dtype": ready.dtype,
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
        "chat_template": template and sha256(template.encode()).hexdigest(),
        "separator": options.separator,
        "encoding": options.encoding,
        "text_column": options.text_column,
        "adapter_column": options.adapter_column,
        "calibrate": not options.no_calibrate,
        "chunk_rows": CHUNK_ROWS,
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
