"""The routes that complete prompts and chats.

Source: https://platform.openai.com/docs/api-reference.
"""

import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from fingpt_lightning.deploy.sampling import Sampling
from fingpt_lightning.serving.engine import Completing, Event, Finished, Piece, TokenScore
from fingpt_lightning.serving.errors import ApiError, failure
from fingpt_lightning.serving.protocol import ChatRequest, CompletionRequest, Message
from fingpt_lightning.serving.served import Served
from fingpt_lightning.serving.waiting import posting, submit, unless_gone
from fingpt_lightning.tasks.encoding import encode_turns
from fingpt_lightning.tasks.examples import Turn


def add_completions(app: FastAPI, served: Served) -> None:
    """Adds ``/v1/completions`` and ``/v1/chat/completions``.

    Args:
        app: Application.
        served: What it answers with.
    """

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
                posting(loop, events),
                sampling,
                body.stop,
                adapter,
                num_logprobs,
                stream,
                is_streamed=body.stream,
            )
            found.append(_Requested(job, events))
    return found


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
    submit(engine, *(one.job for one in requested))
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        events = _stream(answer, requested, usage, body.n)
        return StreamingResponse(events, media_type="text/event-stream")
    try:
        gathered = await unless_gone(request, _gathered(requested))
    finally:
        for one in requested:
            engine.cancel(one.job)
    choices = [
        answer.choice(answer, index, end.text, scores, end.reason, False)
        for index, (scores, end) in enumerate(gathered)
    ]
    return answer.whole(choices, _usage(requested, [end for _, end in gathered], body.n))


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
            raise failure(event)


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
                yield _sse(failure(event).body())
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
