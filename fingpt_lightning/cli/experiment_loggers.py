"""TensorBoard and MLflow as loggers of a run: where they write, and what a resumed run adds."""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from fingpt_lightning.cli.class_paths import class_at
from fingpt_lightning.cli.logger_packages import refuse_missing_package
from fingpt_lightning.terminal.messages import print_status

_TELEMETRY_VARIABLE = "MLFLOW_DISABLE_TELEMETRY"
_TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"
MLFLOW_VARIABLES = (_TELEMETRY_VARIABLE, _TRACKING_VARIABLE)
"""Variables that keep MLflow from reporting its own use over the network, and that it sets."""

_DATABASE = "sqlite:///"
_NOT_YET = "http://127.0.0.1"
"""Address for a client that is not used: one of a server does nothing until it is asked."""

_DEFAULT_NAME = "lightning_logs"
_PLACE_OF_RUN = (None, ".")
_OWN = "fingpt_lightning.cli.experiment_loggers"
_EVENTS = "events.out.tfevents.*"
_LONGEST_PARAMETER = 250
_REFUSED_IN_NAMES = re.compile(r"[^a-zA-Z0-9_/. -]")


def place_logger(logger: Namespace, run_folder: Path, runs_dir: Path) -> None:
    """Gives Lightning's logger of TensorBoard or MLflow its place; any other stays as it is.

    TensorBoard writes into the run's folder. Without a tracking server MLflow writes into one
    database beside the run folders, so that it can compare the runs; the folder of a run is the
    name of its run there.

    Args:
        logger: Class path and settings of the logger, which are changed.
        run_folder: Folder of the run.
        runs_dir: Parent of all run folders.

    Raises:
        ConfigError: The package that the logger needs is not installed.
    """
    refuse_missing_package(logger.class_path)
    settings, kind = logger.init_args, class_at(logger.class_path)
    if kind is TensorBoardLogger:
        logger.class_path = f"{_OWN}.RunTensorBoard"
        if settings.save_dir in _PLACE_OF_RUN:
            settings.save_dir = str(run_folder)
            if (settings.name, settings.version) == (_DEFAULT_NAME, None):
                settings.name, settings.version = "tensorboard", ""
    elif kind is MLFlowLogger:
        logger.class_path = f"{_OWN}.RunMLflow"
        if settings.run_name is None and settings.run_id is None:
            settings.run_name = run_folder.name
        os.environ.setdefault(_TELEMETRY_VARIABLE, "true")
        # What it does to the tables of a new database, and that it makes an experiment.
        for source in ("mlflow.store.db.utils", "alembic", "lightning.pytorch.loggers.mlflow"):
            logging.getLogger(source).setLevel(logging.ERROR)
        settings.tracking_uri = settings.tracking_uri or os.environ.get(_TRACKING_VARIABLE)
        if settings.tracking_uri is None:
            settings.tracking_uri = f"{_DATABASE}{runs_dir / 'mlflow.db'}"
            if settings.artifact_location is None:
                settings.artifact_location = (runs_dir.absolute() / "mlflow").as_uri()


class _LastSteps:
    """What an earlier part of a run has logged: a resumed run does not log it a second time."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._last

    def add(self, key: str, steps: list[int]) -> None:
        """Takes note of the steps at which a key is there."""
        self._last[key] = max(steps, default=-1)

    def new(self, metrics: Mapping[str, float], step: int | None) -> dict[str, float]:
        """The metrics of a step that are not there yet."""
        return {k: v for k, v in metrics.items() if (step or 0) > self._last.get(k, -1)}


class RunTensorBoard(TensorBoardLogger):
    """Lightning's TensorBoardLogger, whose files a resumed run continues without doubled steps."""

    resumed_step: int | None = 0
    """Step of the checkpoint from which the run continues; None where nothing is trained."""

    _last_steps: _LastSteps | None = None

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> Any:
        self._continue()
        return super().experiment

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(self._continue().new(metrics, step), step)

    def _continue(self) -> _LastSteps:
        if self._last_steps is not None:
            return self._last_steps
        self._last_steps = _LastSteps()
        begin = self.resumed_step
        if begin is None or next(Path(self.log_dir).glob(_EVENTS), None) is None:
            return self._last_steps
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(self.log_dir, size_guidance={"scalars": 0})
        events.Reload()
        for key in events.Tags()["scalars"]:
            steps = [event.step for event in events.Scalars(key)]
            self._last_steps.add(key, [step for step in steps if step < begin])
        # Takes back what a killed run wrote after its last checkpoint.
        self._kwargs["purge_step"] = begin
        return self._last_steps


class RunMLflow(MLFlowLogger):
    """Lightning's MLFlowLogger, for any name of a metric or parameter.

    What MLflow refuses in a name becomes an underscore. With ``run_id`` an earlier run is continued
    without doubled steps. A database is made when the run begins, not before, and by rank 0 alone.

    Args:
        tracking_uri: Address of a tracking server or database.
        **settings: Settings of Lightning's logger.
    """

    def __init__(self, tracking_uri: str, **settings: Any) -> None:
        super().__init__(tracking_uri=_NOT_YET, **settings)
        self._tracking_uri = tracking_uri
        self._is_continued = self._run_id is not None
        self._last_steps = _LastSteps()

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> Any:
        if not self._initialized:
            from mlflow.tracking import MlflowClient

            if self._tracking_uri.startswith(_DATABASE):
                path = Path(self._tracking_uri.removeprefix(_DATABASE))
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.exists():
                    print_status(f"making {path}, MLflow's database of these runs")
            self._mlflow_client = MlflowClient(self._tracking_uri)
        return super().experiment

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        named = {_mlflow_name(key): value for key, value in metrics.items()}
        super().log_metrics(self._continue(list(named)).new(named, step), step)

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        given = dict(params) if isinstance(params, Mapping) else vars(params)
        named = {_mlflow_name(key): str(value) for key, value in _flat(given)}
        client = self.experiment
        # A parameter is written once: a run that is continued keeps those that it began with.
        known = client.get_run(self.run_id).data.params
        new = {key: value[:_LONGEST_PARAMETER] for key, value in named.items() if key not in known}
        if new:
            super().log_hyperparams(new)

    def _continue(self, keys: list[str]) -> _LastSteps:
        for key in keys if self._is_continued else ():
            if key not in self._last_steps:
                history = self.experiment.get_metric_history(self.run_id, key)
                self._last_steps.add(key, [metric.step for metric in history])
        return self._last_steps


def record_config(logger: Any, config: str) -> None:
    """Gives a run of TensorBoard or MLflow the resolved config.

    Args:
        logger: Logger of rank 0.
        config: Resolved config as YAML.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("config", f"```yaml\n{config}```")
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_text(logger.run_id, config, "config.yaml")


def _flat(settings: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{name}/")
        elif name != "_instantiator":  # a note of LightningCLI for itself
            found.append((name, value))
    return found


def _mlflow_name(name: str) -> str:
    parts = _REFUSED_IN_NAMES.sub("_", name).split("/")
    return "/".join(part for part in parts if part not in ("", ".", "..")) or "_"
