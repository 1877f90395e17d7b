"""A plan as people read it."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from fingpt_lightning.planning.plan import TILE
from fingpt_lightning.units import format_bytes, format_count, format_duration

_PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "peak")
_NAMES = {
    "optimizer": "optimizer state",
    "loss": "the loss, for a while",
    "peak": "peak, accounted",
}


def plan_table(plan: Mapping[str, Any]) -> Table:
    """Parameters, memory, length and time, beside what a calibration measured.

    Args:
        plan: Plan as ``fingpt plan --json`` writes it.
    """
    title = f"Plan of {plan['config']}"
    table = Table(title=title, min_width=len(title))
    measured: Mapping[str, int] = plan.get("measured_bytes") or {}
    table.add_column("")
    table.add_column("planned", justify="right")
    if measured:
        table.add_column("measured", justify="right")
    blank = [""] if measured else []

    def row(name: str, text: str) -> None:
        table.add_row(name, text, *blank)

    row("parameters, stored", format_count(plan["parameters"]))
    if plan["dense_parameters"]:
        row("parameters, dense baseline", format_count(plan["dense_parameters"]))
    if same_size := plan.get("same_size_dense"):
        row("width of a dense network of this size", f"{same_size['width']:,}")
    tiles = plan.get("rank_tiles") or {"ranks": []}
    if any(one["full_rank"] for one in tiles["ranks"]):
        row(f"tiles of {TILE} columns filled, on a GPU", _filled(tiles))
    row("trained share", f"{plan['trained'] / plan['parameters']:.2%}")
    table.add_section()
    for part in _PARTS:
        own = measured.get(part)
        beside = ["-" if own is None else format_bytes(own)] if measured else []
        table.add_row(_NAMES.get(part, part), format_bytes(plan["bytes"][part]), *beside)
    if plan.get("copied_bytes"):
        row("weights held a second time, in the peak", format_bytes(plan["copied_bytes"]))
    if plan.get("teacher_bytes"):
        row("the teacher's weights, in the peak", format_bytes(plan["teacher_bytes"]))
    if plan["offloaded_bytes"]:
        row("of these in the host's memory", format_bytes(plan["offloaded_bytes"]))
    row(f"free on {plan['device']}", format_bytes(plan["free_bytes"]))
    table.add_section()
    steps, epochs = plan["steps"], plan["epochs"]
    row("optimizer steps", "unknown" if steps is None else f"{steps:,}")
    row("epochs", "unknown" if epochs is None else f"{epochs:,.2f}")
    tokens = plan["tokens"]
    row("tokens, all steps", "unknown" if tokens is None else format_count(tokens))
    seconds = plan["seconds"]
    about = "" if plan["is_calibrated"] else "by FLOP, "
    row("time training", "unknown" if seconds is None else f"{about}{format_duration(seconds)}")
    return table


def _filled(tiles: Mapping[str, Any]) -> str:
    """The share, and of the ranks that leave a part free the one of most layers."""
    text = f"{tiles['filled']:.0%}"
    for one in tiles["ranks"]:
        if one["full_rank"] not in (None, one["rank"]):
            return f"{text}, all at rank {one['full_rank']} in place of {one['rank']}"
    return text


def stages_table(stages: list[Mapping[str, Any]]) -> Table:
    """One row per rank of the pipeline."""
    table = Table(title="Pipeline, by rank")
    for column in ("rank", "blocks", "parameters", "weights and state", "activations", "together"):
        table.add_column(column, justify="right")
    for stage in stages:
        held, kept = stage["weights_and_state"], stage["activations"]
        table.add_row(
            str(stage["rank"]),
            stage["blocks"],
            format_count(stage["parameters"]),
            format_bytes(held),
            format_bytes(kept),
            format_bytes(held + kept),
        )
    return table
