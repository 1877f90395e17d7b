"""What a local sweep leaves: ``sweep.json``, ``best.yaml`` and a table."""

import math
from pathlib import Path
from typing import Any

import yaml
from optuna import Study
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as StudyState
from rich.table import Table

from fingpt_lightning.files import write_json, write_whole
from fingpt_lightning.sweeping.space import short_names, shown
from fingpt_lightning.sweeping.sweep_file import Sweep
from fingpt_lightning.sweeping.trial_process import TrialState
from fingpt_lightning.terminal.command_line import as_list
from fingpt_lightning.units import format_duration

RECORD = "sweep.json"
BEST_CONFIG = "best.yaml"
_STATES = {
    StudyState.RUNNING: TrialState.RUNNING,
    StudyState.COMPLETE: TrialState.FINISHED,
    StudyState.FAIL: TrialState.FAILED,
    StudyState.PRUNED: TrialState.PRUNED,
}
_WANDB_LOGGER = (
    "lightning.pytorch.loggers.WandbLogger",
    "lightning.pytorch.loggers.wandb.WandbLogger",
)
# Path and name of a run, which a new run determines for itself.
_OF_ONE_LOGGER = ("name", "save_dir", "id", "version", "group", "mode")


def best_number(study: Study) -> int | None:
    """The number of the best trial that finished; None where none has."""
    finished = [t for t in study.get_trials(deepcopy=False) if t.state == StudyState.COMPLETE]
    return study.best_trial.number if finished else None


def run_folder(trial: FrozenTrial) -> str:
    """The run folder of a trial, from that of the sweep.

    A trial that another worker of a shared sweep runs again has a folder of its own, which a worker
    that was only suspended does not write into.
    """
    attempt = trial.user_attrs.get("attempt", 1)
    return f"trials/{trial.number:03d}" + ("" if attempt == 1 else f"-{attempt}")


def write_record(folder: Path, sweep: Sweep, study: Study) -> None:
    """Writes ``sweep.json``, aside and then renamed.

    Args:
        folder: Folder of the sweep.
        sweep: Sweep file.
        study: Study with the trials; those that wait are left out.
    """
    record = {
        "name": study.user_attrs["name"],
        "sweep_file": study.user_attrs["sweep_file"],
        "metric": {
            "name": sweep.metric,
            "goal": "maximize" if sweep.is_maximized else "minimize",
        }
        | ({} if (target := sweep.compared_by.target) is None else {"target": target}),
        "method": sweep.method,
        "started_at": study.user_attrs["started_at"],
        "trials": [_entry(folder, sweep, trial) for trial in _begun(study)],
        "best": best_number(study),
    }
    write_json(folder / RECORD, record)


def write_best_config(folder: Path, trial: FrozenTrial) -> None:
    """Writes ``best.yaml``: the resolved config of a trial, for a new run of its own.

    Args:
        folder: Folder of the sweep.
        trial: Trial, whose run folder is there.
    """
    config = folder / run_folder(trial) / "config.yaml"
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    trainer = settings["trainer"]
    trainer["default_root_dir"] = None
    for key in ("best_checkpoint", "last_checkpoint"):
        settings[key]["dirpath"] = None
    for callback in as_list(trainer.get("callbacks")):
        if "dirpath" in (callback.get("init_args") or {}):
            callback["init_args"]["dirpath"] = None
    for logger in as_list(trainer.get("logger")):
        if isinstance(logger, dict) and logger["class_path"] in _WANDB_LOGGER:
            own = {key: None for key in _OF_ONE_LOGGER if key in logger["init_args"]}
            logger["init_args"] |= own | {"offline": not logger["init_args"].get("log_model")}
    text = yaml.safe_dump(settings, sort_keys=False)
    write_whole(folder / BEST_CONFIG, f"# Trial {trial.number} of {folder.name}.\n{text}")


def table(sweep: Sweep, study: Study) -> Table:
    """The trials, the best first, then those that did not finish."""
    made = Table(box=None, pad_edge=False)
    names = short_names(sweep.searched)
    made.add_column("trial", justify="right")
    for name in sweep.searched:
        made.add_column(names[name], justify="right")
    made.add_column(sweep.metric, justify="right", no_wrap=True)
    made.add_column("time", justify="right", no_wrap=True)
    made.add_column("", overflow="fold")
    best = best_number(study)
    sign = -1.0 if sweep.is_maximized else 1.0

    def rank(trial: FrozenTrial) -> tuple[bool, float]:
        is_finished = trial.state == StudyState.COMPLETE
        return not is_finished, sign * (trial.value or 0.0)

    for trial in sorted(_begun(study), key=rank):
        parameters = _parameters(sweep, trial)
        value, seconds = _value(trial), trial.user_attrs.get("seconds")
        is_best = trial.number == best
        remark = "best" if is_best else trial.user_attrs.get("error") or _STATES[trial.state]
        made.add_row(
            str(trial.number),
            *(shown(parameters[name]) if name in parameters else "-" for name in sweep.searched),
            "-" if value is None else shown(value),
            "-" if seconds is None else format_duration(seconds),
            "" if remark == TrialState.FINISHED else str(remark),
            style="bold" if is_best else None,
        )
    return made


def _entry(folder: Path, sweep: Sweep, trial: FrozenTrial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": _STATES[trial.state],
        "value": _value(trial),
        "parameters": _parameters(sweep, trial),
        "run_folder": run_folder(trial),
        "error": trial.user_attrs.get("error"),
        "seconds": trial.user_attrs.get("seconds"),
    }


def _begun(study: Study) -> list[FrozenTrial]:
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if trial.state != StudyState.WAITING]


def _value(trial: FrozenTrial) -> float | None:
    """The final value of a trial; of one that was stopped early, the last that it reported.

    None where that is NaN or infinite: such a trial has no value to compare.
    """
    value = trial.value if trial.state == StudyState.COMPLETE else None
    reported = trial.intermediate_values
    if trial.state == StudyState.PRUNED and reported:
        value = float(reported[max(reported)])
    return value if value is not None and math.isfinite(value) else None


def _parameters(sweep: Sweep, trial: FrozenTrial) -> dict[str, Any]:
    return {name: sweep.parameters[name].restored(stored) for name, stored in trial.params.items()}
