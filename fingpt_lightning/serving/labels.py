"""The route that labels texts: ``/v1/label``."""

import asyncio
from collections.abc import Mapping

from fastapi import FastAPI, Request

from fingpt_lightning.deploy.labelling import Columns, Labeller, example_of_row, label_columns
from fingpt_lightning.serving.engine import Event, LabelJob, Labelled
from fingpt_lightning.serving.errors import ApiError, failure
from fingpt_lightning.serving.protocol import LabelRequest
from fingpt_lightning.serving.served import Served
from fingpt_lightning.serving.waiting import posting, submit, unless_gone
from fingpt_lightning.tasks import Task
from fingpt_lightning.tasks.examples import field_names
from fingpt_lightning.terminal.messages import listed, nearest

_ADAPTER_COLUMN = "__adapter__"


def add_labels(app: FastAPI, served: Served) -> None:
    """Adds ``/v1/label``.

    Args:
        app: Application.
        served: What it answers with.
    """

    @app.post("/v1/label")
    async def label(body: LabelRequest, request: Request) -> dict[str, object]:
        adapter = served.adapter(body.model)
        if body.task not in served.tasks:
            hint = nearest(body.task, served.tasks) or f"; there are {listed(served.tasks)}"
            raise ApiError(404, f"no task {body.task!r}{hint}", "task", "task_not_found")
        task = served.tasks[body.task]
        rows = _label_rows(body, task)
        columns = Columns("text", _ADAPTER_COLUMN)
        for number, row in enumerate(rows, start=1):
            row[_ADAPTER_COLUMN] = adapter
            try:
                example_of_row(task, row, number, columns)
            except ValueError as error:
                raise ApiError(400, f"row {number}: {error}", "rows") from None
        events: asyncio.Queue[Event] = asyncio.Queue()
        labeller = served.labellers.setdefault(
            task.name,
            Labeller(served.network, served.engine.tokenizer, task, columns, bank=served.bank),
        )
        job = LabelJob(labeller, rows, posting(asyncio.get_running_loop(), events))
        submit(served.engine, job)
        try:
            event = await unless_gone(request, events.get())
        finally:
            served.engine.cancel(job)
        if not isinstance(event, Labelled):
            raise failure(event)
        return {
            "object": "list",
            "model": body.model,
            "task": task.name,
            "data": [_label(task, index, row) for index, row in enumerate(event.rows)],
        }


def _label_rows(body: LabelRequest, task: Task) -> list[dict[str, object]]:
    if bool(body.texts) == bool(body.rows):
        raise ApiError(400, "give either texts or rows, one at least", "texts")
    if body.texts and field_names(task) != ("text",):
        text = f"task {task.name} has the fields {', '.join(field_names(task))}: give rows"
        raise ApiError(400, text, "texts")
    return [{"text": text} for text in body.texts] or [dict(row) for row in body.rows]


def _label(task: Task, index: int, row: Mapping[str, object]) -> dict[str, object]:
    label, *columns = label_columns(task)
    values = zip(task.labels, columns, strict=True)
    probabilities = {name: row[column] for name, column in values}
    return {
        "index": index,
        "label": row[label],
        "probabilities": None if row[label] is None else probabilities,
    }
