"""The table original / small, and the model card that holds it."""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from fingpt_lightning.hub.card import (
    LOAD_BY_US,
    NEEDS_US,
    PACKAGE,
    dataset_of,
    evaluation_results,
    metadata_block,
    origin_of,
)
from fingpt_lightning.tasks.library import find_task
from fingpt_lightning.terminal.inputs import TASK_PREFIX, weighted_name
from fingpt_lightning.units import format_bytes, format_count

SPLIT = "validation"
"""The split of the tasks that are measured."""
MARK = "<!-- made by: fingpt compress -->"


def figures_rows(
    original: Mapping[str, Any], small: Mapping[str, Any]
) -> Iterator[tuple[str, str, str, str]]:
    """Name, original, small, and small over original, of each figure that both have.

    Args:
        original: Figures of `figures.measure`, and ``parameters``.
        small: The same of the small model.
    """
    for key, name, form in (
        ("parameters", "parameters", format_count),
        ("file_bytes", "bytes of the weights' files", format_bytes),
        ("memory_bytes", "bytes of the weights in memory", format_bytes),
    ):
        yield _row(name, original[key], small[key], form)
    for text in original["perplexity"]:
        before, after = (figures["perplexity"][text] for figures in (original, small))
        yield _row(f"perplexity, {text}", before, after, lambda x: f"{x:,.2f}")
    for task in original["tasks"]:
        before, after = (figures["tasks"][task] for figures in (original, small))
        yield _row(f"accuracy, {task}", before, after, lambda x: f"{x:.3f}")
    if len(original["tasks"]) > 1:
        before, after = (statistics.fmean(f["tasks"].values()) for f in (original, small))
        yield _row("accuracy, mean", before, after, lambda x: f"{x:.3f}")
    for key, name in (
        ("decoded_tokens_per_s", "tokens written per second"),
        ("answered_rows_per_s", "rows of tasks answered per second"),
    ):
        if key in original and key in small:
            yield _row(name, original[key], small[key], lambda x: f"{x:,.1f}")


def compression_card(
    name: str, settings: Mapping[str, Any], original: Mapping[str, Any], small: Mapping[str, Any]
) -> str:
    """The text of ``README.md``.

    Args:
        name: Name of the folder.
        settings: Settings of the compression.
        original: Figures of the original.
        small: Figures of the small model.
    """
    lines = [
        *_metadata(name, settings, small).splitlines(),
        f"# {name}", "", MARK, "",
        f"Made of `{settings['model']}` by `fingpt compress`: {settings['size']:g} of its"
        f" parameters,{_dropped(settings)} {settings['refine']} steps of refinement per block,"
        f" {_training(settings)}, stored as {settings['format']}{_in_dtype(settings)}.",
        "", f"Calibration: {', '.join(f'`{text}`' for text in settings['calibration'])},"
        f" {settings['calibration_tokens']:,} tokens.", "",
        "| | original | small | small / original |", "| --- | --: | --: | --: |",
    ]  # fmt: skip
    lines += ["| " + " | ".join(row) + " |" for row in figures_rows(original, small)]
    lines += [
        "", f"Measured on: {small['device']}.", "",
        "```python", NEEDS_US + LOAD_BY_US.format(name=name), "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _in_dtype(settings: Mapping[str, Any]) -> str:
    return f" in {settings['dtype']}" if settings["format"] == "low_rank" else ""


def _metadata(name: str, settings: Mapping[str, Any], small: Mapping[str, Any]) -> str:
    form = settings["format"]
    is_quantized = form in ("int8", "nf4")
    named = [weighted_name(text)[0] for text in settings["calibration"]]
    tasks = [text.removeprefix(TASK_PREFIX) for text in named if text.startswith(TASK_PREFIX)]
    results = {
        task: {
            "accuracy": accuracy,
            "kind": find_task(task).kind,
            "main_metric": "accuracy",
            "split": SPLIT,
        }
        for task, accuracy in small["tasks"].items()
    }
    return metadata_block(
        name,
        origin_of(settings["model"]),
        library=PACKAGE,
        tags=["low-rank", "compressed", *([form] if is_quantized else [])],
        relation="quantized" if is_quantized else None,
        datasets=[found for task in tasks if (found := dataset_of(task)) is not None],
        results=evaluation_results(results),
    )


def _training(settings: Mapping[str, Any]) -> str:
    weight, rounded_steps = settings["teacher_weight"], settings["heal_quantized"]
    learned = "its predictions" if weight else "the text's own tokens"
    if 0 < weight < 1:
        learned += f" (weight {weight:g}) and the text's own tokens"
    text = f"{settings['heal']} steps of training on {learned}"
    return f"{text}, {rounded_steps} more with rounded weights" if rounded_steps else text


def _dropped(settings: Mapping[str, Any]) -> str:
    number = settings["drop_blocks"]
    return f" {number} of its blocks left out," if number else ""


def _row(
    name: str, original: int | float, small: int | float, form: Any
) -> tuple[str, str, str, str]:
    ratio = f"{small / original:.3f}" if original else "-"
    return name, form(original), form(small), ratio
