"""The picture of the quality benchmark: loss by tokens, by time, and over compression."""

import itertools
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality_runs import Run

_COLORS = ("#777777", "#9333ea", "#c2410c", "#0f766e", "#1d4ed8", "#b45309", "#be185d", "#4d7c0f")


def _is_falling(run: Run) -> bool:
    """Whether the curve is highest where it begins."""
    return run.curve_loss_nats[0] == max(run.curve_loss_nats)


def _runs_over_time(
    runs: Sequence[Run], rows: Sequence[Mapping[str, Any]], timed: Container[str]
) -> list[Run]:
    """The runs of equal time beside the first row's; without any, those of equal tokens."""
    curves = [run for run in runs if run.curve_steps]
    equal_time = [run for run in curves if run.stage == "equal time"]
    equal_tokens = [run for run in curves if run.stage == "equal tokens"]
    if not equal_time:
        return [run for run in equal_tokens if run.variant in timed]
    dense = rows[0]["contender"]
    return [*(run for run in equal_tokens if run.variant == dense), *equal_time]


def _first_of_each(runs: Sequence[Run]) -> list[Run]:
    """The first run of each variant."""
    return list({run.variant: run for run in reversed(runs)}.values())[::-1]


def draw(
    runs: Sequence[Run],
    rows: Sequence[Mapping[str, Any]],
    step_times_s: Mapping[str, Mapping[str, float]],
    tokens_per_step: int,
    path: Path,
) -> None:
    """Writes an SVG; of runs with several seeds the first is drawn.

    Args:
        runs: Runs with their curves.
        rows: Rows of the record.
        step_times_s: Spread of step times by variant: time is steps times the median.
        tokens_per_step: Tokens per step: tokens are steps times this.
        path: Path of the picture.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    shown = [row["contender"] for row in rows if row.get("equal_tokens_loss_nats")]
    shown += [run.variant for run in runs if run.curve_steps]
    colors = dict(zip(dict.fromkeys(shown), itertools.cycle(_COLORS), strict=False))
    by_tokens = [run for run in runs if run.stage == "equal tokens" and run.curve_steps]
    for axis, drawn, is_over_time in (
        (axes[0], by_tokens, False),
        (axes[1], _runs_over_time(runs, rows, step_times_s), True),
    ):
        for run in _first_of_each(drawn):
            unit = tokens_per_step / 1e6
            if is_over_time:
                unit = step_times_s[run.variant]["median"] / 60
            x = [step * unit for step in run.curve_steps]
            axis.plot(
                x, run.curve_loss_nats, "o-", ms=3, lw=1.3, color=colors[run.variant],
                label=run.variant,
            )  # fmt: skip
    axes[0].set_xlabel("million tokens")
    axes[1].set_xlabel("minutes of training, as steps were timed")
    for row in rows:
        for loss in row.get("equal_tokens_loss_nats", {}).values():
            axes[2].plot(row["total_compression_ratio"], loss, "o", color=colors[row["contender"]])
    axes[2].margins(x=0.25)
    axes[2].set_xlabel("times smaller in total")
    axes[2].set_ylabel("nats per token, whole text")
    axes[0].set_ylabel("nats per token, first batches")
    if highest := [
        max(run.curve_loss_nats) for run in runs if run.curve_steps and _is_falling(run)
    ]:
        # While a dense layer guides, the factors alone are far above all others.
        for axis in axes[:2]:
            axis.set_ylim(top=1.03 * max(highest))
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if axes[0].lines:
        lines, labels = axes[0].get_legend_handles_labels()
        # Below all three: names of variants are long, and none has a corner to spare.
        figure.legend(
            lines, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False,
            fontsize=8,
        )  # fmt: skip
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
