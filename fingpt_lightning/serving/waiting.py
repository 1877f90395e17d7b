"""Requests that wait for the engine, which runs in a thread of its own."""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import Request

from fingpt_lightning.serving.engine import Completing, Engine, Event, LabelJob, OverloadedError
from fingpt_lightning.serving.errors import ApiError


def posting(
    loop: asyncio.AbstractEventLoop, events: "asyncio.Queue[Event]"
) -> Callable[[Event], None]:
    """A function by which the thread of the engine puts events into a queue of another loop.

    Args:
        loop: Loop that waits for the events.
        events: Queue.
    """

    def post(event: Event) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    return post


def submit(engine: Engine, *jobs: Completing | LabelJob) -> None:
    """Hands the parts of a request to the engine.

    Args:
        engine: Engine.
        jobs: Parts of the request.

    Raises:
        ApiError: Too many requests wait, or the parts of this one can never wait together.
    """
    try:
        engine.submit(*jobs)
    except OverloadedError as error:
        raise ApiError(503, str(error), code="overloaded") from None
    except ValueError as error:
        raise ApiError(400, str(error), "n") from None


async def unless_gone(request: Request, work: Any) -> Any:
    """Waits for work, unless the client closes the connection before.

    Args:
        request: Request of the client.
        work: Awaitable.

    Raises:
        ApiError: The client has closed the connection.
    """
    task = asyncio.ensure_future(work)
    while not task.done():
        await asyncio.wait([task], timeout=0.5)
        if not task.done() and await request.is_disconnected():
            task.cancel()
            raise ApiError(499, "the client closed the connection")
    return task.result()
