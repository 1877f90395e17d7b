"""The application of the server: its checks, its errors and its routes.

Source: https://platform.openai.com/docs/api-reference, for the routes under ``/v1`` but
``/v1/label``.
"""

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from fingpt_lightning.serving.completions import add_completions
from fingpt_lightning.serving.errors import ApiError, of_validation
from fingpt_lightning.serving.labels import add_labels
from fingpt_lightning.serving.limits import BodyLimit, KeyCheck
from fingpt_lightning.serving.metrics import metrics_text
from fingpt_lightning.serving.served import Served
from fingpt_lightning.tasks.examples import field_names

_PAGE = Path(__file__).with_name("page.html")


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
        return of_validation(error).response()

    _add_pages(app, served)
    add_completions(app, served)
    add_labels(app, served)
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
                {"name": task.name, "labels": list(task.labels), "fields": list(field_names(task))}
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
