"""Answers that say what is wrong with a request.

Source: https://platform.openai.com/docs/api-reference, for their form.
"""

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from fingpt_lightning.serving.engine import Event
from fingpt_lightning.serving.protocol import ChatRequest, CompletionRequest, LabelRequest
from fingpt_lightning.terminal.messages import nearest

_RETRY_AFTER_S = 2


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


def failure(event: Event) -> ApiError:
    """The answer to a request that the engine could not answer.

    Args:
        event: Exception that it left.
    """
    if isinstance(event, TimeoutError):
        return ApiError(504, str(event), code="timeout")
    text = " ".join(str(event).split())[:500]
    return ApiError(500, f"{type(event).__name__}: {text}", code="failed")


def of_validation(error: RequestValidationError) -> ApiError:
    """The answer that names the first fault of a body, in one line with the nearest right name.

    Args:
        error: Faults of the body.
    """
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
