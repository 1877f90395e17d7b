"""What each rank did when: the picture of a pipeline step and the share of it that was idle."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple


class Work(StrEnum):
    """What a rank does with a microbatch."""

    FORWARD = "forward"
    BACKWARD = "backward"
    INPUT = "backward, inputs"
    WEIGHT = "backward, weights"


_COLORS = {
    Work.FORWARD: "#8ab4d8",
    Work.BACKWARD: "#e0975a",
    Work.INPUT: "#e0975a",
    Work.WEIGHT: "#9fc48a",
}


class Pass(NamedTuple):
    """One microbatch on one stage, in seconds since all ranks began the step together."""

    rank: int
    stage: int
    microbatch: int
    work: Work
    start_s: float
    end_s: float


def bubble_share(passes: Sequence[Pass]) -> float:
    """The idle share of all ranks' time, from the first pass's start to the last one's end.

    >>> a = Pass(0, 0, 0, Work.FORWARD, 0.0, 1.0)
    >>> bubble_share([a, a._replace(rank=1, start_s=1.0, end_s=2.0)])
    0.5
    """
    num_ranks = len({p.rank for p in passes})
    whole_s = max(p.end_s for p in passes) - min(p.start_s for p in passes)
    busy_s = sum(p.end_s - p.start_s for p in passes)
    return 1 - busy_s / (num_ranks * whole_s)


def chrome_trace(passes: Sequence[Pass]) -> dict[str, Any]:
    """The step for ``chrome://tracing`` or https://ui.perfetto.dev: one row per rank."""
    return {
        "displayTimeUnit": "ms",
        "traceEvents": [
            {
                "name": f"{p.work.value} {p.microbatch}",
                "cat": p.work.value,
                "ph": "X",
                "pid": 0,
                "tid": p.rank,
                "ts": round(p.start_s * 1e6, 1),
                "dur": round((p.end_s - p.start_s) * 1e6, 1),
                "args": {"stage": p.stage, "microbatch": p.microbatch},
            }
            for p in passes
        ],
    }


def draw(passes: Sequence[Pass], path: Path, title: str) -> None:
    """One row per rank over time; numbers are microbatches, later stages of a rank are darker.

    Args:
        passes: Passes of one step.
        path: File of the picture; its suffix sets the format.
        title: Title above the picture.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    start_s = min(p.start_s for p in passes)
    whole_ms = 1e3 * (max(p.end_s for p in passes) - start_s)
    ranks = sorted({p.rank for p in passes})
    num_stages = 1 + max(p.stage for p in passes)
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.45 * len(ranks)), layout="constrained")
    for p in passes:
        left_ms, length_ms = 1e3 * (p.start_s - start_s), 1e3 * (p.end_s - p.start_s)
        alpha = 0.65 if p.stage < num_stages / 2 and num_stages > len(ranks) else 1.0
        axis.barh(
            p.rank, length_ms, left=left_ms, height=0.9, color=_COLORS[p.work], alpha=alpha,
            edgecolor="white", linewidth=0.5,
        )  # fmt: skip
        if length_ms > whole_ms / 90:
            axis.text(
                left_ms + length_ms / 2, p.rank, str(p.microbatch), ha="center", va="center",
                fontsize=7,
            )  # fmt: skip
    for work in dict.fromkeys(p.work for p in passes):
        axis.barh([0], [0], color=_COLORS[work], label=work.value)
    axis.set_yticks(ranks, [f"rank {rank}" for rank in ranks])
    axis.invert_yaxis()
    axis.set_xlim(0, whole_ms)
    axis.set_xlabel("ms")
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower right", ncols=4, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
