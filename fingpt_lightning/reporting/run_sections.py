"""Sections about runs. Each is a section, or a sentence about what is missing, or None."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from fingpt_lightning.metric_keys import (
    MEMORY_PARTS,
    PIPELINE_BUBBLE_SHARE_FORMULA,
    THROUGHPUT_MFU,
    THROUGHPUT_TOKENS_PER_S,
    THROUGHPUT_TRAINING_TIME_S,
    TRAIN_LOSS,
    TRAIN_TOKENS,
    VAL_BITS_PER_BYTE,
    VAL_LOSS,
)
from fingpt_lightning.pipeline import Work, bubble_share
from fingpt_lightning.reporting.charts import (
    Bar,
    Line,
    bar_chart,
    line_chart,
    timeline_chart,
)
from fingpt_lightning.reporting.headline import (
    bits_per_byte,
    compression,
    has_one_tokenizer,
    peak_bytes,
    tokenizer_remark,
)
from fingpt_lightning.reporting.page import (
    Block,
    Cell,
    Chart,
    Charts,
    Details,
    Note,
    Section,
    Table,
    number,
)
from fingpt_lightning.reporting.runs import Evaluation, Run, differing
from fingpt_lightning.units import format_bytes, format_count

_PARTS = tuple(MEMORY_PARTS)
_PHASES = {
    "at rest": ("weights", "optimizer"),
    "backward starts": ("weights", "optimizer", "activations"),
    "before the step": ("weights", "optimizer", "gradients"),
}
_HEAD_SETTINGS = (
    "seed_everything",
    *("model.class_path", "data.class_path", "trainer.max_steps", "trainer.max_epochs"),
    *("trainer.precision", "trainer.accelerator", "trainer.devices", "trainer.strategy"),
    *("trainer.strategy.class_path", "trainer.accumulate_grad_batches"),
    "trainer.gradient_clip_val",
)
_SECONDS_PER_MINUTE = 60
_LONG_RUN_S = 300
_MANY_POINTS = 40
_MIN_SHARE = 0.1
"""Charts of less memory than this share of the largest are no longer drawn on its scale."""


def learning_section(runs: Sequence[Run]) -> Section | str | None:
    """Loss by tokens, by steps and by time, and bits per byte by bytes; one chart is shown."""
    if not runs:
        return None
    blocks: list[Block] = []
    is_fair = has_one_tokenizer(runs)
    charts, choices = [], []
    for axis in _axes(runs):
        in_bits = axis.name == "bytes" or (not is_fair and _all_in_bits(runs))
        lines = []
        for place, run in enumerate(runs):
            per_token = run.bytes_per_token()
            if axis.name == "bytes" and per_token is None:
                continue
            x_scale = (per_token or 1.0) if axis.name == "bytes" else axis.scale
            y_scale = 1 / (math.log(2) * per_token) if in_bits and per_token else 1.0
            val_key = VAL_BITS_PER_BYTE if in_bits else VAL_LOSS
            for key, scale, has_marks in ((TRAIN_LOSS, y_scale, False), (val_key, 1.0, True)):
                points = [(x * x_scale, y * scale) for x, y in run.curve(key, axis.key)]
                if len(points) > (not has_marks):
                    lines.append(Line(place, points, has_marks))
        if lines:
            unit = "bits per byte" if in_bits else "nats per token"
            title = f"{'Bits per byte' if in_bits else 'Loss'} by {axis.name}"
            charts.append(Chart(title, line_chart(lines, axis.label, unit)))
            choices.append(axis.name)
    if not charts:
        return "Learning curves: no loss was logged before the run ended."
    chosen = choices.index("bytes") if not is_fair and "bytes" in choices else 0
    blocks.append(Charts(charts, choices=choices, chosen=chosen))
    for run in runs:
        if (step := run.diverged_at()) is not None:
            blocks.append(Note(f"{run.name}: the loss is not a number from step {step:,} on."))
        if not run.values(VAL_LOSS):
            blocks.append(Note(f"{run.name}: it ended before its first validation, or has none."))
    if (remark := tokenizer_remark(runs)) is not None:
        blocks.append(Note(remark))
    lead = "Thin lines are training loss, marked ones validation loss."
    return Section("learning", "Learning", lead, blocks)


class _Axis(NamedTuple):
    """What curves go by: a logged key, and what its values are multiplied with."""

    name: str
    key: str
    label: str
    scale: float = 1.0


def _axes(runs: Sequence[Run]) -> tuple[_Axis, ...]:
    times = [x for run in runs for x in run.values(THROUGHPUT_TRAINING_TIME_S)]
    in_minutes = bool(times) and max(times) > _LONG_RUN_S
    label = f"{'minutes' if in_minutes else 'seconds'} of training"
    scale = 1 / _SECONDS_PER_MINUTE if in_minutes else 1.0
    return (
        _Axis("tokens", TRAIN_TOKENS, "tokens"),
        _Axis("bytes", TRAIN_TOKENS, "bytes of text"),
        _Axis("steps", "step", "optimizer steps"),
        _Axis("time", THROUGHPUT_TRAINING_TIME_S, label, scale),
    )


def _all_in_bits(runs: Sequence[Run]) -> bool:
    return all(run.bytes_per_token() and bits_per_byte(run) is not None for run in runs)


def memory_section(runs: Sequence[Run]) -> Section | str | None:
    """The accounted parts of memory, in the phases of a step, and the measured peak."""
    if not runs:
        return None
    held = [
        {part: max(run.values(key), default=0.0) for part, key in MEMORY_PARTS.items()}
        for run in runs
    ]
    if not any(any(parts.values()) for parts in held):
        return "Memory by phase: nothing was logged; callbacks.MemoryMonitor logs it."
    logged = [part for part in _PARTS if any(parts[part] for parts in held)]
    tops = [max(sum(parts[p] for p in names) for names in _PHASES.values()) for parts in held]
    charts, rows = [], []
    for place, (run, parts) in enumerate(zip(runs, held, strict=True)):
        peak = peak_bytes(run)
        if not any(parts.values()):
            continue
        bars = [
            Bar(phase, [parts[part] if part in names else 0.0 for part in _PARTS])
            for phase, names in _PHASES.items()
        ]
        is_small = tops[place] < _MIN_SHARE * max(tops)
        limit = 1.08 * (tops[place] if is_small else max(tops))
        caption = "On a scale of its own." if is_small else ""
        charts.append(Chart(run.name, bar_chart(bars, "MiB", limit), caption))
        cells = [number(f"{parts[part]:,.2f}" if parts[part] else "-") for part in logged]
        measured = number("-" if peak is None else format_bytes(peak))
        rows.append([Cell(run.name, run=place), *cells, measured])
    head = [Cell(""), *(number(f"{part}, MiB") for part in logged), number("measured peak")]
    blocks: list[Block] = [Charts(charts, parts=_PARTS), Table(head, rows)]
    lead = (
        "What a training step holds, by part: the largest value that was logged. The measured peak"
        " is the allocator's on CUDA and the whole process's elsewhere, Python and its libraries"
        " included."
    )
    return Section("memory", "Memory by phase", lead, blocks)


def speed_section(runs: Sequence[Run]) -> Section | str | None:
    """Tokens per second over the run, and beside the dense baseline."""
    if not runs:
        return None
    charts = []
    lines = [
        Line(place, points, has_marks=len(points) < _MANY_POINTS)
        for place, run in enumerate(runs)
        if len(points := run.curve(THROUGHPUT_TOKENS_PER_S, "step")) > 1
    ]
    if lines:
        svg = line_chart(lines, "step", "tokens/s")
        charts.append(Chart("Tokens per second", svg, "Since the log before, validation left out."))
    bars = []
    for place, run in enumerate(runs):
        ours = run.summary.get("timed_tokens_per_s")
        dense = run.summary.get("dense_baseline_tokens_per_s")
        if ours and dense:
            name = _short(run.name) if len(runs) > 1 else "this run"
            bars += [
                Bar(name, [ours], place),
                Bar("its dense baseline", [dense], is_reference=True),
            ]
    if bars:
        caption = "A few steps of each in turn, on the same batch."
        charts.append(Chart("Beside the dense baseline", bar_chart(bars, "tokens/s"), caption))
    if not charts:
        return "Throughput: nothing was logged; callbacks.ThroughputMonitor logs it."
    blocks: list[Block] = [Charts(charts)]
    shares = [(run, run.values(THROUGHPUT_MFU)) for run in runs]
    if any(values for _, values in shares):
        texts = [f"{run.name} {values[-1]:.1%}" for run, values in shares if values]
        blocks.append(Note(f"Share of the device's peak, last logged: {', '.join(texts)}."))
    return Section("speed", "Throughput", "", blocks)


def compression_section(runs: Sequence[Run]) -> Section | str | None:
    """Parameters beside those of the dense baseline."""
    bars: list[Bar] = []
    rows = []
    for place, run in enumerate(runs):
        ours, dense = compression(run, "parameters"), compression(run, "dense_parameters")
        if not ours or not dense:
            continue
        label = _short(run.name) if len(runs) > 1 else "this run"
        twin = Bar("dense baseline", [dense / 1e6], is_reference=True)
        bars = [bar for bar in bars if bar != twin]  # one bar for equal baselines
        bars += [Bar(label, [ours / 1e6], place), twin]
        block_ratio = compression(run, "block_parameter_ratio")
        rows.append(
            [
                Cell(run.name, run=place),
                number(format_count(ours)),
                number(format_count(dense)),
                number(f"{block_ratio:.2f}x" if block_ratio else "-"),
                number(f"{dense / ours:.2f}x"),
            ]
        )
    if not rows and any("adapter" in run.summary for run in runs):
        return None  # an adapter has no dense baseline
    if not rows:
        return (
            "Compression: no parameters were counted; callbacks.CompressionMonitor and RunSummary"
            " count them for models that know their dense baseline."
            if runs
            else None
        )
    head = [Cell(""), *map(number, ("stored", "dense baseline", "blocks", "total"))]
    chart = Chart("Parameters", bar_chart(bars, "million"))
    lead = "Stored parameters beside the dense baseline's; ratios are dense over stored."
    return Section("compression", "Compression", lead, [Charts([chart]), Table(head, rows)])


def pipeline_section(runs: Sequence[Run]) -> Section | str | None:
    """The recorded steps of pipelines; nothing for runs without a pipeline."""
    charts, notes = [], []
    works = [Work.FORWARD.value, Work.BACKWARD.value, Work.WEIGHT.value]
    for run in runs:
        for recorded in run.steps[-1:]:
            title = f"{run.name}, step {recorded.step:,}"
            charts.append(Chart(title, timeline_chart(recorded.passes), "", is_wide=True))
            formula = run.values(PIPELINE_BUBBLE_SHARE_FORMULA)
            by_formula = f", {formula[-1]:.0%} by the schedule's formula" if formula else ""
            idle = f"{bubble_share(recorded.passes):.0%} of the ranks' time is idle"
            notes.append(Note(f"{title}: {idle}{by_formula}."))
    if not charts:
        strategies = [str(run.settings.get("trainer.strategy.class_path")) for run in runs]
        if any(name.endswith("PipelineStrategy") for name in strategies):
            return "Pipeline: no step was recorded; callbacks.PipelineTrace records one."
        return None
    lead = "What each rank did in a recorded step; numbers are microbatches."
    return Section("pipeline", "Pipeline", lead, [Charts(charts, works), *notes])


def settings_section(runs: Sequence[Run], evaluations: Sequence[Evaluation]) -> Section | None:
    """What ran: machine, versions, git state, settings."""
    blocks: list[Block] = []
    if runs:
        head = [Cell(""), *(Cell(run.name, run=place) for place, run in enumerate(runs))]
        if rows := _environment_rows(runs):
            blocks.append(Table(head, rows, "Command, code and machine"))
        for run in runs:
            if not run.environment:
                text = "has no environment.json: command, code and machine are unknown"
                blocks.append(Note(f"{run.name} {text}."))
        names = differing(runs) if len(runs) > 1 else _main_settings(runs[0])
        if names:
            rows = [
                [Cell(name), *(Cell(_written(run.settings.get(name))) for run in runs)]
                for name in names
            ]
            caption = "Settings that differ" if len(runs) > 1 else "Settings"
            blocks.append(Table(head, rows, caption))
        for run in runs:
            if run.settings:
                text = yaml.safe_dump(_nested(run.settings), sort_keys=False)
                blocks.append(Details(f"All settings of {run.name}", text))
            else:
                blocks.append(Note(f"{run.name}: config.yaml is not in the run folder."))
    for evaluation in evaluations:
        text = yaml.safe_dump(evaluation.head, sort_keys=False)
        blocks.append(Details(f"Evaluation {evaluation.name}", text))
    return Section("settings", "What ran", "", blocks) if blocks else None


def _environment_rows(runs: Sequence[Run]) -> list[list[Cell]]:
    found: dict[str, list[str]] = {}
    for place, run in enumerate(runs):
        for name, text in _environment(run.environment).items():
            found.setdefault(name, ["-"] * len(runs))[place] = text
    return [[Cell(name), *map(Cell, texts)] for name, texts in found.items()]


def _environment(environment: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in ("command", "started_at"):
        if name in environment:
            found[name.replace("_", " ")] = str(environment[name])
    if git := environment.get("git"):
        state = "with uncommitted changes" if git.get("dirty") else "clean"
        found["commit"] = f"{str(git.get('commit'))[:12]}, {state}"
    elif "git" in environment:
        found["commit"] = "an installed package, no checkout"
    machine = environment.get("machine", {})
    parts = [machine.get("cpu"), f"{machine.get('cores')} cores" if machine.get("cores") else None]
    parts += [f"{machine['memory_gib']} GiB"] if machine.get("memory_gib") else []
    if any(parts):
        found["machine"] = ", ".join(str(part) for part in parts if part)
    if machine.get("gpu"):
        found["GPU"] = str(machine["gpu"])
    versions = environment.get("versions", {})
    if versions:
        found["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return found


def _main_settings(run: Run) -> list[str]:
    return [
        name
        for name, value in run.settings.items()
        if value is not None
        and (name in _HEAD_SETTINGS or name.startswith(("model.init_args.", "data.init_args.")))
    ]


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        place = found
        *parents, last = name.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return found


def _written(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def _short(text: str) -> str:
    return text if len(text) <= 26 else f"{text[:12]}...{text[-11:]}"
