"""``fingpt serve``: a model and its adapters behind OpenAI's routes."""

import argparse
import asyncio
import os
import socket
from typing import Any

from rich.console import Console
from typing_extensions import override

from fingpt_lightning.serving.options import API_KEY, is_loopback, served_name
from fingpt_lightning.tasks import Task, find_task
from fingpt_lightning.tasks.library import find_label_task, task_names
from fingpt_lightning.units import MIB

_EXTRA = "fingpt serve needs FastAPI and uvicorn: pip install 'fingpt-lightning[serve]'"
_DRAIN_POLL_S = 0.05


def run(options: argparse.Namespace) -> None:
    """Serves until the process is asked to end; accepted requests are answered before.

    Args:
        options: Result of `parse_options`.

    Raises:
        ImportError: The packages of the extra are missing.
        ValueError: A task or the model is not valid.
        OSError: A path does not exist, or the address is taken.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError:
        raise ImportError(_EXTRA) from None
    tasks = _tasks(options.tasks)
    name = served_name(options)
    # Before the model is loaded: a taken port is told at once.
    with _listening(options.host, options.port) as listener:
        from fingpt_lightning.deploy.loading import load_with_adapters
        from fingpt_lightning.serving.app import build_app
        from fingpt_lightning.serving.engine import Engine
        from fingpt_lightning.serving.served import Served

        model = load_with_adapters(options)
        engine = Engine(
            model.network,
            model.tokenizer,
            model.bank,
            batch_size=options.batch_size,
            max_queue=options.max_queue,
            timeout_s=float(options.timeout_s),
        )
        served = Served(
            name,
            model.network,
            model.tokenizer,
            engine,
            model.bank,
            tasks,
            os.environ.get(API_KEY),
            options.max_body_kib * 1024,
            float(options.timeout_s),
        )
        app = build_app(served, loopback=options.host if is_loopback(options.host) else None)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            # For clients that neither send nor read: requests themselves end before.
            timeout_graceful_shutdown=options.timeout_s,
        )

        class DrainingServer(uvicorn.Server):
            """Answers what it has accepted before it ends; a second signal ends it at once."""

            @override
            def handle_exit(self, sig: int, frame: Any) -> None:
                if engine.is_draining:
                    self.force_exit = True
                    super().handle_exit(sig, frame)
                engine.drain()

            async def end_when_idle(self) -> None:
                """Ends the server once it is to stop and nothing is left to answer."""
                while not (engine.is_draining and engine.is_idle):
                    await asyncio.sleep(_DRAIN_POLL_S)
                self.should_exit = True

        server = DrainingServer(config)
        console = Console(soft_wrap=True, highlight=False, markup=False)
        if model.remark:
            console.print(model.remark)
        place = f"http://{_shown_host(options.host)}:{listener.getsockname()[1]}"
        console.print(
            f"{model.loaded.description}: {', '.join(served.models)} at {place}/v1,"
            f" a page to try them at {place}"
        )
        engine.start()
        try:
            asyncio.run(_serve(server, listener))
        finally:
            engine.stop(timeout_s=10.0)
        counts = engine.counts
        console.print(
            f"stopped: {counts.finished:,} requests answered, {counts.failed:,} failed,"
            f" {counts.new_tokens:,} tokens and {counts.labelled_rows:,} labels written;"
            f" {engine.cache_bytes() / MIB:.0f} MiB of keys and values"
        )


async def _serve(server: Any, listener: socket.socket) -> None:
    ending = asyncio.ensure_future(server.end_when_idle())
    try:
        await server.serve([listener])
    finally:
        ending.cancel()


def _tasks(names: list[str] | None) -> dict[str, Task]:
    """The tasks with labels among those named; all shipped ones where none are."""
    if names:
        found = [find_label_task(name) for name in names]
    else:
        found = [task for name in task_names() if (task := find_task(name)).kind == "labels"]
    return {task.name: task for task in found}


def _listening(host: str, port: int) -> socket.socket:
    """A socket at an address.

    Raises:
        OSError: The address is taken, or is none of this machine.
    """
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise OSError(f"--host {host}: {error.strerror}") from None
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"--host {host} --port {port}: {error.strerror}") from None
    return listener


def _shown_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
