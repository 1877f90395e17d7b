"""The confusion of a task, drawn."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fingpt_lightning.tasks import Task


def confusion_png(confusion: Sequence[Sequence[int]], task: Task) -> bytes:
    """A PNG: a row per gold label, a column per answer, shades by share of the row, counts inside.

    Args:
        confusion: Confusion as in `LabelMetrics`.
        task: Task of the labels.
    """
    counts = np.asarray(confusion)
    answers = [*task.labels, "missing"]
    if not counts[:, -1].any():
        counts, answers = counts[:, :-1], answers[:-1]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = 2.0 + 0.7 * len(answers)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(answers)), answers, rotation=40, ha="right")
    axes.set_yticks(range(len(task.labels)), task.labels)
    axes.set_xlabel("answer")
    axes.set_ylabel("gold")
    axes.set_title(task.name)
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{count:,}", ha="center", va="center", color=color)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
