"""What a run sends to W&B beside its figures, and what happens where W&B cannot be reached."""

import base64
import http.client
import json
import os
import ssl
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import wandb
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from wandb.sdk.lib import wbauth

from fingpt_lightning.metric_keys import (
    TRAIN_LOSS,
    TRAIN_TOKENS,
    VAL_BITS_PER_BYTE,
    VAL_LOSS,
    VAL_PERPLEXITY,
)
from fingpt_lightning.terminal.messages import first_line, without_credentials

PROBE_TIMEOUT_S = 10.0
"""Seconds that a server may take to answer at all; wandb itself would wait 90 s and then raise."""

FINISH_TIMEOUT_S = 45.0
"""Seconds that the end of a run waits for data that the server has not taken yet."""
_INIT_TIMEOUT_S = 30.0
_END_S = 10.0
"""Seconds that wandb's own processes have to end beyond that."""
_LOST_AFTER_S = 60.0
"""Seconds for which an agent continues without an answer of its server."""
_MAX_ANSWER_BYTES = 2**20
_LIMITS = {
    "WANDB_FINISH_TIMEOUT": f"{FINISH_TIMEOUT_S:g}",
    "WANDB_INIT_TIMEOUT": f"{_INIT_TIMEOUT_S:g}",
}
LIMIT_VARIABLES = tuple(_LIMITS)
"""Variables that limit how long W&B may delay a run's processes, those of an agent included."""

_WITHOUT_SERVER = ("offline", "dryrun", "disabled")
_BY_TOKENS = (TRAIN_LOSS, VAL_LOSS, VAL_PERPLEXITY, VAL_BITS_PER_BYTE)


class Unreachable(NamedTuple):
    """A server that did not answer as W&B's API does.

    Attributes:
        url: Address of the server, without credentials.
        reason: Reason in a few words.
    """

    url: str
    reason: str


def place_wandb_run(logger: Namespace, run_folder: Path) -> None:
    """Places a W&B run in the run's folder.

    Args:
        logger: Settings of a ``WandbLogger``, which are changed.
        run_folder: Folder of the run.
    """
    if logger.save_dir in (None, "."):
        logger.save_dir = str(run_folder)
    if logger.name is None:
        logger.name = run_folder.name
    if logger.offline:
        # wandb's messages, where the run is and how to sync it, are in the run's summary.
        os.environ.setdefault("WANDB_SILENT", "true")


def keep_offline_if_unreachable(logger: Namespace) -> None:
    """Keeps a W&B run offline where its server does not work, and reports that in one line.

    A run that is not kept offline does not wait forever for its server at its end.

    Args:
        logger: Settings of a ``WandbLogger``, which are changed.
    """
    mode = logger.get("mode") or os.environ.get("WANDB_MODE")
    # Only the first process talks to W&B; Lightning reads its number from the environment.
    is_first = getattr(rank_zero_only, "rank", 0) == 0
    if logger.offline or mode in _WITHOUT_SERVER or not is_first:
        return
    limit_waits()
    if (found := find_unreachable()) is None:
        return
    _say_offline(found, logger.save_dir)
    # Not `offline`, which Lightning refuses together with `log_model`.
    logger.mode = "offline"
    os.environ.setdefault("WANDB_SILENT", "true")


def limit_waits() -> None:
    """Limits how long runs wait for their server, in this process and those that it starts."""
    for name, value in _LIMITS.items():
        os.environ.setdefault(name, value)


def begin_run(logger: WandbLogger) -> None:
    """Begins a W&B run; where the server refuses it, offline, which one line reports.

    Args:
        logger: Logger that has not begun its run.
    """
    settings = logger._wandb_init
    is_first = getattr(rank_zero_only, "rank", 0) == 0
    mode = settings.get("mode") or os.environ.get("WANDB_MODE")
    if logger._offline or mode in _WITHOUT_SERVER or not is_first:
        return
    try:
        _ = logger.experiment
    except (wandb.Error, TimeoutError, OSError) as error:
        _say_offline(
            Unreachable(without_credentials(_base_url()), first_line(error)), str(logger.save_dir)
        )
        settings["mode"] = "offline"
        os.environ.setdefault("WANDB_SILENT", "true")


@contextmanager
def runs_that_end() -> Iterator[None]:
    """Within it W&B runs may begin; at its end they are finished, in bounded time.

    A server that accepts no more data costs `FINISH_TIMEOUT_S` and some seconds, and leaves no
    process of wandb behind.
    """
    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        run = wandb.run
        if run is not None and not run.settings._offline:
            _finish(run, exit_code)


def _finish(run: Any, exit_code: int) -> None:
    settings = run.settings
    limit_s = settings.finish_timeout or FINISH_TIMEOUT_S
    began = _children()

    def finish() -> None:
        with suppress(Exception):  # what is not uploaded stays on the disk, and is reported
            run.finish(exit_code=exit_code)
        with suppress(Exception):
            wandb.teardown(exit_code)

    thread = threading.Thread(target=finish, daemon=True, name="wandb-finish")
    thread.start()
    thread.join(limit_s + _END_S)
    if thread.is_alive() or getattr(run, "_finish_timed_out", False):
        print(
            f"fingpt: W&B at {without_credentials(settings.base_url)} did not take all of this run"
            f" in {limit_s:g} s; upload it later with: wandb sync --no-skip-online"
            f" {settings.sync_dir}",
            file=sys.stderr,
        )
    for process in began:
        with suppress(psutil.Error):
            process.kill()
    thread.join(_END_S)


def _children() -> list[psutil.Process]:
    """The processes that wandb has started for this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "wandb" in process.name() or "gpu_stats" in process.name():
                found.append(process)
    return found


class ServerGuard:
    """Detects in a thread that a server has not answered for long.

    Args:
        on_loss: Function that is called once, when the loss is detected.
        lost_after_s: Seconds without an answer.

    Attributes:
        found: Server that was lost, or None.
    """

    def __init__(self, on_loss: Callable[[], None], lost_after_s: float = _LOST_AFTER_S) -> None:
        self.found: Unreachable | None = None
        self._on_loss, self._lost_after_s = on_loss, lost_after_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="fingpt-server-guard")

    def __enter__(self) -> "ServerGuard":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        answered_s = time.monotonic()
        while not self._ended.wait(self._lost_after_s / 6):
            found = find_unreachable(self._lost_after_s / 6)
            if found is None:
                answered_s = time.monotonic()
            elif time.monotonic() - answered_s > self._lost_after_s:
                self.found = found
                self._on_loss()
                return


def _say_offline(found: Unreachable, folder: str) -> None:
    print(
        f"fingpt: W&B at {found.url} cannot be reached ({found.reason}): this run is kept"
        f" offline; upload it later with: wandb sync {folder}/wandb/offline-run-*",
        file=sys.stderr,
    )


def find_unreachable(timeout_s: float = PROBE_TIMEOUT_S) -> Unreachable | None:
    """Queries the user from the configured W&B server; None where it answers as W&B does.

    Args:
        timeout_s: Longest duration in seconds, address lookup included.
    """
    url = _base_url()
    reasons: list[str | None] = []

    def ask() -> None:
        reasons.append(_why_unreachable(url, timeout_s))

    # No library has a time limit for a name that cannot be resolved.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout_s)
    reason = reasons[0] if reasons else f"no answer in {timeout_s:g} s"
    return None if reason is None else Unreachable(without_credentials(url), reason)


def record_config(logger: WandbLogger, config: str) -> None:
    """Gives a W&B run the resolved config, and charts of loss by tokens.

    Every row has the optimizer step too, so that a chart can use either axis.

    Args:
        logger: Logger of rank 0.
        config: Resolved config as YAML.
    """
    run = logger.experiment
    run.config.update({"cli": yaml.safe_load(config)}, allow_val_change=True)
    run.define_metric(TRAIN_TOKENS)
    for key in _BY_TOKENS:
        run.define_metric(key, step_metric=TRAIN_TOKENS)


@rank_zero_only
def log_adapter(trainer: Trainer) -> None:
    """Uploads ``adapter/`` of a finetuning run as an artifact, to loggers with ``log_model``."""
    folder = Path(trainer.default_root_dir) / "adapter"
    if not folder.is_dir():
        return
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and logger._log_model:
            artifact = wandb.Artifact(f"adapter-{logger.experiment.id}", type="model")
            artifact.add_dir(str(folder))
            logger.experiment.log_artifact(artifact)


def _base_url() -> str:
    """As wandb finds it; its own settings could not be changed any more once they are read."""
    settings = wandb.Settings()
    folder = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    settings.settings_system = str(folder / "settings")
    settings.update_from_system_settings()
    settings.update_from_env_vars(dict(os.environ))
    return str(settings.base_url)


def _why_unreachable(url: str, timeout_s: float) -> str | None:
    body = json.dumps({"query": "query Viewer { viewer { id } }"}).encode()
    # The user in an address is no part of a host's name to urllib, which would quote it.
    request = urllib.request.Request(f"{without_credentials(url).rstrip('/')}/graphql", body)
    request.add_header("Content-Type", "application/json")
    key = _api_key(url)
    user = urllib.parse.unquote(urllib.parse.urlsplit(url).netloc.rpartition("@")[0])
    if login := f"api:{key}" if key else user:
        encoded = base64.b64encode(login.encode()).decode()
        request.add_header("Authorization", f"Basic {encoded}")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            content = response.read(_MAX_ANSWER_BYTES)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return f"it refuses the API key, status {error.code}: see wandb login"
        return f"it answers with status {error.code}"
    except urllib.error.URLError as error:
        # Certificates are for wandb to judge: it may know others.
        is_answer = isinstance(error.reason, ssl.SSLError)
        return None if is_answer else str(error.reason)
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or not isinstance(answer.get("data"), dict):
        return "what it answers is not W&B's API"
    if key and answer["data"].get("viewer") is None:
        return "it does not know the API key: see wandb login"
    return None


def _api_key(url: str) -> str | None:
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    try:
        return wbauth.read_netrc_auth(host=url)
    except (wandb.Error, OSError, ValueError):
        return None  # wandb reports what is wrong with it
