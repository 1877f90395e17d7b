"""``fingpt report``: runs, sweeps and evaluations on one page."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fingpt_lightning.files import refuse_unwritable, write_whole
from fingpt_lightning.reporting.headline import cards, glance_section
from fingpt_lightning.reporting.page import Label, Page, Section, to_html
from fingpt_lightning.reporting.run_sections import (
    compression_section,
    learning_section,
    memory_section,
    pipeline_section,
    settings_section,
    speed_section,
)
from fingpt_lightning.reporting.runs import Evaluation, Run, Sweep, read_folder
from fingpt_lightning.reporting.sweep_sections import sweep_section
from fingpt_lightning.reporting.task_sections import accuracy_section

_NUM_TRIALS_SHOWN = 5
"""How many of a sweep's trials, the best ones, are shown beside each other as runs."""


def write_page(paths: Sequence[Path], output: Path, refresh_s: int | None = None) -> bool:
    """The implementation of `fingpt_lightning.reporting.write_report`, with its messages.

    Args:
        paths: Folders.
        output: File of the page.
        refresh_s: Seconds after which a browser reads the page again, where a run goes on.

    Returns:
        Whether a run of them is not finished.
    """
    if not paths:
        raise ValueError("no run, sweep or evaluation is given")
    refuse_unwritable(output, "output")
    found = [read_folder(path) for path in dict.fromkeys(paths)]
    goes_on = any(not is_over(one) for one in found)
    page = _page(found)._replace(refresh_s=refresh_s if goes_on else None)
    write_whole(output, to_html(page))
    return goes_on


def is_over(one: Run | Sweep | Evaluation) -> bool:
    """Whether a run has written its summary, or a sweep has no trial that runs."""
    if isinstance(one, Run):
        return one.is_finished or one.error is not None
    if isinstance(one, Sweep):
        return all(trial.state != "running" for trial in one.trials)
    return True


def _page(found: Sequence[Run | Sweep | Evaluation]) -> Page:
    sweeps = [one for one in found if isinstance(one, Sweep)]
    evaluations = [one for one in found if isinstance(one, Evaluation)]
    runs: list[Run] = []
    for one in found:
        if isinstance(one, Run):
            runs.append(one)
        elif isinstance(one, Sweep):
            best = [trial.run for trial in one.ranked() if trial.run is not None]
            runs += best[:_NUM_TRIALS_SHOWN]
    runs = _with_own_names(runs)
    sections: list[Section] = [sweep_section(sweep) for sweep in sweeps]
    missing: list[str] = []
    made = (
        glance_section(runs),
        learning_section(runs),
        accuracy_section(runs, evaluations),
        compression_section(runs),
        speed_section(runs),
        memory_section(runs),
        pipeline_section(runs),
        settings_section(runs, evaluations),
    )
    for section in made:
        if isinstance(section, Section):
            sections.append(section)
        elif section:
            missing.append(section)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    names = [one.name for one in (*sweeps, *(one for one in found if not isinstance(one, Sweep)))]
    kind = "Sweep" if sweeps else "Run" if runs else "Evaluation"
    shown = names[0] if len(names) == 1 else f"{len(names)} side by side"
    return Page(
        title=f"{kind} report: {shown}" if len(names) == 1 else f"Report: {shown}",
        subtitle=f"{', '.join(names)}; written {now}",
        cards=cards(runs, sweeps, evaluations),
        labels=[Label(run.name, place, _state(run)) for place, run in enumerate(runs)],
        sections=sections,
        missing=missing,
    )


def _state(run: Run) -> str:
    if run.is_finished:
        return "finished"
    if run.error:
        return f"failed: {run.error}"
    after = f"after {run.num_steps:,} logged steps" if run.num_steps else "before the first step"
    return f"not finished: it stopped {after}, or is still running"


def _with_own_names(runs: Sequence[Run]) -> list[Run]:
    """Adds the parent folder's name to the names of runs that are equal otherwise."""
    names = [run.name for run in runs]
    return [
        run._replace(name=f"{run.folder.resolve().parent.name}/{run.name}")
        if names.count(run.name) > 1
        else run
        for run in runs
    ]
