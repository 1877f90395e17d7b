"""A Python that has imported what our programs import and forks for each that is to run.

The other end is `tests.support.warm_python`. A fork runs its program as the main module and ends as
an interpreter does, after its threads and exit handlers.
"""

import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy
from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

_PRELOADED = (
    "callbacks",
    "fingpt_lightning.cli.trainer",
    "fingpt_lightning.data",
    "fingpt_lightning.modules",
    "fingpt_lightning.strategies",
    "lightning.pytorch",
    "torch._dynamo",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)
# Variables, by the start of their name, that the interpreter or a library reads at its start.
_READ_AT_IMPORT = (
    "CUDA_", "HF_", "LD_", "MKL_", "OMP_", "ONEDNN_", "OPENBLAS_", "PYTHON", "TORCH_",
    "TORCHDYNAMO_", "TRANSFORMERS_",
)  # fmt: skip
_READ_LATER = ("PYTHONPATH",)
_OWN_ENV = dict(os.environ)
_MAX_REQUEST_BYTES = 2**20
_NUM_FILES = 4


def serve(
    channel: socket.socket, temporaries: Sequence[tempfile.TemporaryDirectory[str]]
) -> dict[str, Any]:
    """Forks for every request until the other end is closed; returns in a fork only.

    A request comes with four files: standard input, output and error, and a pipe. The pipe takes
    the process id at once and the exit status at the end.

    Args:
        channel: Socket of the requests.
        temporaries: Folders that every fork has to itself.

    Returns:
        The request: ``arguments`` of Python, ``cwd`` and ``env``.
    """
    pipes: dict[int, int] = {}
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fd == woken:
                os.read(woken, 4096)
                _report_ended(pipes)
                continue
            message, files, _, _ = socket.recv_fds(channel, _MAX_REQUEST_BYTES, _NUM_FILES)
            if not message:
                _end_all(pipes)
            process_id = os.fork()
            if process_id == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                selector.close()
                channel.close()
                for file in (woken, wakes, files[3], *pipes.values()):
                    os.close(file)
                request: dict[str, Any] = json.loads(message)
                _enter(request, files[:3], temporaries)
                return request
            for file in files[:3]:
                os.close(file)
            pipes[process_id] = files[3]
            os.write(files[3], b"%d\n" % process_id)


def _report_ended(pipes: dict[int, int]) -> None:
    while pipes:
        process_id, status = os.waitpid(-1, os.WNOHANG)
        if process_id == 0:
            return
        pipe = pipes.pop(process_id)
        os.write(pipe, b"%d\n" % os.waitstatus_to_exitcode(status))
        os.close(pipe)


def _end_all(pipes: dict[int, int]) -> NoReturn:
    for process_id in pipes:
        os.killpg(process_id, signal.SIGKILL)
        os.waitpid(process_id, 0)
    os._exit(0)


def _enter(
    request: dict[str, Any],
    files: list[int],
    temporaries: Sequence[tempfile.TemporaryDirectory[str]],
) -> None:
    os.setsid()
    os.chdir(request["cwd"])
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    env = request["env"]
    if _read_at_import(env) != _read_at_import(_OWN_ENV):
        os.execve(sys.executable, [sys.executable, *request["arguments"]], env)
    for temporary in temporaries:
        # The libraries' own, made at their import, beside those of the server: each fork removes
        # its own at its end, and leaves nothing in its TMPDIR if it is killed.
        temporary._finalizer.detach()  # type: ignore[attr-defined]
        temporary.__init__()  # type: ignore[misc]
    os.environ.clear()
    os.environ.update(env)
    # As Lightning does when it is imported.
    rank_zero_only.rank = _get_rank() or 0  # type: ignore[attr-defined]
    # Python's own generator is seeded anew in a fork.
    numpy.random.seed()  # noqa: NPY002
    tempfile.tempdir = None  # it was that of the server


def _read_at_import(env: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in env.items()
        if name.startswith(_READ_AT_IMPORT) and name not in _READ_LATER
    }


def _path_entries() -> list[str]:
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


def _main() -> None:
    for name in _PRELOADED:
        importlib.import_module(name)
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, "a fork would lack the other threads"
    site_path = [entry for entry in sys.path[1:] if entry not in _path_entries()]
    gc.collect()
    temporaries = [x for x in gc.get_objects() if isinstance(x, tempfile.TemporaryDirectory)]
    gc.freeze()  # a collection in a fork would copy the pages of all objects
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.send(b"ready")
    option, program, *words = serve(channel, temporaries)["arguments"]
    sys.path[:] = [str(Path.cwd()) if option == "-m" else "", *_path_entries(), *site_path]
    sys.orig_argv = [sys.executable, option, program, *words]
    sys.argv = [option, *words]
    if option == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        return
    assert option == "-c", option
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    exec(compile(program, "<string>", "exec"), main.__dict__)


if __name__ == "__main__":
    _main()
