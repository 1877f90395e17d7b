"""``fingpt sweep``: a W&B sweep file, checked, then run with a server or without one."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import wandb
import yaml
from rich.console import Console

from fingpt_lightning.cli.errors import ConfigError, TerminatedError
from fingpt_lightning.cli.shipped import SWEEPS, find_file
from fingpt_lightning.cli.trainer import build_trainer_command
from fingpt_lightning.cli.wandb_runs import ServerGuard, find_unreachable, limit_waits
from fingpt_lightning.files import new_folder
from fingpt_lightning.sweeping.checking import Build, Built, check_sweep, described
from fingpt_lightning.sweeping.database import Database
from fingpt_lightning.sweeping.folders import refuse_used_folder
from fingpt_lightning.sweeping.local_sweep import LocalSweep
from fingpt_lightning.sweeping.records import BEST_CONFIG
from fingpt_lightning.sweeping.shared_sweep import SharedSweep
from fingpt_lightning.sweeping.sweep_file import Sweep, WrongSweep, read_sweep
from fingpt_lightning.sweeping.sweep_runner import num_trials
from fingpt_lightning.terminal.messages import first_line

Report = Callable[[Sequence[Path], Path], None]

_RUNS = Path("runs") / "sweeps"
_REPORT = "report.html"
_TABLE_WIDTH = 110


def run(options: argparse.Namespace, report: Report | None = None) -> None:
    """Checks a sweep and runs it as the options say.

    Args:
        options: Result of `parse_options`.
        report: Function that writes the report of folders to a file; None takes the package's own.

    Raises:
        ConfigError: The sweep file is wrong.
        ValueError: A folder is not a valid one for this sweep.
        RuntimeError: No trial finished, or there is no server.
    """
    console = Console(width=max(Console().width, _TABLE_WIDTH), soft_wrap=True)
    try:
        if options.server:
            _run_on_server(options, console)
        else:
            _run_locally(options, console, report or _own_report)
    except WrongSweep as error:
        raise ConfigError(str(error)) from error


def build_fit(words: list[str]) -> Built:
    """What ``fingpt`` would run for these words.

    Args:
        words: ``fit`` and its options.

    Raises:
        ConfigError: The words are wrong.
    """
    cli = build_trainer_command(words)
    settings = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))[cli.command]
    # Lightning 2.6 sets the list outside the class, unseen by type checkers.
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    return Built(settings, [type(observer) for observer in (cli.model, *callbacks)])


def _run_locally(options: argparse.Namespace, console: Console, report: Report) -> None:
    local: LocalSweep | SharedSweep
    if options.storage is not None:
        sweep = read_sweep(_sweep_file(options))
        project = options.project or sweep.content.get("project")
        name = options.study or sweep.name
        count = options.count or sweep.num_trials
        # Before there is a study, which a wrong sweep would leave to the other workers.
        check_sweep(sweep, build_fit, count, _extra(project))
        database = Database(options.storage)
        folder = options.output or _RUNS / name
        local = SharedSweep(sweep, database, name, folder, options.count, project)
        extra = _extra(local.project)
        _show(sweep, local.count, console)
        line = f"study {name!r} in {database.shown}"
        console.print(line, markup=False, highlight=False)
    elif options.resume is not None:
        local = LocalSweep(options.resume)
        if options.count is not None:
            local.extend(options.count)
        if options.project not in (None, local.project):
            raise ValueError(f"--project: {options.resume} was begun with {local.project}")
        extra = _check(local.sweep, build_fit, local.count, local.project, console)
    else:
        sweep = read_sweep(_sweep_file(options))
        sweep.check_local()
        if options.output is not None:
            refuse_used_folder(options.output)
        count = num_trials(sweep, options.count)
        project = options.project or sweep.content.get("project")
        extra = _check(sweep, build_fit, count, project, console)
        folder = options.output or new_folder(_RUNS, sweep.name)
        local = LocalSweep.begin(sweep, folder, count, project)
    folder = local.folder
    console.print(f"sweep: {folder}", markup=False, highlight=False)
    try:
        best = local.run(console, extra)
    except (KeyboardInterrupt, TerminatedError):
        line = f"go on with: fingpt sweep --resume {folder}"
        if options.storage is not None:
            line = "another worker goes on with its trial; the same command joins again"
        console.print(line, markup=False, highlight=False)
        raise
    results = local.results(console)
    console.print(results.table, soft_wrap=False)
    if best is None:
        raise RuntimeError(f"no trial finished; {folder}/trials/NNN/output.txt have the reasons")
    report([folder], folder / _REPORT)
    best_line = f"best: fingpt fit --config {folder / BEST_CONFIG}"
    if not (folder / BEST_CONFIG).is_file():
        best_line = f"best: trial {best} by {results.worker} in {results.folder}"
    for line in (
        best_line,
        f"report: {folder / _REPORT}",
        f"upload: wandb sync {folder}/trials/*/wandb/offline-run-*",
    ):
        console.print(line, markup=False, highlight=False)


def _sweep_file(options: argparse.Namespace) -> Path:
    return find_file(str(options.sweep), SWEEPS, "sweep")


def _check(
    sweep: Sweep, build: Build, count: int, project: str | None, console: Console
) -> list[str]:
    """Checks and shows a sweep; returns the options that its trials need in addition."""
    extra = _extra(project)
    check_sweep(sweep, build, count, extra)
    _show(sweep, count, console)
    return extra


def _extra(project: str | None) -> list[str]:
    return [] if project is None else ["--trainer.logger.project", project]


def _show(sweep: Sweep, count: int, console: Console) -> None:
    console.print(described(sweep, count), soft_wrap=False)
    goal = "highest" if sweep.is_maximized else "lowest"
    line = f"{count} trials by {sweep.method} for the {goal} {sweep.metric}: checked"
    console.print(line, markup=False, highlight=False)
    if sweep.compared_by.is_default:
        line = f"{sweep.path} names no metric: trials are compared by {sweep.metric}"
        console.print(line, markup=False, highlight=False)


def _run_on_server(options: argparse.Namespace, console: Console) -> None:
    sweep = read_sweep(_sweep_file(options))
    count = options.count or sweep.num_trials
    check_sweep(sweep, build_fit, count)
    console.print(described(sweep, count), soft_wrap=False)
    if found := find_unreachable():
        raise RuntimeError(
            f"W&B at {found.url} cannot be reached ({found.reason}); without a server:"
            f" fingpt sweep {options.sweep} --local"
        )
    project = options.project or sweep.content.get("project") or "fingpt"
    # An agent starts the first `python` on its path: let it be this one.
    folders = (str(Path(sys.executable).parent), os.environ.get("PATH", ""))
    os.environ["PATH"] = os.pathsep.join(folders)
    entity = sweep.content.get("entity")
    limit_waits()
    try:
        with ServerGuard(lambda: os.kill(os.getpid(), signal.SIGINT)) as guard:
            identity = wandb.sweep(sweep.content, project=project, entity=entity)
            wandb.agent(identity, project=project, entity=entity, count=options.count)
    except KeyboardInterrupt:
        if guard.found is None:
            raise
    except (wandb.Error, OSError, ValueError) as error:
        raise RuntimeError(f"W&B ended the sweep: {first_line(error)}") from error
    if guard.found is not None:
        raise RuntimeError(
            f"W&B at {guard.found.url} stopped answering ({guard.found.reason}) and the sweep was"
            " ended; runs that have no end there are in runs/*/wandb: upload them with wandb"
            " sync --no-skip-online"
        )


def _own_report(paths: Sequence[Path], output: Path) -> None:
    from fingpt_lightning.reporting import write_report  # matplotlib takes a second

    write_report(paths, output)
