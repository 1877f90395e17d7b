"""What a run says to W&B beside its figures, and what happens where W&B cannot be reached."""

import os
import ssl
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import wandb
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from fingpt_lightning.metric_keys import TRAIN_LOSS, TRAIN_TOKENS, VAL_LOSS, VAL_PERPLEXITY

PROBE_TIMEOUT_S = 10.0
"""How long a server may take to answer at all; wandb itself would wait 90 s and then raise."""

_WITHOUT_SERVER = ("offline", "dryrun", "disabled")
_BY_TOKENS = (TRAIN_LOSS, VAL_LOSS, VAL_PERPLEXITY)


class Unreachable(NamedTuple):
    """A server that did not answer.

    Attributes:
        url: Its address.
        reason: In a few words.
    """

    url: str
    reason: str


def place_wandb_run(logger: Namespace, run_folder: Path) -> None:
    """Puts a W&B run into the run's folder.

    Args:
        logger: The settings of a ``WandbLogger``, which are changed.
        run_folder: Of the run.
    """
    if logger.save_dir in (None, "."):
        logger.save_dir = str(run_folder)
    if logger.name is None:
        logger.name = run_folder.name
    if logger.offline:
        # What it would say, where the run is and how to sync it, stands in the run's summary.
        os.environ.setdefault("WANDB_SILENT", "true")


def keep_offline_if_unreachable(logger: Namespace) -> None:
    """Has a W&B run kept offline where its server does not answer, and says so in one line.

    Args:
        logger: The settings of a ``WandbLogger``, which are changed.
    """
    mode = logger.get("mode") or os.environ.get("WANDB_MODE")
    # Only the first process talks to W&B; Lightning has its number from the environment.
    is_first = getattr(rank_zero_only, "rank", 0) == 0
    if logger.offline or mode in _WITHOUT_SERVER or not is_first:
        return
    if (found := find_unreachable()) is None:
        return
    print(
        f"fingpt: W&B at {found.url} cannot be reached ({found.reason}): this run is kept"
        f" offline; upload it later with: wandb sync {logger.save_dir}/wandb/offline-run-*",
        file=sys.stderr,
    )
    # Not `offline`, with which Lightning refuses `log_model`.
    logger.mode = "offline"
    os.environ.setdefault("WANDB_SILENT", "true")


def find_unreachable(timeout_s: float = PROBE_TIMEOUT_S) -> Unreachable | None:
    """Asks the W&B server that is configured for any answer at all; None where one comes.

    Args:
        timeout_s: The longest that this takes, the search for the address included.
    """
    url = _base_url()
    reasons: list[str | None] = []

    def ask() -> None:
        reasons.append(_why_unreachable(url, timeout_s))

    # For a name that cannot be resolved, no library has a limit of time.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout_s)
    reason = reasons[0] if reasons else f"no answer in {timeout_s:g} s"
    return None if reason is None else Unreachable(url, reason)


def record_config(logger: WandbLogger, config: str) -> None:
    """Gives a W&B run the resolved config, and charts of loss by tokens.

    Every row has the optimizer step too, so that a chart can go by either.

    Args:
        logger: Of rank 0.
        config: YAML.
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
    """As wandb finds it, whose own settings could not be changed any more once they are read."""
    settings = wandb.Settings()
    folder = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    settings.settings_system = str(folder / "settings")
    settings.update_from_system_settings()
    settings.update_from_env_vars(dict(os.environ))
    return str(settings.base_url)


def _why_unreachable(url: str, timeout_s: float) -> str | None:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s)
    except urllib.error.HTTPError:
        return None  # an answer, if not to this question
    except urllib.error.URLError as error:
        # Certificates are for wandb to judge: it may know of others.
        is_answer = isinstance(error.reason, ssl.SSLError)
        return None if is_answer else str(error.reason)
    except OSError as error:
        return str(error)
    return None
