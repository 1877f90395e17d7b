"""The routes of the server.

Source: https://platform.openai.com/docs/api-reference, for the routes under ``/v1`` but
``/v1/label``.
"""

import asyncio
import copy
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fingpt_lightning.deploy.adapter_bank import AdapterBank
from fingpt_lightning.deploy.labelling import Columns, Labeller, example_of_row, label_columns
from fingpt_lightning.deploy.sampling import Sampling
from fingpt_lightning.models.families import max_positions
from fingpt_lightning.serving.engine import (
    Completing,
    Engine,
    Event,
    Finished,
    LabelJob,
    Labelled,
    OverloadedError,
    Piece,
    TokenScore,
)
from fingpt_lightning.serving.limits import BodyLimit, KeyCheck
from fingpt_lightning.serving.metrics import metrics_text
from fingpt_lightning.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    LabelRequest,
    Message,
)
from fingpt_lightning.tasks import Task
from fingpt_lightning.tasks.chat import template_of
from fingpt_lightning.tasks.encoding import encode_turns
from fingpt_lightning.tasks.examples import Turn, field_names
from fingpt_lightning.terminal.messages import nearest

_PAGE = Path(__file__).with_name("page.html")
_ADAPTER_COLUMN = "__adapter__"
_RETRY_AFTER_S = 2


@dataclass
class Served:
    """What a server answers with.

    Args:
        name: Name of the model itself.
        network: Network in evaluation mode.
        tokenizer: Tokenizer of the network.
        engine: Engine that runs them, started.
        bank: Bank of the network's adapters.
        tasks: Tasks of ``/v1/label``, by name.
        api_key: Key that requests have to name; None is none.
        max_body_bytes: Largest body of a request.
        timeout_s: Seconds in which a body has to arrive.
    """

    name: str
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    engine: Engine
    bank: AdapterBank | None = None
    tasks: Mapping[str, Task] = field(default_factory=dict)
    api_key: str | None = None
    max_body_bytes: int = 2**20
    timeout_s: float = 300.0
    started_at: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.num_positions = max_positions(self.network.config)
        # The engine's thread has the other one: a tokenizer is not for several at once.
        self.tokenizer = copy.deepcopy(self.tokenizer)
        self.template = template_of(self.tokenizer)
        self.labellers: dict[str, Labeller] = {}

    @property
    def models(self) -> list[str]:
        """The names that requests may ask for."""
        return [self.name, *([] if self.bank is None else self.bank.names)]

    def adapter(self, model: str) -> str | None:
        """The adapter of a model's name; None is the base.

        Raises:
            ApiError: There is no such model.
        """
        if model not in self.models:
            hint = nearest(model, self.models)
            text = f"model {model!r} is none of {', '.join(self.models)}{hint}"
            raise ApiError(404, text, "model", "model_not_found")
        return None if model == self.name else model


class ApiError(Exception):
    """An answer that says what is wrong with a request, in OpenAI's form."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, object]:
        """The JSON of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {"Retry-After": str(_RETRY_AFTER_S)} if self.status == 503 else {}
        return JSONResponse(self.body(), self.status, headers)


def build_app(served: Served, *, loopback: str | None = "127.0.0.1") -> FastAPI:
    """The application that answers requests.

    Args:
        served: Model, adapters and engine.
        loopback: Address of this machine at which it listens: no other names are accepted as the
            host, so that pages of other sites cannot reach the server through a name of theirs.
            None for an address that others reach.
    """
    app = FastAPI(title="fingpt serve", openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=served.max_body_bytes, timeout_s=served.timeout_s)
    if served.api_key:
        app.add_middleware(KeyCheck, key=served.api_key, path="/v1/")
    if loopback is not None:
        own = f"[{loopback}]" if ":" in loopback else loopback
        hosts = ["localhost", "127.0.0.1", "[::1]", own]
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        text = f"{request.method} {request.url.path}: {str(error.detail).lower()}"
        return ApiError(error.status_code, text).response()

    @app.exception_handler(RequestValidationError)
    async def wrong_body(_: Request, error: RequestValidationError) -> JSONResponse:
        return _of_validation(error).response()

    _add_pages(app, served)
    _add_completions(app, served)
    _add_labels(app, served)
    return app


def _add_pages(app: FastAPI, served: Served) -> None:
    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return _PAGE.read_text(encoding="utf-8")

    @app.get("/health")
    async def health() -> JSONResponse:
        state = "ok"
        if served.engine.is_draining:
            state = "stopping"
        elif not served.engine.is_alive:
            state = "failed"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        return metrics_text(served.engine)

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [_model(served, name) for name in served.models]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, object]:
        served.adapter(name)
        return _model(served, name)

    @app.get("/v1/tasks")
    async def tasks() -> dict[str, object]:
        return {
            "data": [
                {"name": task.name, "labels": list(task.labels), "fields": _fields(task)}
                for task in served.tasks.values()
            ]
        }


def _model(served: Served, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": served.started_at,
        "owned_by": "fingpt",
        "parent": None if name == served.name else served.name,
        "max_model_len": served.num_positions,
        "has_chat_template": served.template is not None,
    }


def _add_completions(app: FastAPI, served: Served) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Any:
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if not prompts or len(prompts) * body.n > 256:
            text = f"prompt: {len(prompts)} prompts, allowed are 1 to {256 // body.n}"
            raise ApiError(400, text, "prompt")
        tokens = [list(served.tokenizer.encode(prompt, verbose=False)) for prompt in prompts]
        answer = _Answer(served, body.model, "cmpl", "text_completion", _text_choice)
        jobs = _jobs(served, body, tokens, body.max_tokens, body.logprobs)
        return await _answered(answer, jobs, body, request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Any:
        tokens = _chat_tokens(served, body.messages)
        max_tokens = body.max_completion_tokens or body.max_tokens
        if max_tokens is None:
            max_tokens = max(1, served.num_positions - len(tokens))
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs has no effect without logprobs", "top_logprobs")
        num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        answer = _Answer(served, body.model, "chatcmpl", "chat.completion", _chat_choice)
        jobs = _jobs(served, body, [tokens], max_tokens, num_logprobs)
        return await _answered(answer, jobs, body, request)


def _chat_tokens(served: Served, messages: Sequence[Message]) -> list[int]:
    if served.template is None:
        text = "no chat template is in use: ask /v1/completions, or start with --chat_template"
        raise ApiError(400, text, "messages")
    try:
        turns = [Turn(message.role, message.content) for message in messages]
        return encode_turns(served.tokenizer, served.template, turns)
    except ValueError as error:
        raise ApiError(400, f"messages: {error}", "messages") from None


def _jobs(
    served: Served,
    body: CompletionRequest | ChatRequest,
    prompts: Sequence[list[int]],
    max_tokens: int,
    num_logprobs: int | None,
) -> list["_Requested"]:
    """The completions that a request asks for: ``n`` of each prompt."""
    adapter = served.adapter(body.model)
    for tokens in prompts:
        if not tokens:
            raise ApiError(400, "the prompt is empty, and the tokenizer begins no text", "prompt")
        if len(tokens) + max_tokens > served.num_positions:
            text = (
                f"the prompt has {len(tokens)} tokens; with max_tokens {max_tokens} that is beyond"
                f" the model's {served.num_positions} positions"
            )
            raise ApiError(400, text, "max_tokens", "context_length_exceeded")
    sampling = None
    if body.temperature > 0:
        seed = random.SystemRandom().getrandbits(31) if body.seed is None else body.seed
        top_p = None if body.top_p == 1 else body.top_p
        sampling = Sampling(body.temperature, body.top_k, top_p, seed)
    loop = asyncio.get_running_loop()
    found = []
    for tokens in prompts:
        for stream in range(body.n):
            events: asyncio.Queue[Event] = asyncio.Queue()
            job = Completing(
                tokens,
                max_tokens,
                _posting(loop, events),
                sampling,
                body.stop,
                adapter,
                num_logprobs,
                stream,
                is_streamed=body.stream,
            )
            found.append(_Requested(job, events))
    return found


def _posting(
    loop: asyncio.AbstractEventLoop, events: "asyncio.Queue[Event]"
) -> Callable[[Event], None]:
    def post(event: Event) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    return post


@dataclass
class _Requested:
    """A completion that was requested, and the queue of its events."""

    job: Completing
    events: "asyncio.Queue[Event]"


_Choice = Callable[["_Answer", int, str, Sequence[TokenScore], str | None, bool], dict[str, object]]


@dataclass
class _Answer:
    """The form of an answer.

    Args:
        served: Server that answers.
        model: Name of the model that was requested.
        prefix: Beginning of its identifier.
        kind: Value of ``object``; chunks of a chat have another.
        choice: Function that makes a choice of the answer, whole or in part.
    """

    served: Served
    model: str
    prefix: str
    kind: str
    choice: _Choice
    lengths: dict[int, int] = field(default_factory=dict, init=False)
    """Characters of the tokens that went out so far, by choice."""

    def __post_init__(self) -> None:
        self.head: dict[str, object] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.kind,
            "created": int(time.time()),
            "model": self.model,
        }

    def whole(self, choices: list[dict[str, object]], usage: dict[str, int]) -> dict[str, object]:
        """The answer in one piece."""
        return {**self.head, "choices": choices, "usage": usage}

    def chunk(
        self, choices: list[dict[str, object]], usage: dict[str, int] | None = None
    ) -> dict[str, object]:
        """One chunk of a stream."""
        kind = "chat.completion.chunk" if self.kind == "chat.completion" else self.kind
        more = {} if usage is None else {"usage": usage}
        return {**self.head, "object": kind, "choices": choices, **more}


def _text_choice(
    answer: _Answer,
    index: int,
    text: str,
    scores: Sequence[TokenScore],
    reason: str | None,
    is_chunk: bool,
) -> dict[str, object]:
    logprobs = None
    if scores:
        names = [_token_text(answer.served, score.token) for score in scores]
        # A chunk of a stream goes on where the one before it ended.
        *offsets, end = accumulate(map(len, names), initial=answer.lengths.get(index, 0))
        answer.lengths[index] = end
        logprobs = {
            "tokens": names,
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [
                {_token_text(answer.served, token): value for token, value in score.top}
                for score in scores
            ],
            "text_offset": offsets,
        }
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _chat_choice(
    answer: _Answer,
    index: int,
    text: str,
    scores: Sequence[TokenScore],
    reason: str | None,
    is_chunk: bool,
) -> dict[str, object]:
    logprobs = None
    if scores:
        content = [
            {
                **_token(answer.served, score.token, score.logprob),
                "top_logprobs": [_token(answer.served, *pair) for pair in score.top],
            }
            for score in scores
        ]
        logprobs = {"content": content, "refusal": None}
    message = {"role": "assistant", "content": text}
    if is_chunk and reason is not None and not text:
        message = {}
    key = "delta" if is_chunk else "message"
    return {"index": index, key: message, "logprobs": logprobs, "finish_reason": reason}


def _token(served: Served, token: int, logprob: float) -> dict[str, object]:
    text = _token_text(served, token)
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _token_text(served: Served, token: int) -> str:
    return str(served.tokenizer.decode([token]))


async def _answered(
    answer: _Answer,
    requested: Sequence[_Requested],
    body: CompletionRequest | ChatRequest,
    request: Request,
) -> Any:
    engine = answer.served.engine
    _submit(engine, *(one.job for one in requested))
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        events = _stream(answer, requested, usage, body.n)
        return StreamingResponse(events, media_type="text/event-stream")
    try:
        gathered = await _unless_gone(request, _gathered(requested))
    finally:
        for one in requested:
            engine.cancel(one.job)
    choices = [
        answer.choice(answer, index, end.text, scores, end.reason, False)
        for index, (scores, end) in enumerate(gathered)
    ]
    return answer.whole(choices, _usage(requested, [end for _, end in gathered], body.n))


def _submit(engine: Engine, *jobs: Completing | LabelJob) -> None:
    """Hands the parts of a request to the engine.

    Raises:
        ApiError: Too many requests wait, or the parts of this one can never wait together.
    """
    try:
        engine.submit(*jobs)
    except OverloadedError as error:
        raise ApiError(503, str(error), code="overloaded") from None
    except ValueError as error:
        raise ApiError(400, str(error), "n") from None


async def _gathered(requested: Sequence[_Requested]) -> list[tuple[list[TokenScore], Finished]]:
    return [await _whole(one) for one in requested]


async def _whole(one: _Requested) -> tuple[list[TokenScore], Finished]:
    scores = list[TokenScore]()
    while True:
        event = await one.events.get()
        if isinstance(event, Piece):
            scores += event.scores
        elif isinstance(event, Finished):
            return scores, event
        else:
            raise _failure(event)


async def _unless_gone(request: Request, work: Any) -> Any:
    """Waits for work, unless the client closes the connection before."""
    task = asyncio.ensure_future(work)
    while not task.done():
        await asyncio.wait([task], timeout=0.5)
        if not task.done() and await request.is_disconnected():
            task.cancel()
            raise ApiError(499, "the client closed the connection")
    return task.result()


async def _stream(
    answer: _Answer, requested: Sequence[_Requested], has_usage: bool, n: int
) -> AsyncIterator[str]:
    merged: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def forward(index: int, events: "asyncio.Queue[Event]") -> None:
        while True:
            event = await events.get()
            await merged.put((index, event))
            if not isinstance(event, Piece):
                return

    tasks = [
        asyncio.ensure_future(forward(index, one.events)) for index, one in enumerate(requested)
    ]
    ends: dict[int, Finished] = {}
    try:
        while len(ends) < len(requested):
            index, event = await merged.get()
            if isinstance(event, Piece):
                made = answer.choice(answer, index, event.text, event.scores, None, True)
            elif isinstance(event, Finished):
                ends[index] = event
                made = answer.choice(answer, index, "", (), event.reason, True)
            else:
                yield _sse(_failure(event).body())
                return
            yield _sse(answer.chunk([made]))
        if has_usage:
            usage = _usage(requested, [ends[index] for index in range(len(requested))], n)
            yield _sse(answer.chunk([], usage))
        yield "data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()
        for one in requested:
            answer.served.engine.cancel(one.job)


def _sse(content: Mapping[str, object]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _usage(requested: Sequence[_Requested], ends: Sequence[Finished], n: int) -> dict[str, int]:
    prompt = sum(len(one.job.tokens) for one in requested[::n])
    new = sum(end.num_tokens for end in ends)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _failure(event: Event) -> ApiError:
    if isinstance(event, TimeoutError):
        return ApiError(504, str(event), code="timeout")
    text = " ".join(str(event).split())[:500]
    return ApiError(500, f"{type(event).__name__}: {text}", code="failed")


def _add_labels(app: FastAPI, served: Served) -> None:
    @app.post("/v1/label")
    async def label(body: LabelRequest, request: Request) -> dict[str, object]:
        adapter = served.adapter(body.model)
        if body.task not in served.tasks:
            hint = nearest(body.task, served.tasks) or f"; there are {', '.join(served.tasks)}"
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
        job = LabelJob(labeller, rows, _posting(asyncio.get_running_loop(), events))
        _submit(served.engine, job)
        try:
            event = await _unless_gone(request, events.get())
        finally:
            served.engine.cancel(job)
        if not isinstance(event, Labelled):
            raise _failure(event)
        return {
            "object": "list",
            "model": body.model,
            "task": task.name,
            "data": [_label(task, index, row) for index, row in enumerate(event.rows)],
        }


def _label_rows(body: LabelRequest, task: Task) -> list[dict[str, object]]:
    if bool(body.texts) == bool(body.rows):
        raise ApiError(400, "give either texts or rows, one at least", "texts")
    if body.texts and _fields(task) != ["text"]:
        text = f"task {task.name} has the fields {', '.join(_fields(task))}: give rows"
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


def _fields(task: Task) -> list[str]:
    return list(field_names(task))


def _of_validation(error: RequestValidationError) -> ApiError:
    """The first fault of a body, in one line with the nearest right name."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    name = ".".join(place)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx'].get('error', first['msg'])}")
    if first["type"] == "extra_forbidden":
        known = [
            *CompletionRequest.model_fields, *ChatRequest.model_fields, *LabelRequest.model_fields
        ]  # fmt: skip
        text = f"unknown field {name!r}{nearest(place[-1], known)}"
        return ApiError(400, text, name, "unknown_field")
    message = first["msg"][0].lower() + first["msg"][1:]
    given = "" if first["type"] == "missing" else f" ({str(first.get('input'))[:80]!r} was given)"
    return ApiError(400, f"{name or 'body'}: {message}{given}", name or None)
