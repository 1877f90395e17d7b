"""Checks of requests before anything of them is read as JSON."""

import asyncio
import hmac

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """Answers requests whose body is too large with status 413, without reading the rest of it.

    Args:
        app: Application behind it.
        max_bytes: Largest body.
        timeout_s: Seconds in which it has to arrive.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sizes = [value for name, value in scope["headers"] if name == b"content-length"]
        if sizes and sizes[0].isdigit() and int(sizes[0]) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        # A body without a length is read here, as far as it may go.
        messages: list[Message] = []
        num_bytes, goes_on = 0, True
        try:
            async with asyncio.timeout(self._timeout_s):
                while goes_on:
                    message = await receive()
                    messages.append(message)
                    num_bytes += len(message.get("body", b""))
                    goes_on = message["type"] == "http.request" and message.get("more_body", False)
                    if num_bytes > self._max_bytes:
                        await self._refuse(scope, receive, send)
                        return
        except TimeoutError:
            text = f"the body has not arrived after {self._timeout_s:g} s"
            await _refusal(408, text, "timeout")(scope, receive, send)
            return

        async def replayed() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replayed, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = f"the body is larger than {self._max_bytes:,} bytes"
        await _refusal(413, text, "body_too_large")(scope, receive, send)


class KeyCheck:
    """Answers requests that do not name a key with status 401.

    Args:
        app: Application behind it.
        key: Key that ``Authorization: Bearer`` has to name.
        path: Beginning of the paths that need it.
    """

    def __init__(self, app: ASGIApp, key: str, path: str) -> None:
        self._app, self._wanted, self._path = app, f"Bearer {key}".encode(), path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] == "http" and scope["path"].startswith(self._path):
            given = next((v for name, v in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(given, self._wanted):
                text = "the request names no valid key (Authorization: Bearer KEY)"
                await _refusal(401, text, "invalid_api_key")(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _refusal(status: int, text: str, code: str) -> JSONResponse:
    error = {"message": text, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status)
